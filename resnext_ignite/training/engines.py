"""Builds the two engines, the trainer and the evaluator; `metrics.py` has their metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ignite.engine import Engine, EventEnum, Events
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_ignite.config.schema import Config
from resnext_ignite.data.augment.mixing import neighbours
from resnext_ignite.data.images import UNREADABLE
from resnext_ignite.data.loaders import Batch
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.models.inference import Inference
from resnext_ignite.runtime.devices import DTYPES
from resnext_ignite.training.metrics import ClassificationCounts, FlipCounts, TrainingSums


class RunEvents(EventEnum):
    """Events that a training run adds to Ignite's events; they are fired on the trainer."""

    METRICS_READY = "metrics_ready"
    """Fired at each log point: `state.metrics` holds the training metrics since the previous log point."""
    PROGRESS = "progress"
    """Fired at each log point and about every five seconds; `state.metrics` is up to date."""
    EVALUATED = "evaluated"
    """Fired after an evaluation: `state.evaluation` holds its result, and `state.record` its record."""


def create_trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    precision: str = "fp32",
    accumulate: int = 1,
    label_smoothing: float = 0.0,
    clip_grad_norm: float = 0.0,
    skip_unreadable: bool = False,
) -> Engine:
    """Return an engine that updates the model once per iteration; run it over `Batch`es.

    `engine.state` holds `sums` (TrainingSums) and `scaler` (torch.amp.GradScaler, enabled for fp16 only).

    Args:
        model: on `device`; may be wrapped in DistributedDataParallel.
        precision: "fp32", "bf16" or "fp16".
        accumulate: number of micro-batches per iteration; it must divide the size of each batch.
        label_smoothing: probability that is spread over all classes.
        clip_grad_norm: maximum norm of the whole gradient; 0: no clipping.
        skip_unreadable: exclude images with the label UNREADABLE from the loss and the metrics.

    Raises:
        ValueError: during a run, if `accumulate` does not divide the size of a batch.
    """
    sums = TrainingSums(device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if scaler.is_enabled():
        _initialise_momentum(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train_iteration(engine: Engine, batch: Batch) -> None:
        count = len(batch.labels)
        if count % accumulate:
            raise ValueError(f"a batch of {count} images does not divide into {accumulate} micro-batches")
        finite = torch.ones((), dtype=torch.bool, device=device)
        for turn, (images, target) in enumerate(_micro_batches(batch, accumulate), start=1):
            labels = target.labels
            with _synchronised(model, turn == accumulate):
                with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                    logits = model(images).float()
                loss = target.loss(logits, label_smoothing)
                readable = (labels != UNREADABLE).sum() if skip_unreadable else torch.full_like(loss, len(labels))
                # Divide by the number of all images, readable or not. The number of readable images differs between
                # ranks; if it were the divisor, the mean gradient over ranks would depend on the number of ranks.
                scaler.scale(loss / len(labels) / accumulate).backward()
            with torch.no_grad():
                sums.add(loss.detach(), (logits.argmax(1) == labels).sum(), readable, len(labels) - readable)
                finite &= loss.isfinite()
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if clip_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm, foreach=True)
        if scaler.is_enabled():
            # If the gradient is not finite, the scaler skips the update and lowers the scale.
            sums.count_skip(norm.isfinite(), engine.state.iteration)
        else:
            finite &= norm.isfinite()
        sums.check(finite, engine.state.iteration)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    trainer = Engine(train_iteration)
    # Call train() only once per epoch: it visits all modules, and only an evaluation between epochs changes the mode.
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: model.train())
    # Loggers and event filters read these counters.
    counters = {
        RunEvents.METRICS_READY: "log_points",
        RunEvents.PROGRESS: "progress_points",
        RunEvents.EVALUATED: "evaluations",
    }
    trainer.register_events(*counters, event_to_attr=counters)
    trainer.state.sums = sums
    trainer.state.scaler = scaler
    return trainer


def _initialise_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set the momentum of fused SGD to zero before its first update; this does not change the result of the update.

    At its first update, fused SGD allocates the momentum buffer without writing to it. If the scaler skips that update,
    the buffer stays uninitialised, and the next update uses it as the momentum (torch 2.11, `_fused_sgd`).
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


@dataclass(frozen=True)
class _Target:
    """The targets of a micro-batch. `others` and `lambdas` are None if the images are not mixed.

    Args:
        labels: int64 (n,).
        others: int64 (n,), for each image the label of the neighbour that is mixed into it.
        lambdas: float32 (n,), the fraction of each mixed image that comes from the image itself.
    """

    labels: Tensor
    others: Tensor | None = None
    lambdas: Tensor | None = None

    def loss(self, logits: Tensor, label_smoothing: float) -> Tensor:
        """Return the summed cross-entropy of logits float32 (n, C)."""
        if self.others is None or self.lambdas is None:
            return F.cross_entropy(logits, self.labels, label_smoothing=label_smoothing, reduction="sum")
        own, other = (
            F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
            for labels in (self.labels, self.others)
        )
        return torch.lerp(other, own, self.lambdas).sum()


def _micro_batches(batch: Batch, count: int) -> Iterator[tuple[Tensor, _Target]]:
    if batch.lambdas is None:
        targets = [_Target(labels) for labels in batch.labels.chunk(count)]
    else:
        parts = (part.chunk(count) for part in (batch.labels, neighbours(batch.labels), batch.lambdas))
        targets = [_Target(*target) for target in zip(*parts, strict=True)]
    yield from zip(batch.images.chunk(count), targets, strict=True)


@contextlib.contextmanager
def _synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    # Only the last micro-batch of an iteration reduces the gradients over ranks.
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def create_evaluator(
    model: nn.Module,
    device: torch.device,
    *,
    num_classes: int,
    precision: str = "fp32",
    inference: str = "plain",
    ranks: Ranks | None = None,
    keep_mistakes: int = 0,
    flip_tta: bool = False,
) -> Engine:
    """Return an engine that counts a model's errors over `Batch`es; see ClassificationCounts for `state.metrics`.

    Args:
        model: on `device`, without DistributedDataParallel: the forward pass of an evaluation must not wait for other
            ranks.
        num_classes: number of outputs of the model.
        precision: "fp32", "bf16" or "fp16".
        inference: "plain", "folded" or "compiled"; see Inference.
        keep_mistakes: number of worst mistakes to list.
        flip_tta: also count the errors with mirror images (FlipCounts), which takes a second forward pass.
    """
    network = Inference(model, DTYPES[precision], inference)

    def evaluate_batch(engine: Engine, batch: Batch) -> tuple[Tensor, Batch]:
        # `network` returns float32 logits: with bf16 logits, the mean loss would differ in its third digit.
        return network(batch.images), batch

    evaluator = Engine(evaluate_batch)
    evaluator.add_event_handler(Events.STARTED, lambda engine: network.refresh())
    ClassificationCounts(num_classes, ranks or Ranks(), device, keep_mistakes).attach(evaluator, "evaluation")
    if flip_tta:
        FlipCounts(num_classes, ranks or Ranks(), device, network).attach(evaluator, "flip_tta")
    return evaluator


def blank_images(config: Config, device: torch.device, ranks: Ranks) -> Tensor:
    """Return images of zeros, float32 (n, 3, H, W), for the backward passes that warm up DDP.

    To save time, n is the size of one ghost batch or, without ghost batches, at most 2. With `train.compile`, n is the
    size of a rank's whole micro-batch, because torch compiles the network for each n separately.
    """
    train, size = config.train, config.data.image_size
    assert size is not None
    share = train.batch_size // train.accumulate // ranks.world_size
    return torch.zeros(share if train.compile else train.ghost_batch or min(share, 2), 3, size, size, device=device)


def build_trainer(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Engine:
    """Return the trainer for a config. `train.precision` must be resolved (not `auto`)."""
    return create_trainer(
        model,
        optimizer,
        device,
        precision=config.train.precision,
        accumulate=config.train.accumulate,
        label_smoothing=config.train.label_smoothing,
        clip_grad_norm=config.train.clip_grad_norm,
        skip_unreadable=config.data.on_error == "skip",
    )


def build_evaluator(config: Config, model: nn.Module, device: torch.device, ranks: Ranks) -> Engine:
    """Return the evaluator for a config. The number of classes, precision and inference must be resolved."""
    if config.model.num_classes is None:
        raise ValueError("model.num_classes is not resolved yet: resolve it from the data first")
    return create_evaluator(
        model,
        device,
        num_classes=config.model.num_classes,
        precision=config.train.precision,
        inference=config.evaluation.inference,
        ranks=ranks,
        keep_mistakes=config.logging.mistakes,
        flip_tta=config.evaluation.flip_tta,
    )
