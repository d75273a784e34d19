"""How it is trained, evaluated, saved and written down."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from resnext_ignite.config_sections.base import Fraction, GroupedConvWay, Section


class OptimizerConfig(Section):
    """The update."""

    name: Literal["sgd"] = "sgd"
    """Stochastic gradient descent with momentum."""
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
