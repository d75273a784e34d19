"""Reads the results of an ablation from its run folders, and writes the files that compare the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from resnext_ignite.ablation.plan import Plan, PlannedRun
from resnext_ignite.ablation.plot import draw_ablation
from resnext_ignite.ablation.results import Result, as_json, compare, table
from resnext_ignite.config.resume import SAFE_ON_RESUME, adopt_resolved, changed_values
from resnext_ignite.plots.figures import save_figure
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import NonFiniteError, RunFolderError
from resnext_ignite.runtime.storage import write_durably

_SAME_IN_ALL = ("train.epochs", "data.root", "data.on_error", "data.max_skipped")


def result_of(run: PlannedRun, path: Path) -> Result:
    """Read the state and the result of a run from its folder.

    A run that ended with a non-finite loss or gradient is `failed` and is not repeated, because it would fail again in
    the same way. A run that `evaluation.abandon` stopped is `failed` too.

    Raises:
        RunFolderError: the run in the folder has another config than `run`.
    """
    folder = RunFolder(path)
    saved = folder.saved_config()
    if saved is None:
        return Result(run.variant, run.seed, "unfinished")
    changes = changed_values(adopt_resolved(run.config, saved), saved)
    # A resumed run may change the keys in _SAME_IN_ALL, but the runs of an ablation must agree on them.
    refused = [key for key in changes if key not in SAFE_ON_RESUME or key in _SAME_IN_ALL]
    if refused:
        listed = ", ".join(f"{key} {changes[key][0]} -> {changes[key][1]}" for key in refused)
        raise RunFolderError(f"{path}: the plan has changed since this run: {listed}; choose another --output-dir")
    status, records = folder.read_status(), folder.read_metrics()
    diverged = status.get("state") == "failed" and status.get("exit_code") == NonFiniteError.exit_code
    if diverged or status.get("state") == "stopped_early":
        return Result(run.variant, run.seed, "failed")
    tested = [record for record in records if record["split"] == "test"]
    if status.get("state") != "completed" or not tested:
        return Result(run.variant, run.seed, "unfinished")
    return Result(
        run.variant,
        run.seed,
        "completed",
        error=tested[-1]["top1_error"],
        first_error=next((record["top1_error"] for record in tested if record["epoch"] == 0), None),
        epochs=tested[-1]["epoch"],
        seconds=tested[-1]["wall_s"],
        evaluation_seconds=sum(record.get("evaluation_s", 0.0) for record in records),
    )


def write_results(plan: Plan, results: Sequence[Result], folder: Path) -> None:
    """Write `ablation.md`, `ablation.json` and `ablation.png`, each atomically."""
    rows = compare(results, plan.variants, plan.baseline)
    save_figure(draw_ablation(results, rows, plan.baseline), folder / "ablation.png")
    page = f"# {plan.name}\n\n{table(rows, plan.baseline)}\n![The same as a plot](ablation.png)\n"
    text = json.dumps(as_json(results, rows, plan.baseline), indent=2) + "\n"
    write_durably(folder / "ablation.md", page)
    write_durably(folder / "ablation.json", text)
