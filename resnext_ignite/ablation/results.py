"""Computes statistics over the runs of an ablation (means, standard errors, paired differences) and formats a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from resnext_ignite.runtime.tables import markdown

_COLUMNS = ("variant", "seeds", "error at epoch 0 %", "last-epoch error %", "against the baseline", "seconds a run")


@dataclass(frozen=True)
class Result:
    """The state and the result of one planned run.

    `error` is the top-1 test error in percent after the last epoch, and `first_error` the top-1 test error at epoch 0.
    `seconds` is the run's wall-clock time, and `evaluation_seconds` is the part of `seconds` that evaluations took. A
    field is None if its value is unknown.
    """

    variant: str
    seed: int
    state: Literal["completed", "failed", "unfinished"]
    error: float | None = None
    first_error: float | None = None
    epochs: int | None = None
    seconds: float | None = None
    evaluation_seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """The statistics of a variant over its completed runs.

    Errors are in percent, and differences of errors in percentage points. A field is None if its value is undefined.

    `pairs` is the number of seeds for which both the variant and the baseline completed. `difference` is the mean, over
    these seeds, of the variant's error minus the baseline's. `exceeds` is true if the absolute value of `difference` is
    more than twice `difference_standard_error`.
    """

    variant: str
    completed: int
    failed: int
    first_error: float | None
    error: float | None
    standard_error: float | None
    pairs: int
    difference: float | None
    difference_standard_error: float | None
    exceeds: bool
    seconds: float | None


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None if there are no values."""
    return statistics.fmean(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean: sample standard deviation / sqrt(n); None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def compare(results: Sequence[Result], variants: Sequence[str], baseline: str) -> list[Row]:
    """Return a row for each variant, in the order of `variants`."""
    errors: dict[str, dict[int, float]] = {variant: {} for variant in variants}
    for result in results:
        if result.error is not None:
            errors[result.variant][result.seed] = result.error
    return [_row(variant, results, errors, baseline) for variant in variants]


def _row(variant: str, results: Sequence[Result], errors: dict[str, dict[int, float]], baseline: str) -> Row:
    own = [result for result in results if result.variant == variant]
    found, reference = list(errors[variant].values()), errors[baseline]
    differences = []
    if variant != baseline:
        differences = [error - reference[seed] for seed, error in errors[variant].items() if seed in reference]
    difference, spread = mean(differences), standard_error(differences)
    return Row(
        variant=variant,
        completed=len(found),
        failed=sum(result.state == "failed" for result in own),
        first_error=mean([result.first_error for result in own if result.first_error is not None]),
        error=mean(found),
        standard_error=standard_error(found),
        pairs=len(differences),
        difference=difference,
        difference_standard_error=spread,
        exceeds=difference is not None and spread is not None and abs(difference) > 2 * spread,
        seconds=mean([result.seconds for result in own if result.seconds is not None]),
    )


def table(rows: Sequence[Row], baseline: str) -> str:
    """Return a Markdown table with aligned columns, followed by an explanation of the signs `±` and `*` in it."""
    cells = [_COLUMNS, *(_cells(row, baseline) for row in rows)]
    lines = markdown(cells, align=True)
    notes = ["", "± is the standard error of the mean over seeds; differences are taken seed by seed."]
    if any(row.exceeds for row in rows):
        notes.append("`*`: a difference of more than twice its standard error; with few seeds a hint, not a proof.")
    return "\n".join([*lines, *notes]) + "\n"


def _cells(row: Row, baseline: str) -> tuple[str, ...]:
    against = _with_error(row.difference, row.difference_standard_error, "+.2f") + (" *" if row.exceeds else "")
    # Show the number of pairs if it is less than the number of completed runs. This happens if the variant completed a
    # seed, but the baseline did not.
    against += f" ({row.pairs} pairs)" if 0 < row.pairs < row.completed else ""
    return (
        row.variant.replace("|", "\\|"),
        f"{row.completed}" + (f" ({row.failed} failed)" if row.failed else ""),
        _with_error(row.first_error, None, ".2f"),
        _with_error(row.error, row.standard_error, ".2f"),
        "baseline" if row.variant == baseline else against,
        _with_error(row.seconds, None, ".1f"),
    )


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + (f" ± {error:.2f}" if error is not None else "")


def as_json(results: Sequence[Result], rows: Sequence[Row], baseline: str) -> dict[str, Any]:
    """Return the baseline, the rows of the table and all runs, as values that can be written to JSON."""
    return {
        "baseline": baseline,
        "variants": [asdict(row) for row in rows],
        "runs": [asdict(result) for result in results],
    }
