"""Tests of the tests: each line that keeps a run from being lost is broken, and a named test must notice.

`pytest -m soak tests/test_mutants.py -rA` lists each mutant with the test that caught it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.soak

STEPS, DIES = "test_checkpoint.py::test_the_steps_of_a_save", "test_faults.py::test_a_run_that_dies_at_each_step"
KILLED = "test_train.py::test_a_run_killed_at_any_iteration"
GOES_ON = "test_train.py::test_scaler_generators_best_and_patience_go_on"

# What is broken, the file, the line, what stands there instead, and the test that notices.
MUTANTS = [
    (
        "no fsync of the file",
        "runtime/storage.py",
        "os.fsync(file.fileno())\n            if before",
        "pass\n            if before",
        STEPS,
    ),
    (
        "no fsync of the folder",
        "runtime/storage.py",
        "        _sync_folder(path.parent)\n\n\ndef write_durably",
        "\n\ndef write_durably",
        STEPS,
    ),
    (
        "written in place",
        "runtime/storage.py",
        "    temporary = temporary_path(path)\n    with",
        "    temporary = path\n    with",
        DIES,
    ),
    (
        "half-written files stay after an error",
        "runtime/storage.py",
        "                temporary.unlink(missing_ok=True)\n",
        "                pass\n",
        "test_checkpoint.py::test_a_save_that_fails",
    ),
    (
        "nothing is read back",
        "runs/checkpoint.py",
        "if found != digest:",
        "if False:",
        "test_checkpoint.py::test_storage_that_lies",
    ),
    ("no checksum", "runs/checkpoint.py", "        _write_sums(path, [digest, *replaced])\n", "        pass\n", STEPS),
    (
        "the old file's sum is dropped before the rename",
        "runs/checkpoint.py",
        "[digest, *replaced]",
        "[digest]",
        "test_checkpoint.py::test_a_crash_between_checksum_and_rename",
    ),
    (
        "checksums are not compared",
        "runs/checkpoint.py",
        "if found not in expected:",
        "if False:",
        "test_faults.py::test_a_damaged_newest_checkpoint",
    ),
    (
        "files are loaded without a check",
        "runs/checkpoint.py",
        "    verify_checkpoint(path)\n    try:\n        state = torch.load",
        "    try:\n        state = torch.load",
        "test_checkpoint.py::test_damage_is_always_found",
    ),
    (
        "downloaded pickles are run",
        "weights/pretrained.py",
        "weights_only=True",
        "weights_only=False",
        "test_pretrained.py::test_torchvisions_weights_are_loaded_and_never_run",
    ),
    (
        "pickles are run",
        "runs/checkpoint.py",
        "weights_only=True",
        "weights_only=False",
        "test_checkpoint.py::test_a_hostile_file",
    ),
    (
        "the oldest is resumed",
        "runs/checkpoint.py",
        "sorted(found, reverse=True)",
        "sorted(found)",
        "test_checkpoint.py::test_the_newest_good_one",
    ),
    (
        "the newest by file time is resumed",
        "runs/checkpoint.py",
        "found = [(int(match[1]), path)",
        "found = [(int(path.stat().st_mtime_ns), path)",
        "test_checkpoint.py::test_the_newest_good_one",
    ),
    (
        "all damaged starts anew",
        "runs/checkpoint.py",
        "    if unusable:\n        raise CheckpointError(",
        "    if False:\n        raise CheckpointError(",
        "test_train.py::test_resuming_only_damaged_checkpoints",
    ),
    (
        "a full disk is told as torch tells it",
        "runs/checkpoint.py",
        "raise hashing.error or error from None",
        "raise",
        "test_faults.py::test_a_disk_that_fills",
    ),
    (
        "remains of a killed save stay",
        "runs/folder.py",
        "        remove_leftovers(self.checkpoints)\n",
        "",
        DIES,
    ),
    (
        "no lock",
        "runs/folder.py",
        "            self._lock.acquire(timeout=0)\n",
        "            pass\n",
        "test_faults.py::test_a_second_process",
    ),
    (
        "another run's folder is taken",
        "runs/folder.py",
        "if not resume and folder.holds_a_run():",
        "if False:",
        "test_train.py::test_a_folder_that_holds_a_run",
    ),
    (
        "a changed config is taken",
        "runs/folder.py",
        "    if refused:\n",
        "    if False:\n",
        "test_train.py::test_a_config_that_would_change",
    ),
    (
        "a damaged file stays in the way",
        "runs/folder.py",
        "                set_aside(damaged)\n",
        "                pass\n",
        "test_faults.py::test_a_run_goes_on_from_the_checkpoint_before",
    ),
    (
        "lost evaluations stay in metrics.jsonl",
        "training/handlers/session.py",
        "            self.run.folder.truncate_metrics(self.evaluation.records)\n",
        "            pass\n",
        DIES,
    ),
    (
        "pruned before the save",
        "training/handlers/checkpointing.py",
        "        save_checkpoint(newest, content)\n",
        "        for old in sorted(self.folder.glob('iteration_*.pt'), reverse=True)[self.keep - 1 :]:\n"
        "            old.unlink()\n"
        "            checksum_path(old).unlink(missing_ok=True)\n"
        "        save_checkpoint(newest, content)\n",
        DIES,
    ),
    (
        "one is kept",
        "training/handlers/checkpointing.py",
        "outdated_checkpoints(newest, self.keep, ",
        "outdated_checkpoints(newest, 1, ",
        "test_train.py::test_a_run_folder_holds_what_is_promised",
    ),
    (
        "files that cannot be read count as kept",
        "runs/checkpoint.py",
        " if path not in unreadable]",
        "]",
        "test_resuming.py::test_only_what_is_older",
    ),
    (
        "newer files count as kept",
        "runs/checkpoint.py",
        "newest_first[newest_first.index(newest) + keep :]",
        "newest_first[keep:]",
        "test_resuming.py::test_only_what_is_older",
    ),
    (
        "the end of an epoch that a stop cut off is lost",
        "training/handlers/session.py",
        "        handled = last_handled_epoch(state) >= epoch\n",
        "        handled = True\n",
        "test_resuming.py::test_the_end_of_an_epoch",
    ),
    (
        "an evaluation that a stop cut off in an older file is lost",
        "training/handlers/session.py",
        "return not handled or (self.evaluation.due(epoch, max_epochs) and not evaluated)",
        "return not handled",
        "test_resuming.py::test_a_checkpoint_of_before",
    ),
    (
        "fp16 begins with a momentum of whatever lay there",
        "training/engines.py",
        "        _initialise_momentum(optimizer)\n",
        "        pass\n",
        "test_engines.py::test_a_first_update_that_fp16_skips",
    ),
    (
        "a log that cannot be written ends the run",
        "runtime/console.py",
        "        with contextlib.suppress(OSError):\n            written = ",
        "        with contextlib.suppress():\n            written = ",
        "test_console.py::test_a_run_outlives",
    ),
    (
        "a signal handler that cannot write ends the run",
        "runtime/console.py",
        "    with contextlib.suppress(OSError):\n        os.write(2",
        "    with contextlib.suppress():\n        os.write(2",
        "test_console.py::test_a_signal_without_a_console",
    ),
    (
        "a file gets the number of standard error",
        "runtime/console.py",
        "            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)\n",
        "            pass\n",
        "test_console.py::test_a_closed_console",
    ),
    (
        "the end of a rank's parent is a stop like any other",
        "distributed/stopping.py",
        "            stop.request_stop(StopReason.ORPHANED)\n",
        "            pass\n",
        "test_ranks.py::test_a_parent_that_ends_slowly",
    ),
    (
        "a full disk is no error of a result",
        "runtime/console.py",
        "            if error.errno == errno.EPIPE:\n",
        "            if error.errno:\n",
        "test_console.py::test_a_result_that_cannot_be_printed",
    ),
    *(
        (
            f"{part} not restored",
            "training/handlers/checkpointing.py",
            "            if part is not None:\n",
            f'            if part is not None and name != "{part}":\n',
            GOES_ON if part == "scaler" else KILLED,
        )
        # Not lr_scheduler: it asks the engine for the iteration, and would be right without its state.
        for part in ("model", "ema", "optimizer", "scaler")
    ),
    (
        "the schedule begins anew",
        "optim/schedules.py",
        "self.event_index = engine.state.iteration - 1",
        "self.event_index = self.calls = getattr(self, 'calls', -1) + 1",
        KILLED,
    ),
    *(
        (
            f"{handler} not restored",
            "training/handlers/checkpointing.py",
            "            handler.load_state_dict(",
            f'            name == "{handler}" or handler.load_state_dict(',
            caught,
        )
        for handler, caught in (("evaluation", KILLED), ("best", GOES_ON), ("log_point", KILLED))
    ),
    (
        "generators not restored",
        "training/handlers/checkpointing.py",
        '            torch.set_rng_state(own["cpu"])\n',
        "            pass\n",
        GOES_ON,
    ),
    (
        "the ranks' own statistics not restored",
        "training/handlers/checkpointing.py",
        'state["statistics"][self.ranks.rank].items()',
        "{}.items()",
        "test_ranks.py::test_two_ranks_killed_and_resumed",
    ),
    (
        "a signal saves nothing",
        "training/handlers/checkpointing.py",
        "        if stopping or (",
        "        if (",
        "test_faults.py::test_more_signals",
    ),
    (
        "a second signal interrupts",
        "distributed/stopping.py",
        "        if signal_received:\n            return\n",
        "        if signal_received:\n            raise KeyboardInterrupt\n",
        "test_faults.py::test_more_signals",
    ),
    (
        "the data begins anew",
        "train.py",
        "        loaders.train.start_iteration = attached.resume(config.train.epochs)",
        "        attached.resume(config.train.epochs)",
        KILLED,
    ),
    (
        "the slow weights begin anew",
        "training/handlers/attach.py",
        '        state.handlers["lookahead"] = lookahead\n',
        "",
        "test_averaging.py::test_a_run_killed",
    ),
    (
        "the statistics of an average go on from the last ones",
        "training/handlers/averaging.py",
        "            norm.reset_running_stats()\n",
        "",
        "test_averaging.py::test_statistics_do_not_depend",
    ),
    (
        "a bad number is saved",
        "training/handlers/log_point.py",
        "if logs or sync_due or self.save_due(iteration):",
        "if logs or sync_due:",
        "test_train.py::test_a_number_that_is_not_finite",
    ),
    (
        "a bad number that is no loss or gradient is saved",
        "training/handlers/checkpointing.py",
        "        self._check_finite(parts)\n",
        "",
        "test_resuming.py::test_a_state_that_is_not_finite",
    ),
    (
        "the best weights go before a resume point knows the new ones",
        "training/handlers/attach.py",
        "    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver.at_epoch_end)\n"
        "    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver.save_best)\n",
        "    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver.save_best)\n"
        "    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver.at_epoch_end)\n",
        "test_resuming.py::test_the_best_weights_are_those",
    ),
    (
        "the best weights of a run that died before they were kept are lost",
        "training/handlers/session.py",
        "        self.saver.restore_best()\n",
        "",
        DIES,
    ),
    (
        "a signal while a checkpoint is read makes it damaged",
        "runtime/signals.py",
        "    raise KeyboardInterrupt(",
        "    raise PreemptedError(",
        "test_resuming.py::test_a_signal_while_a_checkpoint_is_read",
    ),
    (
        "points are doubled in TensorBoard",
        "training/handlers/tensorboard.py",
        ", purge_step=purge_from",
        "",
        "test_train.py::test_a_run_killed_three_times",
    ),
    (
        "a clock set back mixes TensorBoard's files",
        "training/handlers/tensorboard.py",
        "        _rename_older_event_files(int(time.time()), folder.path)\n",
        "",
        "test_faults.py::test_a_clock_set_back",
    ),
    (
        "points are lost in TensorBoard",
        "training/handlers/attach.py",
        "    saver.before = board.flush\n",
        "",
        "test_faults.py::test_what_tensorboard_was_told",
    ),
    (
        "a best that could not be saved is the best",
        "training/handlers/checkpointing.py",
        "            self.best.withdraw()\n",
        "            pass\n",
        "test_faults.py::test_a_full_disk_at_what",
    ),
]


def run(root: Path, test: str) -> subprocess.CompletedProcess[str]:
    """A test of a copy of the repository."""
    file, _, name = test.partition("::")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"tests/{file}", "-k", name]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    for name in ("resnext_ignite", "tests", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", root)
    return root


def test_unbroken_the_tests_pass(copy: Path) -> None:
    tests = sorted({mutant[4] for mutant in MUTANTS})
    for test in tests:
        done = run(copy, test)
        assert done.returncode == 0, done.stdout
    where = [sys.executable, "-c", "import resnext_ignite; print(resnext_ignite.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    found = subprocess.run(where, cwd=copy, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(copy))


@pytest.mark.parametrize(("name", "file", "line", "broken", "test"), MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_broken_line_is_noticed(copy: Path, name: str, file: str, line: str, broken: str, test: str) -> None:
    path = copy / "resnext_ignite" / file
    text = path.read_text()
    assert text.count(line) == 1, f"{file} holds it {text.count(line)} times: {line}"
    path.write_text(text.replace(line, broken))
    try:
        done = run(copy, test)
    finally:
        path.write_text(text)
    assert done.returncode == 1, done.stdout
    # By a test that fails, not one that cannot be collected.
    assert "FAILED" in done.stdout
    assert "SyntaxError" not in done.stdout
    assert "NameError" not in done.stdout
