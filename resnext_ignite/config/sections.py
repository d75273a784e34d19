"""The sections of a config: every key with its type, unit and default. `schema.py` combines them into `Config`.

This module does not import torch, so that a wrong config is refused immediately.
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
    """A group of keys: frozen, strict (no string for a number, no boolean for an integer), without unknown keys."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The network and its initial weights."""

    name: str = "cifar_resnext29_8x64d"
    """Architecture: `cifar_resnext<9n+2>_<C>x<W>d` or `resnext50|101|152_<C>x<W>d`, with depth, cardinality C and base
    width W. `cifar4_resnext50|101|152_<C>x<W>d` has the four stages of the latter after a 3x3 stem."""
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """Number of classes; null: that of the data."""
    stem_channels: Annotated[int, Field(ge=1, le=1024)] = 64
    """Output channels of the stem: 64 as published, fewer for small machines. All stages scale with it."""
    pretrained: str | None = None
    """Initial weights: a checkpoint file or run folder of this project, another system's file that `convert` reads, or
    torchvision's weights of this network (`torchvision:IMAGENET1K_V2`). If their number of classes differs, the
    classifier keeps its random weights. null: all weights are random."""
    zero_init_residual: bool = False
    """Initialise the last BatchNorm weight of each block to 0, so that every block begins as the identity."""

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
    """The images: their source, decoding and normalisation."""

    name: Literal["cifar10", "cifar100", "imagefolder", "shards", "shapes"] = "shapes"
    """Data set. `shapes`: images drawn from a fixed seed, without files. `imagefolder`: `train/<class>/*` and
    `val/<class>/*` or `test/<class>/*` in `root`. `shards`: tar files of images in `train/` and `val/` or `test/`; the
    keys for an `imagefolder` apply to them too. If both `val/` and `test/` exist, `val/` selects the best weights, and
    the run evaluates `test/` once, at its end."""
    root: str = "data"
    """Folder of the data; `~` is expanded. `shapes` does not use it."""
    download: bool = True
    """Download CIFAR if it is missing; false: never. An archive in `root` is checked and unpacked in either case."""
    val_size: Annotated[int, Field(ge=0)] = 0
    """Number of training images to hold out, chosen by `seed`, to select the best weights; the run then evaluates the
    test split once, at its end. 0: none; the run evaluates on the test split."""
    train_size: Annotated[int, Field(ge=1)] | None = None
    """Use only this many training images, the same for every seed (`shapes`: draw this many); null: all."""
    test_size: Annotated[int, Field(ge=1)] | None = None
    """Use only this many test images, the same for every seed (`shapes`: draw this many); null: all."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width of the images in pixels; null: 224 for an `imagefolder` with an ImageNet layout, else 32."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`imagefolder`: side of the central square that evaluation uses, over the shorter side (ImageNet: 0.875)."""
    in_memory: bool | None = None
    """`imagefolder`: decode each split once and hold it in memory; true excludes `augment.random_resized_crop`. null:
    only if the split fits, its images have the input size already, and it has no random-resized crops."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Decoding processes per rank for an `imagefolder`; 0: the main process; null: one per core, at most 8."""
    decode: Literal["workers", "device"] = "workers"
    """`imagefolder`: decoder of the training JPEGs. `workers`: the worker processes. `device`: the GPU (nvJPEG); the
    workers then read the files, and decode those that are not plain JPEGs. `device` needs
    `augment.random_resized_crop`. The crops are the same; the pixels differ as the decoders do. In evaluation the
    workers always decode, so that the metrics do not depend on this key."""
    on_error: Literal["fail", "skip"] = "fail"
    """`imagefolder`: reaction to a training image that cannot be read. `fail`: end the run (exit code 3). `skip`: warn,
    and leave it out of the loss and the metrics."""
    max_skipped: Annotated[int, Field(ge=0)] = 100
    """Unreadable training images per epoch that `on_error=skip` tolerates; one more ends the run (exit code 3)."""
    shuffle_shards: Annotated[int, Field(ge=1)] = 16
    """`shards`: number of shards that training reads at a time; their images are shuffled together. The order of the
    shards changes every epoch."""
    mean: PerChannel | None = None
    """Mean of red, green and blue, on a scale of 0 to 1. null: that of `model.pretrained`; without it, the data set's
    published mean (for an `imagefolder`, ImageNet's)."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation of red, green and blue, on the same scale; set with `mean`, or null for both."""


def size_step(image_size: int) -> int:
    """Return the step in pixels by which the side of the training images grows to `image_size`."""
    return 16 if image_size >= 128 else 4


class AugmentConfig(Section):
    """The augmentation of training images. (seed, epoch, index) determines every random draw."""

    crop_padding: Annotated[int, Field(ge=0, le=64)] = 4
    """Pixels of padding on each side, before a random crop to the original size; 0: no crop."""
    crop_fill: Literal["zero", "mean", "reflect"] = "zero"
    """Content of the padding: black (`zero`), the mean colour of the data, or the reflected image."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror left to right. `random`: with probability 0.5 in each epoch. `alternating`: in every second epoch; each
    image draws at random whether it begins mirrored."""
    trivial: bool = False
    """Apply TrivialAugment (wide): one of 14 operations at one of 31 strengths per image (arXiv:2103.10158)."""
    cutout: Annotated[int, Field(ge=0, le=512)] = 0
    """Side in pixels of a square that is set to the mean colour; its centre is anywhere in the image. 0: none."""
    erasing: Fraction = 0.0
    """Probability of random erasing: a box of 2 to 33 % of the area, with an aspect ratio of 0.3 to 3.3, is set to the
    mean colour (arXiv:1708.04896)."""
    random_resized_crop: bool = False
    """`imagefolder`: crop 8 to 100 % of the area, at an aspect ratio of 3/4 to 4/3, and resize it; replaces the padded
    crop."""
    color: Fraction = 0.0
    """Strength s of brightness, contrast and saturation jitter, in random order, each with a factor from 1 - s to 1 + s
    (fb.resnet.torch on ImageNet: 0.4)."""
    lighting: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Standard deviation of the coefficients of a random shift along the principal axes of ImageNet's colours (AlexNet,
    section 4.1; fb.resnet.torch: 0.1)."""
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Mixup's alpha: each image draws lambda from Beta(alpha, alpha) and is mixed with its neighbour in the batch,
    lambda being its own weight (arXiv:1710.09412). 0: no mixup."""
    cutmix: Annotated[float, Field(ge=0, le=10)] = 0.0
    """CutMix's alpha: each image draws lambda from Beta(alpha, alpha); a box of its neighbour replaces 1 - lambda of
    its area (arXiv:1905.04899). 0: no CutMix. With `mixup`, each image gets one of the two at random."""
    progressive_from: Annotated[int, Field(ge=8, le=512, multiple_of=4)] | None = None
    """Side in pixels of the training images in the first epoch. It grows linearly to `data.image_size`, in steps of 4
    pixels (16 if the image size is at least 128), and must be a multiple of the step. Evaluation images keep one size.
    null: training images do, too."""
    progressive_until: Fraction = 0.5
    """Fraction of the epochs after which training images have their full size."""

    @field_validator("mixup", "cutmix")
    @classmethod
    def _not_all_or_nothing(cls, alpha: float) -> float:
        if 0 < alpha < 1e-3:
            raise ValueError(f"{alpha}: 0 for none, or at least 0.001")
        return alpha


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "muon"] = "sgd"
    """`sgd`: stochastic gradient descent with momentum. `muon`: the same, but the steps of all convolutions except the
    stem are orthogonalised, each convolution group alone."""
    lr: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Learning rate at schedule factor 1. It applies to the whole `train.batch_size`, and is not scaled with it."""
    backbone_lr_factor: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Factor on the learning rate of all layers except the classifier; below 1, pretrained weights change less."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum; with `muon`, of all weights except its convolutions."""
    nesterov: bool = True
    """Use Nesterov momentum, with `muon` for all weights."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 5e-4
    """Coefficient of the L2 penalty: the weights times this value are added to the gradient."""
    decay_norm_and_bias: bool = True
    """Decay BatchNorm weights and all biases too, as published; false: only convolution and classifier weights."""
    muon_lr: Annotated[float, Field(gt=0, le=100)] = 0.05
    """`muon`: learning rate of its convolutions at schedule factor 1."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """`muon`: momentum of its convolutions; 0.6 for runs of a few epochs, up to 0.95 for long ones."""
    muon_weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """`muon`: decoupled weight decay of its convolutions, in place of `weight_decay`: each update multiplies their
    weights by 1 - (learning rate) * (this value)."""


class ScheduleConfig(Section):
    """The learning-rate schedule. The rate is set before each iteration."""

    name: Literal["multistep", "cosine", "triangular", "constant"] = "multistep"
    """Shape of the learning rate after the warm-up."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """`multistep`: epochs, in ascending order, after which the rate is multiplied by `gamma`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """`multistep`: factor on the rate at each milestone."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of warm-up, in which the rate rises linearly from 0 (`triangular`: to its peak); 0: no warm-up."""
    final_factor: Fraction = 0.0
    """`cosine`, `triangular`: rate after the last iteration, as a fraction of `optimizer.lr`."""

    @model_validator(mode="after")
    def _check_milestones(self) -> ScheduleConfig:
        if any(later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"schedule.milestones: {list(self.milestones)} must ascend")
        return self


class TrainConfig(Section):
    """The training loop."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Number of passes over the training images."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Images per update, over all ranks and micro-batches. The incomplete last batch of an epoch is dropped."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per update; their gradients are accumulated."""
    freeze: Literal["none", "stem", "backbone"] = "none"
    """Layers that keep the weights and BatchNorm statistics of `model.pretrained`: the stem, or everything but
    the classifier (`backbone`)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: a GPU if there is one, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """ComputeSettings of the forward pass (autocast); auto: bf16 if the hardware computes in it, else fp32."""
    channels_last: bool = True
    """Store images and weights as NHWC (channels_last), which suits convolution kernels; false: NCHW."""
    compile: Literal[False, True, "cuda_graphs"] = False
    """Compile the model with torch.compile; cuda_graphs: also replay its kernels as CUDA graphs (GPU only)."""
    grouped_conv: tuple[GroupedConvImplementation, ...] = ("grouped",)
    """Implementation of the grouped 3x3 convolution: `grouped` (the library's), `split` (a dense convolution per group)
    or `merged<m>` (m groups in one, filled with zeros). Give one for all shapes, or one for each shape in the network's
    order. auto: the fastest for each shape, measured at the first start."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that the targets of the training loss spread evenly over all classes."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the whole gradient, to which it is clipped; 0: no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per iteration of a moving average of weights and BatchNorm statistics. Evaluations use the average where
    there is one. 0: none, unless `ema_horizon` is set."""
    ema_horizon: Annotated[float, Field(gt=0)] | None = None
    """Horizon of the moving average in epochs, equal to 1 / (1 - decay) iterations. It takes the place of `ema_decay`.
    null: not set."""
    ema_start: Annotated[float, Field(ge=0)] = 0.0
    """Epochs after which the moving average begins; until then it equals the current weights."""
    ema_reestimate_bn: Annotated[int, Field(ge=0)] = 0
    """Number of training batches from which the BatchNorm statistics of the moving average are recomputed before each
    evaluation: the first ones of the epoch, at most all. 0: the statistics are averaged, as the weights are."""
    lookahead: Annotated[int, Field(ge=0)] = 0
    """Iterations between two steps of Lookahead's slow weights (arXiv:1907.08610). Training continues from the slow
    weights after a step, and ends on them after the last epoch. 0: no Lookahead."""
    lookahead_alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Size of a Lookahead step: the fraction of the way from the slow weights to the current weights."""
    sync_bn: bool = False
    """Compute BatchNorm statistics over the images of all ranks (GPU only)."""
    ghost_batch: Annotated[int, Field(ge=0)] = 0
    """Images in a group over which BatchNorm computes its training statistics (on each of the paper's 8 GPUs: 16); 0:
    the micro-batch of a rank."""
    deterministic: bool | None = None
    """Make repeated runs bit-identical, which is slower on a GPU; null: true on a CPU, false on a GPU."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop the process after this many hours, with the run saved and resumable; null: no limit."""

    @field_validator("compile", mode="before")
    @classmethod
    def _no_number(cls, value: object) -> object:
        # 0 equals false, and 1 equals true: both would pass.
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
            raise ValueError("train.ema_horizon: and train.ema_decay exclude each other; set train.ema_decay=0")
        if not self.averages and (self.ema_start or self.ema_reestimate_bn):
            key = "ema_start" if self.ema_start else "ema_reestimate_bn"
            raise ValueError(f"train.{key}: there is no average; set train.ema_horizon or train.ema_decay")
        if self.ema_start and self.ema_start >= self.epochs:
            raise ValueError(f"train.ema_start: {self.ema_start:g}; less than the {self.epochs} of train.epochs")
        return self

    @property
    def averages(self) -> bool:
        """Whether the run has a moving average of the weights, which evaluations then use."""
        return bool(self.ema_decay or self.ema_horizon)


class EvaluationConfig(Section):
    """When and how to evaluate, and when the result ends the run."""

    every: Annotated[int, Field(ge=1)] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    early: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Additional epochs to evaluate, whatever `every` is; 0: before the first iteration."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Images per rank in one forward pass of an evaluation."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width of the images in pixels in evaluations, and in later predictions; null: `data.image_size`."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after this many consecutive evaluations without a lower error; 0: never."""
    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Percentage points by which the error must fall to count as lower for `patience`."""
    inference: Literal["plain", "folded", "compiled", "auto"] = "plain"
    """Implementation of the forward pass. `plain`: the network as it is. `folded`: BatchNorm is folded into the
    convolutions. `compiled`: folded and compiled. auto: the fastest, measured at the first start. All of them agree to
    rounding."""
    target_error: Annotated[float, Field(ge=0, le=100)] | None = None
    """Stop when the error, in percent, is at most this value; null: never."""
    abandon: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0, le=100)]], ...] = ()
    """Largest error, in percent, by epoch: `{5: 60, 20: 15}` (stored as pairs). If the error after one of these epochs
    is larger, and it is not the last epoch, the run stops. They are evaluated whatever `every` is."""
    flip_tta: bool = False
    """Also evaluate the mean of the probabilities of each image and its mirror image, as separate metrics."""

    @field_validator("abandon", mode="before")
    @classmethod
    def _as_pairs(cls, limits: object) -> object:
        if not isinstance(limits, dict):
            return limits
        # The keys of a YAML mapping are read as strings.
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
    """Number of newest checkpoints to keep, besides `best.pt` and `final.pt`."""


class DistributedConfig(Section):
    """Training on several ranks."""

    timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    """Seconds that ranks wait for another one. Then it counts as failed, and the run ends with exit code 8."""
    compress_gradients: bool = False
    """Exchange and sum the gradients of the ranks in bf16: half the bytes, with 8 significant bits."""


class LoggingConfig(Section):
    """What a run records."""

    every_iterations: Annotated[int, Field(ge=1)] = 50
    """Iterations between log points of the training metrics. The console also shows them about every five seconds."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    curves: bool = True
    """Draw `curves.png`: error, loss and learning rate over the epochs."""
    mistakes: Annotated[int, Field(ge=0, le=256)] = 64
    """Number of worst mistakes of an evaluation to store in `evaluation.json` and draw in `mistakes.png`; 0: none."""
    images: Annotated[int, Field(ge=0, le=256)] = 64
    """Images on a TensorBoard sheet (augmented training images, worst mistakes); 0: no sheets, no confusion matrix."""
    histograms: bool = False
    """Write TensorBoard histograms of all weights at each evaluation."""
