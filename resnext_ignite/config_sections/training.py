"""How it is trained, evaluated, saved and written down."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from resnext_ignite.config_sections.base import Fraction, GroupedConvWay, Section


class OptimizerConfig(Section):
    """The update."""

    name: Literal["sgd", "muon"] = "sgd"
    """Stochastic gradient descent with momentum; muon: and for all convolutions but the stem steps that are
    orthogonalised, a group at a time."""
    lr: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Learning rate at factor 1 of the schedule, for the whole `train.batch_size`."""
    backbone_lr_factor: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Learning rate of all but the classifier, over `optimizer.lr`: below 1 to keep more of what was learned before."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 5e-4
    """L2 penalty added to the gradient."""
    decay_norm_and_bias: bool = True
    """Decay BatchNorm weights and all biases too, as published; false: convolutions and classifier weights only."""
    muon_lr: Annotated[float, Field(gt=0, le=100)] = 0.05
    """`muon`: learning rate of its convolutions, at factor 1 of the schedule."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """`muon`: momentum of its convolutions; 0.6 for runs of a few epochs, up to 0.95 for long ones."""
    muon_weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """`muon`: share of its convolutions' weights, times their learning rate, by which an update shrinks them; they have
    no `weight_decay`."""


class ScheduleConfig(Section):
    """The learning rate over the run, set anew each iteration."""

    name: Literal["multistep", "cosine", "triangular", "constant"] = "multistep"
    """Shape of the learning rate after the warm-up."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """`multistep`: epochs after which the rate is multiplied by `gamma`, ascending."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """`multistep`: factor at each milestone."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs over which the rate rises linearly from 0 (`triangular`: to its peak)."""
    final_factor: Fraction = 0.0
    """`cosine`, `triangular`: the rate after the last iteration, over `optimizer.lr`."""

    @model_validator(mode="after")
    def _check_milestones(self) -> ScheduleConfig:
        if any(later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"schedule.milestones: {list(self.milestones)} must ascend")
        return self


class TrainConfig(Section):
    """The training loop."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Images an update, over all ranks and micro-batches; an epoch's incomplete last batch is dropped."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches an update."""
    freeze: Literal["none", "stem", "backbone"] = "none"
    """What keeps the weights and BatchNorm statistics of `model.pretrained`: the stem, or all but the classifier."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass (autocast); auto: bf16 where the machine computes in it, else fp32."""
    channels_last: bool = True
    """Keep images as NHWC in memory, which convolutions prefer."""
    compile: Literal[False, True, "cuda_graphs"] = False
    """Compile the model with torch.compile; cuda_graphs: and play its kernels back as CUDA graphs (GPUs only)."""
    grouped_conv: tuple[GroupedConvWay, ...] = ("grouped",)
    """How each shape of the grouped 3x3 is computed, in the network's order: `grouped`, `split` (a dense convolution a
    group) or `merged<m>` (m groups in one, filled with zeros); one for all of them, or one for each. auto: the fastest,
    measured at the first start."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability spread over all classes in the training loss."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the whole gradient; 0: not clipped."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay an iteration of a moving average of weights and statistics, which is then what is evaluated; 0: none."""
    ema_horizon: Annotated[float, Field(gt=0)] | None = None
    """Epochs that such an average remembers, 1 / (1 - decay) iterations, in place of `ema_decay`; null: none."""
    ema_start: Annotated[float, Field(ge=0)] = 0.0
    """Epochs after which the average begins; until then it is the weights themselves."""
    ema_reestimate_bn: Annotated[int, Field(ge=0)] = 0
    """Training batches (the epoch's first, at most all) from which the average's BatchNorm statistics are taken anew
    before each evaluation; 0: they are averaged as the weights are."""
    lookahead: Annotated[int, Field(ge=0)] = 0
    """Iterations between two steps of Lookahead's slow weights, from which the others then go on, and on which the last
    epoch ends; 0: none."""
    lookahead_alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the way to the weights of the moment that such a step goes."""
    sync_bn: bool = False
    """BatchNorm over all ranks' images (GPUs only)."""
    ghost_batch: Annotated[int, Field(ge=0)] = 0
    """BatchNorm statistics over groups of so many images (the paper's 8 GPUs saw 16 each); 0: a rank's micro-batch."""
    deterministic: bool | None = None
    """Bit-identical repeats, at some speed on a GPU; null: true on a CPU, false on a GPU."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop, saved and resumable, after so many hours of this process; null: never."""

    @field_validator("compile", mode="before")
    @classmethod
    def _no_number(cls, value: object) -> object:
        # Which equals a boolean.
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValueError(f"{value}: false, true or cuda_graphs")
        return value

    @field_validator("grouped_conv", mode="before")
    @classmethod
    def _one_way(cls, ways: object) -> object:
        return (ways,) if isinstance(ways, str) else ways

    @model_validator(mode="after")
    def _check_average(self) -> TrainConfig:
        if self.ema_decay and self.ema_horizon:
            raise ValueError("train.ema_horizon: and train.ema_decay say the same in two ways; set ema_decay to 0")
        if not self.averages and (self.ema_start or self.ema_reestimate_bn):
            key = "ema_start" if self.ema_start else "ema_reestimate_bn"
            raise ValueError(f"train.{key}: there is no average; set train.ema_horizon or train.ema_decay")
        if self.ema_start and self.ema_start >= self.epochs:
            raise ValueError(f"train.ema_start: {self.ema_start:g}; less than the {self.epochs} of train.epochs")
        return self

    @property
    def averages(self) -> bool:
        """Whether a moving average of the weights is kept, which is then what is evaluated."""
        return bool(self.ema_decay or self.ema_horizon)


class EvaluationConfig(Section):
    """When to evaluate, and when that ends the run."""

    every: Annotated[int, Field(ge=1)] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    early: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Epochs that are evaluated whatever `every` says; 0: before the first iteration."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Images a rank evaluates at once."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width in pixels at which the network is evaluated, and predicts afterwards; null:
    `data.image_size`."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many evaluations without a lower error; 0: never."""
    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Percentage points by which an error must fall to count as lower."""
    inference: Literal["plain", "folded", "compiled", "auto"] = "plain"
    """How logits are computed: as the network is; with BatchNorm folded into the convolutions; folded and compiled;
    auto: the fastest of them, measured at the start. The faster ones agree to rounding."""
    target_error: Annotated[float, Field(ge=0, le=100)] | None = None
    """Stop once the error, in percent, is at most this; null: never."""
    abandon: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0, le=100)]], ...] = ()
    """Stop after these epochs, which are evaluated whatever `every` says, where the error, in percent, is above theirs:
    `{5: 60, 20: 15}`, which is kept as pairs."""
    flip_tta: bool = False
    """Count the errors of the mean probabilities of each picture and its mirror image too, apart from the others."""

    @field_validator("abandon", mode="before")
    @classmethod
    def _as_pairs(cls, limits: object) -> object:
        if not isinstance(limits, dict):
            return limits
        # A config's keys are texts.
        named = ((str(epoch), error) for epoch, error in limits.items())
        return tuple((int(epoch) if re.fullmatch("[0-9]{1,9}", epoch) else epoch, error) for epoch, error in named)

    @field_validator("abandon")
    @classmethod
    def _ascending(cls, limits: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        epochs = [epoch for epoch, _ in limits]
        if any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
            raise ValueError(f"the epochs {epochs} must ascend, each once")
        return limits


class CheckpointConfig(Section):
    """When to save the state of the run."""

    every_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs between saves; the last epoch is always saved."""
    every_iterations: Annotated[int, Field(ge=0)] = 0
    """Iterations between saves inside an epoch; 0: none."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept."""


class DistributedConfig(Section):
    """Several ranks."""

    timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    """Seconds; a rank that lets the others wait so long has failed, and the run ends with exit code 8."""
    compress_gradients: bool = False
    """Let gradients travel between ranks, and be summed, as bf16: half the bytes, 8 bits of each number."""


class LoggingConfig(Section):
    """What is written down."""

    every_iterations: Annotated[int, Field(ge=1)] = 50
    """Iterations between log points (about five seconds at most)."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    images: Annotated[int, Field(ge=0, le=256)] = 64
    """Pictures on a TensorBoard sheet (augmented training images, worst mistakes); 0: no sheets."""
    histograms: bool = False
    """Histograms of all weights at each evaluation."""
