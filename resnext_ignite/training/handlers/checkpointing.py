"""Saves and restores the state of a run: collects the state, decides when to save it, and deletes older checkpoints.

`runs/checkpoint.py` reads and writes the checkpoint files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from ignite.engine import Engine
from torch import nn

from resnext_ignite.distributed.ddp import averaged_statistics, own_statistics
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.distributed.stopping import StopAgreement, StopReason
from resnext_ignite.runs.checkpoint import (
    checksum_path,
    iteration_checkpoint_path,
    load_checkpoint,
    outdated_checkpoints,
    save_checkpoint,
)
from resnext_ignite.runtime.errors import CheckpointError, NonFiniteError
from resnext_ignite.runtime.storage import warn_on_failure
from resnext_ignite.training.handlers.evaluation import BestRecord

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """Anything whose state can be saved and restored."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class RunState:
    """The complete state of a run: collects it for a checkpoint and restores it.

    Args:
        metadata: plain values that every checkpoint contains (config, classes, normalisation, ...).
        parts: model, ema, optimizer, lr_scheduler and scaler, by the names under which they are saved; None for a part
            that the run does not have.
        handlers: handlers with a state, by name.
        errors: returns the records (error rates, loss, ...) of the last and the best evaluation.
    """

    def __init__(
        self,
        trainer: Engine,
        ranks: Ranks,
        metadata: dict[str, Any],
        parts: dict[str, Stateful | None],
        handlers: dict[str, Stateful],
        errors: Callable[[], dict[str, Any]],
    ) -> None:
        self.trainer, self.ranks, self.metadata, self.parts = trainer, ranks, metadata, parts
        self.handlers, self.errors = handlers, errors

    def collect(self) -> dict[str, Any]:
        """Return the state as plain values and tensors; the run does not change. Call this method on all ranks.

        Raises:
            NonFiniteError: a tensor of the state is not finite. This can happen even if all gradients are finite.
        """
        parts: dict[str, Any] = {name: None if part is None else part.state_dict() for name, part in self.parts.items()}
        own: dict[str, dict[str, torch.Tensor]] = {}
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                # The model in the checkpoint gets the mean of the BatchNorm statistics over ranks. The run itself, also
                # after a resume, continues with separate statistics on each rank.
                parts[name] |= averaged_statistics(part, self.ranks)
                own[name] = {key: buffer.cpu() for key, buffer in own_statistics(part, self.ranks).items()}
        self._check_finite(parts)
        return {
            **self.metadata,
            "trainer": {"iteration": self.trainer.state.iteration, "epoch_length": self.trainer.state.epoch_length},
            **parts,
            "handlers": {name: handler.state_dict() for name, handler in self.handlers.items()},
            "errors": self.errors(),
            # Training does not use torch's random generators, but a model with dropout would.
            "generators": self.ranks.gather_on_rank_zero(_generator_states()),
            "statistics": self.ranks.gather_on_rank_zero(own),
        }

    def _check_finite(self, parts: dict[str, Any]) -> None:
        # All ranks reach the same result: their weights are equal, and `parts` holds the mean statistics over ranks.
        bad = _not_finite(parts)
        if bad is not None:
            raise NonFiniteError(
                f"iteration {self.trainer.state.iteration}: {bad} is not finite after this update; lower "
                "optimizer.lr, lengthen schedule.warmup_epochs or set train.clip_grad_norm"
            )

    def restore(self, state: dict[str, Any], max_epochs: int) -> None:
        """Restore a saved state.

        If the number of ranks has changed, all ranks start from the mean of the BatchNorm statistics, and the states of
        the random generators are not restored.
        """
        for name, part in self.parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        handlers = {**state["handlers"], "epoch_ends": {"last": last_handled_epoch(state)}}
        for name, handler in self.handlers.items():
            handler.load_state_dict(handlers[name])
        self.trainer.load_state_dict({**state["trainer"], "max_epochs": max_epochs})
        if len(state["generators"]) == self.ranks.world_size:
            for name, statistics in state["statistics"][self.ranks.rank].items():
                cast(nn.Module, self.parts[name]).load_state_dict(statistics, strict=False)
            own = state["generators"][self.ranks.rank]
            torch.set_rng_state(own["cpu"])
            if "cuda" in own and torch.cuda.is_available():
                torch.cuda.set_rng_state(own["cuda"])


def _not_finite(parts: Any) -> str | None:
    """Wait for the device; return the dotted name of a tensor with an infinity or a NaN, or None if there is none."""
    tensors = dict(_floats(parts, ""))
    if not tensors:
        return None
    # The infinity norm is the largest magnitude, or NaN if the tensor has a NaN.
    largest = torch.stack([norm.cpu().double() for norm in torch._foreach_norm(list(tensors.values()), torch.inf)])
    return next((name for name, ok in zip(tensors, largest.isfinite().tolist(), strict=True) if not ok), None)


def _floats(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _floats(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _floats(inner, name)


def _generator_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def last_handled_epoch(state: dict[str, Any]) -> int:
    """Return the last epoch whose EPOCH_COMPLETED handlers had all run before this state was saved.

    Checkpoints of older versions do not record this epoch. For these, return the last epoch whose iterations are all
    done.
    """
    noted: dict[str, int] | None = state["handlers"].get("epoch_ends")
    trainer = state["trainer"]
    return noted["last"] if noted else trainer["iteration"] // trainer["epoch_length"]


class SaveCheckpoints:
    """Writes the checkpoints of a run and keeps the newest ones.

    Attach `at_iteration` to ITERATION_COMPLETED and `at_epoch_end` to EPOCH_COMPLETED, after all handlers whose state
    is saved. Ignite's Checkpoint is not used: it removes the old file before it writes the new one, and does not sync.
    This class deletes an older file only after the new one is written, synced and verified.

    Args:
        folder: folder of the checkpoint files.
        every_epochs, every_iterations, keep: see the config keys `checkpoint.*`.
        unreadable: checkpoints that could not be read when the run was resumed; they are not deleted, and do not count
            towards `keep`.
        stop: its `reason` tells whether and why the run stops. If a signal or the time limit stops the run, the state
            is saved at the iteration on which the ranks agree. If the result of an evaluation stops the run, the state
            is saved after this evaluation.
        best: holds the best record. After each new best evaluation, the state is saved, and also written to `best.pt`.
        before: called before every save, to flush the logs.
    """

    def __init__(
        self,
        state: RunState,
        folder: Path,
        stop: StopAgreement,
        best: BestRecord,
        *,
        every_epochs: int,
        every_iterations: int,
        keep: int,
        unreadable: frozenset[Path] = frozenset(),
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.state, self.folder, self.stop, self.best = state, folder, stop, best
        self.every_epochs, self.every_iterations, self.keep = every_epochs, every_iterations, keep
        self.unreadable, self.before = unreadable, before

    def due_inside_epoch(self, iteration: int) -> bool:
        """Return whether a save is due after this iteration, if it is not the last one of its epoch."""
        return bool(self.every_iterations) and iteration % self.every_iterations == 0

    def at_iteration(self, engine: Engine) -> None:
        """Save after an iteration if the run stops here, or if a save inside an epoch is due.

        If the run does not stop, `at_epoch_end` saves the state at the end of an epoch, after the evaluation.
        """
        iteration, length = engine.state.iteration, engine.state.epoch_length or 1
        stopping = self.stop.reason >= StopReason.TIME_LIMIT
        if iteration == length * (engine.state.max_epochs or 0):
            # The end of the run: only the evaluation remains, and the final save follows it.
            return
        if stopping or (self.due_inside_epoch(iteration) and iteration % length):
            self._save(engine)

    def at_epoch_end(self, engine: Engine) -> None:
        """Save the state at the end of an epoch if this is due, the run stops, or the evaluation is the best so far.

        This handler runs after the evaluation, also if a signal has interrupted the evaluation.
        """
        epoch = engine.state.epoch
        due = epoch % self.every_epochs == 0 or epoch == engine.state.max_epochs
        if due or self.stop.reason or self._is_best():
            self._save(engine)

    def save_best(self, engine: Engine) -> None:
        """Write `best.pt` if the evaluation at this iteration is the best so far.

        Attach this method after `at_epoch_end`: a checkpoint must record this evaluation as the best one before the old
        `best.pt` is replaced. In the other order, a crash between the two writes would leave a checkpoint whose best
        evaluation is the older one, and no file with the weights of that evaluation. A failed write only causes a
        warning.
        """
        if not self._is_best():
            return
        saved = False
        with warn_on_failure("best.pt"):
            self.save_as("best.pt")
            saved = True
        if not self.state.ranks.from_rank_zero(lambda: saved):
            self.best.withdraw()

    def restore_best(self) -> None:
        """Write `best.pt` if the restored state is that of the best evaluation, and `best.pt` does not hold it.

        This happens if the run died after it saved the checkpoint of this evaluation, but before it wrote `best.pt`.
        """

        def is_there() -> bool:
            try:
                self._read_best()
            except CheckpointError:
                return False
            return True

        if self._is_best() and not self.state.ranks.from_rank_zero(is_there):
            self.save_best(self.state.trainer)

    def _is_best(self) -> bool:
        return self.best.best is not None and self.best.best["iteration"] == self.state.trainer.state.iteration

    def _read_best(self) -> dict[str, Any]:
        path = self.folder / "best.pt"
        content = load_checkpoint(path)
        if self.best.best is None or content["trainer"]["iteration"] != self.best.best["iteration"]:
            raise CheckpointError(f"{path} does not hold the weights of the best evaluation")
        return content

    def best_weights(self) -> dict[str, torch.Tensor] | None:
        """Return the best weights on all ranks; warn and return None if `best.pt` does not hold them."""

        def read() -> dict[str, torch.Tensor] | None:
            try:
                content = self._read_best()
            except CheckpointError as error:
                log.warning(f"{error}; the test split is evaluated with the last weights")
                return None
            weights: dict[str, torch.Tensor] = content["ema"] or content["model"]
            return weights

        return self.state.ranks.from_rank_zero(read)

    def _save(self, engine: Engine) -> None:
        content = self.state.collect()
        if self.state.ranks.rank != 0:
            return
        self.before()
        newest = iteration_checkpoint_path(self.folder, engine.state.iteration)
        save_checkpoint(newest, content)
        self.unreadable -= {newest}
        for old in outdated_checkpoints(newest, self.keep, self.unreadable):
            old.unlink()
            checksum_path(old).unlink(missing_ok=True)

    def save_as(self, name: str) -> None:
        """Write the state under a fixed name (`best.pt`, `final.pt`)."""
        content = self.state.collect()
        if self.state.ranks.rank == 0:
            self.before()
            save_checkpoint(self.folder / name, content)
