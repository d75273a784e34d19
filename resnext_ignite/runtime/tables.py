"""Formats tables as text: aligned columns for a terminal, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns; all rows have the same number of cells."""
    return ["  ".join(cells).rstrip() for cells in _padded(rows)]


def markdown(rows: Sequence[Sequence[str]], *, align: bool = False) -> list[str]:
    """Return rows of cells as the lines of a Markdown table; the first row is its header.

    Args:
        align: pad the cells, so that the source text is aligned as well.
    """
    head, *body = _padded(rows) if align else rows
    rule = "|" + "|".join("-" * (len(cell) + 2) if align else "---" for cell in head) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in body)]


def _padded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
