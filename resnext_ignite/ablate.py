"""Train a recipe and its variants over several seeds: `python -m resnext_ignite.ablate PLAN.yaml --output-dir DIR`.

Each run is an ordinary training run, in its own folder in DIR. One process trains all runs, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from resnext_ignite.distributed.environment import launched_world_size
from resnext_ignite.runtime.console import set_up_streams
from resnext_ignite.runtime.errors import ConfigError, NonFiniteError, PreemptedError, run_command
from resnext_ignite.runtime.signals import install_exit_during_start, install_exit_on_signals, note_stop_signals

if TYPE_CHECKING:
    from resnext_ignite.ablation.plan import Plan, PlannedRun
    from resnext_ignite.ablation.results import Result


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with code 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.ablate",
        description="Train a recipe and its variants over several seeds, and compare their last-epoch errors.",
        epilog="Run the same command again to continue after a stop. Plans: configs/ablations/.",
    )
    parser.add_argument("plan", metavar="PLAN.yaml", help="recipe, seeds and variants, as in configs/ablations/")
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="where the runs and the results go")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--verbose", action="store_true", help="print the full log of each run, as train does")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config values for all variants")
    return parser.parse_intermixed_args(arguments)


def make_runs(plan: Plan, output_dir: Path, *, verbose: bool) -> list[Result]:
    """Train all runs that are not finished yet, write the results after each run, and return the results of all runs.

    Raises:
        PreemptedError: a signal arrived; all progress is saved.
        ResnextError: a run failed. A run that fails because of a non-finite number raises no error here: it counts as
            failed, and the next run starts.
    """
    from resnext_ignite.ablation.runs import result_of, write_results
    from resnext_ignite.data import keep_data_loaded

    results = {run.folder: result_of(run, output_dir / run.folder) for run in plan.runs}
    missing = [run for run in plan.runs if results[run.folder].state == "unfinished"]
    done = len(results) - len(missing)
    if done:
        print(f"{done} of {len(results)} runs are already finished", file=sys.stderr)
    with note_stop_signals() as stop, keep_data_loaded(), _quiet(not verbose):
        try:
            for run in missing:
                _train(run, output_dir / run.folder)
                results[run.folder] = result = result_of(run, output_dir / run.folder)
                done += 1
                print(f"run {done} of {len(results)}: {_described(result)}", file=sys.stderr)
                write_results(plan, list(results.values()), output_dir)
                # If a signal arrived while the run was ending, the run ignored it: stop before the next run.
                if done < len(results) and (signal := stop()):
                    raise PreemptedError(signal)
        except (PreemptedError, KeyboardInterrupt) as error:
            raise PreemptedError(
                f"stopped by {stop() or error}: {done} of {len(results)} runs are done, and checkpoints of the next "
                "are kept; run the same command again to continue"
            ) from None
    write_results(plan, list(results.values()), output_dir)
    return list(results.values())


def _train(run: PlannedRun, folder: Path) -> None:
    """Train or resume a run. If it fails because of a non-finite number, print the error instead of raising it.

    The run folder records that the run failed.
    """
    import torch

    from resnext_ignite import train

    # Install these handlers before each run: a finished run leaves handlers installed that ignore further signals.
    install_exit_during_start()
    try:
        train.run(0, run.config, folder, resume=True)
    except NonFiniteError as error:
        print(f"{folder}: failed: {error}", file=sys.stderr)
    finally:
        # Free the memory: a run's engine and handlers form reference cycles, and compiled code refers to the network.
        if run.config.train.compile:
            torch.compiler.reset()
        gc.collect()


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Keep the runs' output away from standard output, which is for the results.

    Args:
        quiet: if true, drop the output, and all log lines below the level of warnings. If false, send the output to
            standard error.
    """
    logging.disable(logging.INFO if quiet else logging.NOTSET)
    try:
        with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stderr):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _described(result: Result) -> str:
    error = result.state if result.error is None else f"test error {result.error:.2f} % in {result.seconds:.1f} s"
    return f"{result.variant}, seed {result.seed}: {error}"


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can correct."""
    parsed = parse_arguments(arguments)
    from resnext_ignite.ablation.plan import load_plan

    if launched_world_size() > 1:
        raise ConfigError(f"{launched_world_size()} ranks: an ablation is one process; start it without a launcher")
    plan = load_plan(Path(parsed.plan), parsed.overrides)
    if all(run.config.train.device == "cpu" for run in plan.runs):
        # Hide the GPUs before torch looks for them, as train does.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    results = make_runs(plan, Path(parsed.output_dir), verbose=parsed.verbose)

    from resnext_ignite.ablation.results import as_json, compare, table

    rows = compare(results, plan.variants, plan.baseline)
    if parsed.json:
        set_up_streams(prints_result=True)
        print(json.dumps(as_json(results, rows, plan.baseline)))
    else:
        print(table(rows, plan.baseline), end="")
        print(f"\nresults: {Path(parsed.output_dir) / 'ablation.md'}, with ablation.json and ablation.png beside it")
    return 0


if __name__ == "__main__":
    install_exit_on_signals()
    run_command(main, prints_result=False)
