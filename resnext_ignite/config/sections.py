"""The sections of a config: every key with its type, unit and default. `schema.py` puts them together.

Only values live here; nothing imports torch, so that a wrong config is refused at once.
"""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from resnext_ignite.runtime.model_names import parse_model_name

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
GroupedConvImplementation = Annotated[str, Field(pattern=r"^(auto|grouped|split|merged[1-9][0-9]{0,3})$")]
PerChannel = tuple[float, float, float]


class Section(BaseModel):
    """A group of keys: frozen, strict (no string for a number, no boolean for an integer), nothing unknown."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The network."""

    name: str = "cifar_resnext29_8x64d"
    """`cifar_resnext<9n+2>_<C>x<W>d` or `resnext50|101|152_<C>x<W>d`: depth, cardinality C, base width W."""
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """Classes; null: as many as the data has."""
    stem_channels: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels after the stem (64 as published; smaller for small machines); all stages scale with it."""
    pretrained: str | None = None
    """Weights to start from: a checkpoint or run of this project, another system's file that `convert` reads, or
    torchvision's for this network (`torchvision:IMAGENET1K_V2`); a classifier for other classes is left as
    initialised."""
    zero_init_residual: bool = False
    """Start the last BatchNorm of each block at zero, so that every block begins as the identity."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        parse_model_name(name)
        return name

    @model_validator(mode="after")
    def _check_groups(self) -> ModelConfig:
        architecture = parse_model_name(self.name)
        if architecture.group_width(self.stem_channels) < 1:
            raise ValueError(
                f"model.stem_channels: {self.stem_channels} leaves the groups of {self.name} without a channel "
                f"(stem_channels x base width / 64 < 1): at least {-(-64 // architecture.base_width)}"
            )
        return self


class DataConfig(Section):
    """The pictures."""

    name: Literal["cifar10", "cifar100", "imagefolder", "shards", "shapes"] = "shapes"
    """`shapes` is drawn from a seed, without any file; `imagefolder` reads `root`'s `train/<class>/*` and
    `val/<class>/*` or `test/<class>/*`; `shards` reads tar files of pictures in `train/` and `val/` or `test/`, and
    what is said of an `imagefolder` goes for them."""
    root: str = "data"
    """Folder of the data (`~` is expanded); not used by `shapes`."""
    download: bool = True
    """Download CIFAR where it is missing; false: an archive that lies in `root` is still checked and unpacked."""
    val_size: Annotated[int, Field(ge=0)] = 0
    """Training images held out to choose the best weights (keyed by `seed`); 0: evaluate on the test split."""
    train_size: Annotated[int, Field(ge=1)] | None = None
    """Use only so many training images, the same ones for every seed (for `shapes`: draw so many); null: all."""
    test_size: Annotated[int, Field(ge=1)] | None = None
    """Use only so many test images; null: all."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width in pixels; null: 32, or 224 for an `imagefolder` with an ImageNet layout."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`imagefolder`: side of the central square kept in evaluation, over the shorter side (ImageNet: 0.875)."""
    in_memory: bool | None = None
    """`imagefolder`: decode once into memory; null: where all pictures have their size already and they fit."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Processes a rank that decode an `imagefolder`; null: the cores a rank has, at most 8."""
    decode: Literal["workers", "device"] = "workers"
    """`imagefolder`: who decodes training JPEGs: the workers, or the GPU (nvJPEG), for which workers only read them,
    and decode what is no plain JPEG; needs `augment.random_resized_crop`. The same crops, of pixels that differ as
    decoders do. An evaluation is always decoded by the workers, so that its figures do not depend on this."""
    on_error: Literal["fail", "skip"] = "fail"
    """`imagefolder`: end on a training picture that cannot be read (exit 3), or skip it: warned of, not counted."""
    max_skipped: Annotated[int, Field(ge=0)] = 100
    """Pictures an epoch that may be skipped; one more ends the run (exit 3)."""
    shuffle_shards: Annotated[int, Field(ge=1)] = 16
    """`shards`: shards that are read at a time in training, whose images are shuffled together; the shards come in
    another order each epoch."""
    mean: PerChannel | None = None
    """Mean of red, green and blue, 0 to 1; null: that of `model.pretrained`, else the data set's published one
    (ImageNet's for a folder)."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation of red, green and blue, on the same scale."""


def size_step(image_size: int) -> int:
    """Pixels by which the side of the training images grows, of those that grow to `image_size`."""
    return 16 if image_size >= 128 else 4


class AugmentConfig(Section):
    """What happens to a training image; all of it keyed by (seed, epoch, index)."""

    crop_padding: Annotated[int, Field(ge=0, le=64)] = 4
    """Pixels added on each side before a random crop of the image's own size; 0: no crop."""
    crop_fill: Literal["zero", "mean", "reflect"] = "zero"
    """What the padding holds: black, the data's mean colour, or the picture reflected."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror left to right: by chance each epoch, or every second epoch from a random start."""
    trivial: bool = False
    """TrivialAugment, wide: one of 14 operations of one of 31 strengths a picture (arXiv:2103.10158)."""
    cutout: Annotated[int, Field(ge=0, le=512)] = 0
    """Side in pixels of a square set to the mean colour, its centre anywhere in the image; 0: none."""
    erasing: Fraction = 0.0
    """Probability of a box of 2 to 33 % of the area, of an aspect of 0.3 to 3.3, set to the mean colour
    (arXiv:1708.04896)."""
    random_resized_crop: bool = False
    """`imagefolder`: crop 8 to 100 % of the area at an aspect of 3/4 to 4/3, resized; replaces the padded crop."""
    color: Fraction = 0.0
    """Strength of brightness, contrast and saturation jitter, in random order (fb.resnext on ImageNet: 0.4)."""
    lighting: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Standard deviation of the noise along ImageNet's colour axes (AlexNet, section 4.1; fb.resnext: 0.1)."""
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Mix each image with its neighbour in the batch by a share drawn from Beta(mixup, mixup); 0: none."""
    cutmix: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Put a box of its neighbour into each image, of a share drawn likewise; with `mixup`, each gets one of them."""
    progressive_from: Annotated[int, Field(ge=8, le=512, multiple_of=4)] | None = None
    """Side in pixels of the training images in the first epoch; it grows linearly, in steps of 4 pixels (of 16 where
    the image size is 128 or more), to `data.image_size`; evaluations have one size; null: training, too."""
    progressive_until: Fraction = 0.5
    """Share of the epochs after which training images have their full size."""

    @field_validator("mixup", "cutmix")
    @classmethod
    def _not_all_or_nothing(cls, alpha: float) -> float:
        if 0 < alpha < 1e-3:
            raise ValueError(f"{alpha}: 0 for none, or at least 0.001")
        return alpha


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
    grouped_conv: tuple[GroupedConvImplementation, ...] = ("grouped",)
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
    def _as_tuple(cls, ways: object) -> object:
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
    curves: bool = True
    """Draw `curves.png`: error, loss and learning rate over the epochs."""
    mistakes: Annotated[int, Field(ge=0, le=256)] = 64
    """Worst mistakes of an evaluation that are kept in `evaluation.json` and drawn in `mistakes.png`; 0: none."""
    images: Annotated[int, Field(ge=0, le=256)] = 64
    """Images on a TensorBoard sheet (augmented training images, worst mistakes); 0: no sheets."""
    histograms: bool = False
    """Histograms of all weights at each evaluation."""
