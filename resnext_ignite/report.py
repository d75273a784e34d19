"""Report runs: `python -m resnext_ignite.report RUN [RUN ...]` prints a table and draws all curves in one plot.

With `--html FILE`, the command also writes a page with the details of the runs; `plots/report_page.py` builds the page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from resnext_ignite.runtime.errors import RunFolderError, run_command
from resnext_ignite.runtime.storage import check_output_path
from resnext_ignite.runtime.tables import aligned

_PAGE_ONLY_KEYS = ("records", "config", "status", "folder")


def summarize(path: Path) -> dict[str, Any]:
    """Return a run's state, epochs, last and best errors (percent), speed, time, records, config, status and folder.

    The error of the last evaluation is the result of the run. The best error is only additional information: if the
    test split selects the best epoch, the best error is biased.

    Raises:
        RunFolderError: `path` is not a run folder, or the run has not evaluated anything yet.
    """
    from resnext_ignite.runs.folder import RunFolder

    folder = RunFolder(path)
    records, config = folder.read_metrics(), folder.saved_config()
    if config is None:
        raise RunFolderError(f"{path}: not a run folder; it has no config.yaml")
    if not records:
        raise RunFolderError(f"{path}: the run has not evaluated anything yet")
    status, last = folder.read_status(), records[-1]
    best = status.get("best") or last
    speeds = sorted(record["images_per_s"] for record in records if record["images_per_s"])
    return {
        "run": str(path),
        "state": status.get("state", "unknown"),
        "model": config.model.name,
        "data": config.data.name,
        "epoch": last["epoch"],
        "epochs": config.train.epochs,
        "split": last["split"],
        "images": last["images"],
        "last_error": last["top1_error"],
        "last_top5_error": last["top5_error"],
        "last_error_flip": last.get("top1_error_flip"),
        "best_error": best["top1_error"],
        "best_epoch": best["epoch"],
        "best_split": best["split"],
        "images_per_s": speeds[len(speeds) // 2] if speeds else None,
        "wall_s": last["wall_s"],
        "records": records,
        "config": config,
        "status": status,
        "folder": folder,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Return the table of runs, with aligned columns."""
    rows = [["run", "state", "model", "data", "epoch", "split", "last error %", "(best, epoch)", "images/s", "minutes"]]
    flip = any(run["last_error_flip"] is not None for run in runs)
    if flip:
        rows[0].append("last error with flips %")
    for run in runs:
        rows.append(
            [
                run["run"],
                run["state"],
                run["model"],
                run["data"],
                f"{run['epoch']}/{run['epochs']}",
                f"{run['split']} ({run['images']})",
                f"{run['last_error']:.2f}",
                f"({run['best_error']:.2f}, {run['best_epoch']})",
                f"{run['images_per_s']:.0f}" if run["images_per_s"] else "-",
                f"{run['wall_s'] / 60:.1f}",
            ]
        )
        if flip:
            rows[-1].append("-" if run["last_error_flip"] is None else f"{run['last_error_flip']:.2f}")
    return "\n".join(aligned(rows))


def differences(runs: list[dict[str, Any]]) -> list[str]:
    """Return one line for each config key in which the runs differ."""
    from resnext_ignite.config.resume import differing_values

    differing = differing_values([run["config"] for run in runs])
    return [f"{key}: " + " | ".join(json.dumps(value) for value in values) for key, values in differing.items()]


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can correct."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.report", description="Print a table of runs, and draw their curves in one plot."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--output", metavar="FILE.png", help="default: RUN/curves.png; of several runs: curves.png")
    parser.add_argument("--html", metavar="FILE.html", help="also write a self-contained HTML page")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parsed = parser.parse_args(arguments)
    for option in ("output", "html"):
        if vars(parsed)[option]:
            check_output_path(f"--{option}", Path(vars(parsed)[option]))
    runs = [summarize(Path(path)) for path in dict.fromkeys(parsed.runs)]

    from resnext_ignite.plots.figures import draw_curves, save_figure

    single = Path(runs[0]["run"]) / "curves.png"
    output = Path(parsed.output) if parsed.output else single if len(runs) == 1 else Path("curves.png")
    named = {_short_name(run, runs): run for run in runs}
    save_figure(draw_curves({name: run["records"] for name, run in named.items()}), output)
    if parsed.html:
        from resnext_ignite.plots.report_page import save_page

        save_page(named, Path(parsed.html))
    if parsed.json:
        plain = [{key: value for key, value in run.items() if key not in _PAGE_ONLY_KEYS} for run in runs]
        pages = {"html": parsed.html} if parsed.html else {}
        print(json.dumps({"runs": plain, "curves": str(output), **pages}))
        return 0
    print(table(runs))
    if len(runs) > 1:
        print("\nconfigs differ in:", *differences(runs), sep="\n  ")
    print(f"\ncurves: {output}")
    if parsed.html:
        print(f"page: {parsed.html}")
    return 0


def _short_name(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return the name of the run's folder; if several of the runs have folders of this name, return the given path."""
    name = Path(run["run"]).resolve().name
    return name if sum(Path(other["run"]).resolve().name == name for other in runs) == 1 else run["run"]


if __name__ == "__main__":
    run_command(main)
