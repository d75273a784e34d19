"""Hundreds of deaths and thousands of corruptions: `pytest -m soak`. How many were tried and held is printed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_newest_is_there, digest, scalars, train_tiny
from test_faults import DIED, VALUES, Steps

from resnext_ignite.runs.checkpoint import iteration_checkpoints, load_checkpoint, newest_resume_point
from resnext_ignite.runtime.errors import CheckpointError

pytestmark = pytest.mark.soak


def say(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{line} ")


def test_a_death_at_every_step_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, log = tmp_path / "whole", tmp_path / "steps"
    assert Command(whole, *VALUES, patch=Steps(log).install).wait().code == 0
    steps = log.read_text().splitlines()
    assert len(steps) >= 200
    expected = digest(whole)
    for last in range(1, len(steps) + 1):
        folder, hooks = tmp_path / "run", Steps(tmp_path / "now", last)
        outcome = Command(folder, *VALUES, patch=hooks.install).wait()
        assert outcome.code == DIED, outcome.stderr
        assert_newest_is_there(folder, hooks.promised())
        outcome = Command(folder, *VALUES, resume=True).wait()
        assert outcome.code == 0, (steps[last - 1], outcome.stderr)
        assert digest(folder) == expected, steps[last - 1]
        assert not list(folder.rglob("*.tmp"))
        shutil.rmtree(folder)
        hooks.log.unlink()
    say(f"deaths at a step of a run: {len(steps)} tried, {len(steps)} held", capsys)


@pytest.mark.parametrize(("workers", "ranks", "count"), [(0, 1, 40), (2, 1, 20), (0, 2, 20)])
def test_kills_at_random_moments(
    tmp_path: Path, workers: int, ranks: int, count: int, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [*VALUES, "logging.tensorboard=true", "logging.images=0", f"data.workers={workers}"]
    if workers:
        pictures = ["data.name=imagefolder", f"data.root={picture_folder}", "data.image_size=24"]
        values += [*pictures, "data.train_size=null", "data.test_size=null", "augment.random_resized_crop=true"]
    whole = tmp_path / "whole"
    outcome = Command(whole, *values, ranks=ranks).wait()
    assert outcome.code == 0, outcome.stderr
    expected, points = digest(whole), scalars(whole)
    generator = random.Random(workers + 10 * ranks)
    tried, folder, killed = 0, tmp_path / "run", 0
    while killed < count:
        # Up to three a run.
        for number in range(generator.randint(1, 3)):
            command = Command(folder, *values, resume=number > 0, ranks=ranks)
            time.sleep(generator.uniform(0, outcome.seconds))
            for process in command.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            killed += command.wait().code == -signal.SIGKILL
            command.wait_until_gone()
            newest_resume_point(folder / "checkpoints")
            tried += 1
        resumed = Command(folder, *values, resume=True, ranks=ranks).wait()
        assert resumed.code == 0, resumed.stderr
        assert digest(folder) == expected
        assert scalars(folder) == points
        shutil.rmtree(folder)
    say(f"kills at random, {workers} workers, {ranks} ranks: {tried} tried, {killed} in time, all held", capsys)


def damages(generator: random.Random) -> dict[str, Callable[[bytes], bytes]]:
    """Ways to damage a file, each at random."""

    def flip(good: bytes) -> bytes:
        at = generator.randrange(len(good))
        return good[:at] + bytes([good[at] ^ 1 << generator.randrange(8)]) + good[at + 1 :]

    def zero(good: bytes) -> bytes:
        at, length = generator.randrange(len(good)), generator.choice([1, 512, 4096])
        return good[:at] + bytes(min(length, len(good) - at)) + good[at + length :]

    def swap(good: bytes) -> bytes:
        one, two = sorted(generator.sample(range(len(good) // 512), 2))
        blocks = [good[at : at + 512] for at in range(0, len(good), 512)]
        blocks[one], blocks[two] = blocks[two], blocks[one]
        return b"".join(blocks)

    return {
        "flip": flip,
        "zero": zero,
        "swap": swap,
        "cut": lambda good: good[: generator.randrange(len(good))],
        "add": lambda good: good + generator.randbytes(generator.randint(1, 4096)),
    }


def same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def test_thousands_of_corruptions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(tmp_path / "run", *VALUES) == 0
    folder = tmp_path / "run/checkpoints"
    newest, before = iteration_checkpoints(folder)[:2]
    good, content = newest.read_bytes(), load_checkpoint(newest)
    generator = random.Random(0)
    found: Counter[str] = Counter()
    silent = 0
    while (tried := found.total() + silent) < 2000:
        name, damage = list(damages(generator).items())[tried % 5]
        damaged = damage(good)
        if damaged == good:
            # Zeros over zeros, or equal blocks swapped.
            continue
        newest.write_bytes(damaged)
        point = newest_resume_point(folder)
        assert point is not None
        silent += point.path != before
        found[name] += point.path == before
    say(f"corruptions: {sum(found.values())} found {dict(found)}, {silent} silent", capsys)
    assert silent == 0
    # Without the checksum beside it, the archive's own must do: what loads is what was saved.
    newest.with_name(newest.name + ".sha256").unlink()
    refused = equal = 0
    for number in range(500):
        newest.write_bytes(list(damages(generator).values())[number % 5](good))
        try:
            state = load_checkpoint(newest)
        except CheckpointError:
            refused += 1
            continue
        silent += not same(state, content)
        equal += 1
    say(f"without the checksum file: {refused} found, {equal} load as they were saved, {silent} silent", capsys)
    assert silent == 0
