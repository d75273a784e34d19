"""Draws an ablation: each variant's mean error with its standard error, and the error of each seed as a small dot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resnext_ignite.ablation.results import Result, Row
from resnext_ignite.plots.figures import printable, pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_ablation(results: Sequence[Result], rows: Sequence[Row], baseline: str) -> Figure:
    """Draw one row per variant, from top to bottom, and a vertical line at the baseline's mean.

    The row of a variant without a completed run stays empty.
    """
    figure, axes = pyplot().subplots(figsize=(8, 1.6 + 0.42 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        color = "C0" if row.variant == baseline else "C1" if row.exceeds else "0.45"
        dots = [result.error for result in results if result.variant == row.variant and result.error is not None]
        axes.scatter(dots, [place + 0.22] * len(dots), s=12, color=color, alpha=0.5, linewidths=0)
        if row.error is not None:
            axes.errorbar(row.error, place, xerr=row.standard_error, fmt="D", color=color, markersize=5, capsize=4)
            if row.variant == baseline:
                axes.axvline(row.error, color="C0", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(range(len(rows)), [f"{printable(row.variant)}{_counted(row)}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("last-epoch test error (%): mean, standard error, seeds")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _counted(row: Row) -> str:
    return f" (n={row.completed}{f', {row.failed} failed' if row.failed else ''})"
