"""Measures the speed of several ranks on this machine, and the cost of their communication."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from resnext_ignite.benchmark.setup import prepare
from resnext_ignite.data.loaders import Batch
from resnext_ignite.distributed.ddp import wrap_for_ranks
from resnext_ignite.distributed.launch import launch
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.optim import build_optimizer
from resnext_ignite.runtime.timing import in_turns, medians


def measure_ranks(contests: dict[Path, int], rounds: int = 5, iterations: int = 2) -> dict[str, Any]:
    """Measure the images/s of 1 rank on all N cores, and of N ranks (one per core), at the same global batch size.

    On a machine with N GPUs, measure 1 rank on one GPU, and N ranks with one GPU each. If N is 1, measure nothing.
    `communication_share` is the fraction of an iteration's time that the reduction of gradients takes.

    Args:
        contests: a dict with the models to measure: config file -> global batch size.
        iterations: iterations per measurement.
    """
    world_size = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    samples: dict[str, list[float]] = {}
    models, ratios = {}, {}
    if world_size == 1:
        contests = {}
    for path, batch_size in contests.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "samples.json"
            launch(_measure_on_ranks, path, batch_size, rounds, iterations, file, nproc_per_node=world_size)
            told = json.loads(file.read_text())
        name, turns = told["model"], told["samples"]
        seconds = medians(turns)
        samples |= {
            f"{name}, {contender}": [batch_size * iterations / value for value in values]
            for contender, values in turns.items()
        }
        models[name] = {"batch_size": batch_size, "ranks": world_size, **told["found"]}
        one, several, unreduced, compressed = seconds.values()
        ratios[f"ranks_vs_one, {name}"] = one / several
        ratios[f"communication_share, {name}"] = 1 - unreduced / several
        ratios[f"compressed_vs_plain, {name}"] = several / compressed
    return {"unit": "images/s", "models": models, "samples": samples, "ratios": ratios}


def _measure_on_ranks(
    local_rank: int, config_path: Path, batch_size: int, rounds: int, iterations: int, file: Path
) -> None:
    ranks = Ranks.current()
    training, _, loader = prepare(config_path, [f"train.batch_size={batch_size}"], local_rank)
    whole = next(iter(loader))
    share = Batch(*(part.chunk(ranks.world_size)[ranks.rank] for part in (whole.images, whole.labels, whole.indices)))
    threads = torch.get_num_threads()

    def turn(model: nn.Module, batch: Batch, updates: int = iterations) -> Callable[[], float]:
        contender = replace(training, model=model, optimizer=build_optimizer(training.config, model))

        def run() -> float:
            dist.barrier()
            start = time.perf_counter()
            if updates:
                contender.update_alone(batch, updates)
            # A rank that waits in this barrier is blocked, and does not slow down the ranks that still compute.
            dist.barrier()
            return time.perf_counter() - start

        return run

    def wrapped(*, compress_gradients: bool) -> nn.Module:
        model = copy.deepcopy(training.model)
        return wrap_for_ranks(model, training.device, ranks, sync_bn=False, compress_gradients=compress_gradients)

    alone = turn(copy.deepcopy(training.model), whole, updates=iterations if ranks.rank == 0 else 0)

    def alone_on_all_cores() -> float:
        torch.set_num_threads(threads * ranks.world_size if ranks.rank == 0 else threads)
        try:
            return alone()
        finally:
            torch.set_num_threads(threads)

    several, plain = f"{ranks.world_size} ranks", turn(wrapped(compress_gradients=False), share)
    contenders = {
        "1 rank": alone_on_all_cores,
        several: plain,
        f"{several}, gradients not reduced": turn(copy.deepcopy(training.model), share),
        f"{several}, gradients as bf16": turn(wrapped(compress_gradients=True), share),
    }
    samples = in_turns(contenders, rounds, "ranks" if ranks.rank == 0 else "")
    collectives = (_collectives_in(plain) - _collectives_in(dist.barrier) * 2) // iterations
    if ranks.rank == 0:
        gradient_bytes = sum(4 * parameter.numel() for parameter in training.model.parameters())
        found = {
            "backend": dist.get_backend(),
            "gradient_bytes": gradient_bytes,
            "collectives_per_iteration": collectives,
        }
        file.write_text(json.dumps({"model": training.config.model.name, "samples": samples, "found": found}))


def _collectives_in(function: Callable[[], object]) -> int:
    def so_far() -> int:
        return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[union-attr]

    before = so_far()
    function()
    return so_far() - before
