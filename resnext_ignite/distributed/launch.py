"""Runs a function on every rank.

Either a launcher (torchrun, srun) has started the ranks, or this module spawns a process for each rank. If a spawned
rank cannot report its own failure, the parent process reports it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import ignite.distributed as idist
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from resnext_ignite.distributed.environment import (
    launched_by_srun,
    launched_by_torchrun,
    launched_on_this_machine,
    launched_world_size,
)
from resnext_ignite.distributed.failures import (
    Failure,
    FailureBoard,
    refuse_restart_of,
    report_failures,
    watch_other_ranks,
)
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.distributed.rendezvous import (
    begin_generation,
    connect_to_store,
    last_generation,
    torchrun_keeps_store,
)
from resnext_ignite.runtime.console import set_up_streams
from resnext_ignite.runtime.errors import ConfigError, PreemptedError, RankError, report_error
from resnext_ignite.runtime.signals import (
    PARENT_GONE,
    STOP_SIGNALS,
    die_with_parent,
    exit_on_signal,
    install_exit_during_start,
    signals_blocked,
    signals_unblocked,
)

# The parent of spawned ranks kills a rank that still runs this long after another rank failed.
_GRACE_S = 8.0


def launch(
    function: Callable[..., None],
    *args: Any,
    nproc_per_node: int | None = None,
    backend: str | None = None,
    timeout_s: float = 600.0,
) -> None:
    """Run `function(local_rank, *args)` in this process, or in a spawned process for each rank.

    Args:
        nproc_per_node: number of ranks; if there are several, spawn a process for each. None: spawn no processes; this
            process is one of the ranks that a launcher (torchrun, srun) started, or the only rank.
        backend: "nccl" or "gloo"; None: nccl if there are GPUs, else gloo.
        timeout_s: a rank counts as failed after the other ranks have waited for it this many seconds.

    Raises:
        ConfigError: `nproc_per_node` is set although a launcher has already started the ranks; or this machine has
            fewer GPUs than ranks, but at least one GPU.
        ResnextError: the function's own error, or RankError if another rank failed.
        SystemExit: a spawned rank failed, and its error is already printed.
    """
    launched = launched_by_torchrun() or launched_by_srun()
    if nproc_per_node is not None and launched:
        raise ConfigError(
            f"--nproc-per-node {nproc_per_node}: a launcher has started "
            f"{launched_world_size()} ranks already; remove this option"
        )
    count = nproc_per_node or launched_on_this_machine()
    if not launched and count == 1:
        function(0, *args)
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < count:
        # Refuse here, before any rank waits for the other ranks.
        raise ConfigError(
            f"{count} ranks on a machine where each sees {gpus} GPUs: start "
            "one rank per GPU, and let each rank see all GPUs "
            "(srun --gpus-per-node, not --gpus-per-task), or set train.device=cpu"
        )
    if backend is None:
        backend = "nccl" if gpus else "gloo"
    if launched:
        # Ranks must not outlive their launcher.
        die_with_parent(os.getppid(), PARENT_GONE)
        _run_as_rank(function, args, backend, timeout_s)
        return
    code = _spawn_and_wait(function, args, count, backend, timeout_s)
    if code:
        sys.exit(code)


def _run_as_rank(function: Callable[..., None], args: tuple[Any, ...], backend: str, timeout_s: float) -> None:
    if launched_by_torchrun():
        # Inside a Slurm job, Ignite would use Slurm's rank numbers instead of torchrun's (ignite#3259).
        os.environ.pop("SLURM_JOB_ID", None)
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    try:
        if torchrun_keeps_store():
            shared = connect_to_store(timeout_s)
            ended = last_generation(shared)
            if ended is not None:
                refuse_restart_of(ended, shared)
            FailureBoard.current_generation, own = begin_generation(shared, timeout_s)
            _initialize(backend, own, local_rank, timeout_s)
        else:
            idist.initialize(backend, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RankError(f"the ranks did not find one another: {reason}") from None
    ranks = Ranks.current()
    with watch_other_ranks(ranks), report_failures(ranks):
        function(idist.get_local_rank(), *args)
        # Do not call this after an error: it may wait for a rank that is gone.
        idist.finalize()


def _initialize(backend: str, store: dist.Store, local_rank: int, timeout_s: float) -> None:
    """Initialise torch.distributed and Ignite with a given store; `idist.initialize` does not accept one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    idist.sync()


def _spawn_and_wait(
    function: Callable[..., None], args: tuple[Any, ...], count: int, backend: str, timeout_s: float
) -> int:
    """Spawn the ranks and wait for all; return the exit code of the first failure, or 0."""
    # The parent holds the store, because the parent outlives every rank. Port 0 selects a free port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    arguments = (os.getpid(), environment, function, args, backend, timeout_s)
    # The ranks inherit the blocked signals: a signal that arrives before a rank has its handlers stays pending.
    with signals_blocked():
        ranks = mp.start_processes(_run_spawned_rank, arguments, nprocs=count, join=False).processes

        def forward(number: int, frame: object) -> None:
            for rank in ranks:
                if rank.is_alive():
                    os.kill(rank.pid, number)

        before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        return _wait_for_all(ranks, FailureBoard(store))
    finally:
        for number, handler in before.items():
            if handler is not exit_on_signal:
                signal.signal(number, handler)


def _wait_for_all(ranks: list[mp.Process], board: FailureBoard) -> int:
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(ranks):
        wait([rank.sentinel for number, rank in enumerate(ranks) if number not in codes], timeout=1)
        for number, rank in enumerate(ranks):
            if number in codes or rank.is_alive():
                continue
            codes[number] = _exit_code_of(number, rank.exitcode or 0, board)
            # Set no deadline after a preemption: rank 0 may still be saving after the other ranks have exited.
            if codes[number] not in (0, PreemptedError.exit_code):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() >= deadline:
            for rank in ranks:
                rank.kill()
    first = board.first()
    return first.code if first else next((code for code in codes.values() if code), 0)


def _exit_code_of(number: int, code: int, board: FailureBoard) -> int:
    """Return the exit code of a rank that has ended. If it could not report its own failure, report it here."""
    if code < 0 or code == 1:
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else "failed before it started; see its error above"
        )
        own = Failure(number, RankError.exit_code, f"rank {number} {how}; continue with --resume", reported_by=-1)
        if board.post(own) == own:
            report_error(RankError(own.text))
        return own.code
    return code


def _run_spawned_rank(
    local_rank: int,
    parent: int,
    environment: dict[str, str],
    function: Callable[..., None],
    args: tuple[Any, ...],
    backend: str,
    timeout_s: float,
) -> None:
    try:
        set_up_streams(prints_result=False)
        install_exit_during_start()
        die_with_parent(parent, PARENT_GONE)
        signals_unblocked()
        os.environ.update(environment, RANK=str(local_rank), LOCAL_RANK=str(local_rank))
        if "OMP_NUM_THREADS" not in os.environ:
            # Divide the cores among the ranks; else every rank starts a thread for each core.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(environment["LOCAL_WORLD_SIZE"])))
        _run_as_rank(function, args, backend, timeout_s)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_error(error))
