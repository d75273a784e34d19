"""Defines the sections of a config: every key with its type, unit and default. `schema.py` combines them into `Config`.

This module does not import torch: the slow import would delay the report of an error in a config.
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
    """A group of keys. It is immutable, and refuses unknown keys and values of the wrong type.

    Types are strict: a string does not count as a number, nor a boolean as an integer.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The network and its initial weights."""

    name: str = "cifar_resnext29_8x64d"
    """Architecture, with cardinality C and base width W: `cifar_resnext<9n+2>_<C>x<W>d` (depth 9n+2, 3x3 stem, three
    stages), `resnext50|101|152_<C>x<W>d` (7x7 stem, four stages), or `cifar4_resnext50|101|152_<C>x<W>d` (3x3 stem,
    four stages)."""
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """Number of classes; null: as many as the data has."""
    stem_channels: Annotated[int, Field(ge=1, le=1024)] = 64
    """Number of output channels of the stem (published: 64). The width of every stage is proportional to this number; a
    smaller number suits a small machine."""
    pretrained: str | None = None
    """Initial weights: a checkpoint file or run folder of this project, a file of another system that `convert` reads,
    or torchvision's weights of this network (`torchvision:IMAGENET1K_V2`). If the weights are for another number of
    classes, the classifier keeps its random initial weights. null: all initial weights are random."""
    zero_init_residual: bool = False
    """Initialise the weight of the last BatchNorm of each block to 0, so that each block initially outputs only its
    shortcut."""

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
    """Data set. `shapes`: synthetic images that the program generates; they are the same in every run. `imagefolder`:
    image files `train/<class>/*` and `val/<class>/*` or `test/<class>/*` in `root`. `shards`: tar files of images in
    `train/` and `val/` or `test/`; all keys that apply to an `imagefolder` apply to `shards` too. If only one of `val/`
    and `test/` exists, it is the test split. If both exist, the run selects the best weights on `val/`, and evaluates
    `test/` once, at the end of the run."""
    root: str = "data"
    """Folder of the data; a leading `~` is expanded. `shapes` does not use it."""
    download: bool = True
    """Download CIFAR if neither its files nor its archive are in `root`; false: never download. In both cases, if the
    files are missing and the archive is in `root`, the archive is verified and unpacked."""
    val_size: Annotated[int, Field(ge=0)] = 0
    """Number of training images to hold out, chosen at random with `seed`. The run selects the best weights on these
    images, and evaluates the test split once, at the end of the run. 0: hold out no images; if there is also no `val/`
    folder, the run selects the best weights on the test split."""
    train_size: Annotated[int, Field(ge=1)] | None = None
    """Use only this many training images, the same ones for every seed; null: all. With `shapes`, this many images are
    generated (null: 8192)."""
    test_size: Annotated[int, Field(ge=1)] | None = None
    """Use only this many test images, the same ones for every seed; null: all. With `shapes`, this many images are
    generated (null: 2000)."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width of the images in pixels; null: 224 if the data is an `imagefolder` and the network has a 7x7
    stem, else 32."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`imagefolder`: side of the central square that is cropped from an image, as a fraction of the image's shorter
    side (usual for ImageNet: 0.875). Evaluation uses this crop, and so does training without
    `augment.random_resized_crop`."""
    in_memory: bool | None = None
    """`imagefolder`: whether to decode a split once and keep its pixels in memory. true: always (incompatible with
    `augment.random_resized_crop`). false: never. null: only if the split fits into memory, its images already have the
    input size, and it needs no random-resized crops."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """`imagefolder`: number of processes per rank that decode images; 0: the main process decodes; null: one process
    for each core that the rank may use, at most 8."""
    decode: Literal["workers", "device"] = "workers"
    """`imagefolder`: where training JPEGs are decoded. `workers`: in the worker processes. `device`: on the GPU
    (nvJPEG). With `device`, the worker processes read the files, and decode only the files that are not plain JPEGs;
    `augment.random_resized_crop` must be true. Both values give the same crops, but slightly different pixel values.
    With both values, evaluation images are decoded in the worker processes."""
    on_error: Literal["fail", "skip"] = "fail"
    """`imagefolder`: reaction to a training image that cannot be read. `fail`: end the run (exit code 3). `skip`: print
    a warning, and exclude the image from the loss and the metrics."""
    max_skipped: Annotated[int, Field(ge=0)] = 100
    """With `on_error=skip`: maximum number of unreadable training images per epoch. If an epoch has more, the run ends
    with exit code 3."""
    shuffle_shards: Annotated[int, Field(ge=1)] = 16
    """`shards`: number of shards that training reads at a time; their images are shuffled together. The order of the
    shards changes every epoch."""
    mean: PerChannel | None = None
    """Mean of red, green and blue for the normalisation, on a scale of 0 to 1. null: the mean with which the weights of
    `model.pretrained` were trained; without `model.pretrained`, the published mean of the data set (`imagefolder`: the
    mean of ImageNet)."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation of red, green and blue for the normalisation, on the same scale as `mean`. Set both `mean` and
    `std`, or neither. null: chosen as for `mean`."""


def size_step(image_size: int) -> int:
    """Return the step size of progressive resizing, in pixels; `image_size` is the full side of the training images."""
    return 16 if image_size >= 128 else 4


class AugmentConfig(Section):
    """The augmentation of training images. Its random numbers depend only on (seed, epoch, index of the image)."""

    crop_padding: Annotated[int, Field(ge=0, le=64)] = 4
    """Pixels of padding on each side; a random crop then restores the original size. 0: no padding and no crop."""
    crop_fill: Literal["zero", "mean", "reflect"] = "zero"
    """Content of the padding: black (`zero`), the mean colour of the data (`mean`), or the reflected image
    (`reflect`)."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror images left to right. `none`: never. `random`: each image with probability 0.5 in each epoch.
    `alternating`: each image in every second epoch. A random bit per image decides whether it starts in epoch 1 or
    2."""
    trivial: bool = False
    """Apply TrivialAugment (wide, arXiv:2103.10158): one random operation out of 14 to each image, at one random
    strength out of 31."""
    cutout: Annotated[int, Field(ge=0, le=512)] = 0
    """Cutout: set a square around a random pixel of each image to the mean colour. This value is the side of the square
    in pixels; 0: no cutout."""
    erasing: Fraction = 0.0
    """Random erasing (arXiv:1708.04896): probability that a random box in an image is set to the mean colour. The box
    has 2 to 33 % of the image's area, and an aspect ratio of 0.3 to 3.3."""
    random_resized_crop: bool = False
    """`imagefolder`: crop a random box with 8 to 100 % of the image's area and an aspect ratio of 3/4 to 4/3, and
    resize the box to the image size. This replaces the padding and crop of `crop_padding`."""
    color: Fraction = 0.0
    """Strength s of colour jitter: brightness, contrast and saturation are changed in random order, each by a random
    factor from 1 - s to 1 + s. 0: no jitter. fb.resnet.torch uses 0.4 on ImageNet."""
    lighting: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Strength of the colour shift of AlexNet (section 4.1 of the AlexNet paper). The colour of each image is shifted
    along the three principal axes of ImageNet's colours. The shift along an axis is the eigenvalue of this axis,
    multiplied by a random number from a normal distribution with mean 0. `lighting` is the standard deviation of this
    distribution. 0: no shift. fb.resnet.torch uses 0.1."""
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Alpha of mixup (arXiv:1710.09412). The mixed image is lambda * image + (1 - lambda) * neighbour, where neighbour
    is an adjacent image in the batch. Lambda is a random number from Beta(alpha, alpha), a new one for each image.
    0: no mixup."""
    cutmix: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Alpha of CutMix (arXiv:1905.04899). A random box in each image is replaced with the same box of an adjacent image
    in the batch. The box covers the fraction 1 - lambda of the image (less if the box crosses an edge). Lambda is a
    random number from Beta(alpha, alpha), a new one for each image. 0: no CutMix. If `mixup` is on too, each image gets
    either mixup or CutMix, at random."""
    progressive_from: Annotated[int, Field(ge=8, le=512, multiple_of=4)] | None = None
    """Progressive resizing: side in pixels of the training images in the first epoch. The side grows linearly to
    `data.image_size`, in steps of 4 pixels (16 pixels if `data.image_size` is at least 128). `progressive_from` must be
    a multiple of the step. The size of evaluation images does not change. null: no progressive resizing."""
    progressive_until: Fraction = 0.5
    """Progressive resizing: fraction of the epochs after which the training images have their full size."""

    @field_validator("mixup", "cutmix")
    @classmethod
    def _not_all_or_nothing(cls, alpha: float) -> float:
        if 0 < alpha < 1e-3:
            raise ValueError(f"{alpha}: 0 for none, or at least 0.001")
        return alpha


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "muon"] = "sgd"
    """`sgd`: stochastic gradient descent with momentum. `muon`: Muon for all convolutions except the stem, and SGD for
    all other weights. Muon orthogonalises each update, separately for each group of a convolution."""
    lr: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Full learning rate. The learning rate of an iteration is this value times the factor of the schedule (0 to 1).
    `lr` is not scaled with `train.batch_size` or with the number of ranks."""
    backbone_lr_factor: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Factor for the learning rate of all layers except the classifier. With a value below 1, pretrained weights change
    less."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD. The convolutions that Muon updates use `muon_momentum` instead."""
    nesterov: bool = True
    """Use Nesterov momentum, in SGD and in Muon."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 5e-4
    """Coefficient of the L2 penalty in SGD: SGD adds `weight_decay` * weight to the gradient of each weight."""
    decay_norm_and_bias: bool = True
    """Apply `weight_decay` also to BatchNorm weights and all biases, as published; false: only to the weights of
    convolutions and of the classifier."""
    muon_lr: Annotated[float, Field(gt=0, le=100)] = 0.05
    """Full learning rate of the convolutions that Muon updates; the factor of the schedule applies to it as to `lr`."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the convolutions that Muon updates. Suitable values: 0.6 for runs of a few epochs, up to 0.95 for
    long runs."""
    muon_weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of the convolutions that Muon updates: each update multiplies their weights by 1 -
    (learning rate) * (this value). `weight_decay` does not apply to them."""


class ScheduleConfig(Section):
    """The learning-rate schedule. The rate is set before each iteration."""

    name: Literal["multistep", "cosine", "triangular", "constant"] = "multistep"
    """Course of the learning rate after the warm-up. `multistep`: it changes only at the `milestones`. `cosine`: it
    falls along half a cosine wave. `triangular`: it falls linearly. `constant`: it does not change."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """`multistep`: epochs, in ascending order, after which the learning rate is multiplied by `gamma`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """`multistep`: factor by which the learning rate is multiplied at each milestone."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Number of epochs of the warm-up, in which the learning rate rises linearly from 0 to its full value; 0: no
    warm-up."""
    final_factor: Fraction = 0.0
    """`cosine`, `triangular`: learning rate after the last iteration, as a fraction of `optimizer.lr`."""

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
    """Images per update, over all ranks and micro-batches together. The incomplete last batch of an epoch is
    dropped."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Number of micro-batches per update; their gradients are accumulated. More micro-batches need less memory."""
    freeze: Literal["none", "stem", "backbone"] = "none"
    """Layers whose weights and BatchNorm statistics stay as in `model.pretrained`. `none`: no layers. `stem`: the stem.
    `backbone`: all layers except the classifier."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: a GPU if there is one, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the forward pass (autocast); auto: bf16 if the hardware computes in bf16, else fp32."""
    channels_last: bool = True
    """Store images and weights as NHWC (channels_last), where convolutions are usually faster; false: as NCHW."""
    compile: Literal[False, True, "cuda_graphs"] = False
    """Compile the model with torch.compile; cuda_graphs: also record and replay its kernels as CUDA graphs (GPU
    only)."""
    grouped_conv: tuple[GroupedConvImplementation, ...] = ("grouped",)
    """Implementation of the grouped 3x3 convolutions. `grouped`: torch's grouped convolution. `split`: a dense
    convolution for each group. `merged<m>`: every m groups form one wider group, in which the weights between different
    original groups are zero. The grouped convolutions of a network have several shapes. Give one implementation for all
    shapes, or a list with one implementation for each shape, in the order in which the network uses the shapes. `auto`:
    the fastest implementation for each shape, measured at the first start of the run."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing in the training loss: fraction of the target probability that is spread evenly over all classes.
    0: no label smoothing."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    """Maximum norm of the gradient of all weights together. A gradient with a larger norm is scaled down to this norm;
    0: no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per iteration of an exponential moving average of the weights and BatchNorm statistics. If there is an
    average, evaluations use it. 0: no average, unless `ema_horizon` is set."""
    ema_horizon: Annotated[float, Field(gt=0)] | None = None
    """Horizon of the moving average in epochs. Set either `ema_horizon` or `ema_decay`. The decay per iteration is
    1 - 1 / h, where h is the horizon converted to iterations. null: not set."""
    ema_start: Annotated[float, Field(ge=0)] = 0.0
    """Number of epochs after which averaging begins; until then, the average equals the current weights."""
    ema_reestimate_bn: Annotated[int, Field(ge=0)] = 0
    """Before each evaluation, recompute the BatchNorm statistics of the moving average from this many training batches:
    the first batches of the epoch that has just been trained, or all its batches if there are fewer. 0: average the
    statistics like the weights."""
    lookahead: Annotated[int, Field(ge=0)] = 0
    """Lookahead (arXiv:1907.08610): number of iterations between two steps of the slow weights. After each step,
    training continues from the slow weights. After the last epoch, the model has the slow weights. 0: no Lookahead."""
    lookahead_alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Lookahead: a step moves the slow weights by this fraction of their distance to the current weights."""
    sync_bn: bool = False
    """Compute the training statistics of BatchNorm over the micro-batches of all ranks together (GPU only)."""
    ghost_batch: Annotated[int, Field(ge=0)] = 0
    """Compute the training statistics of BatchNorm over groups of this many images (on CIFAR, the paper used 16 on each
    of 8 GPUs). 0: over the whole micro-batch of a rank."""
    deterministic: bool | None = None
    """Make repeated runs bit-identical; this is slower on a GPU. null: true on a CPU, false on a GPU."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Save the run and stop it after this many hours. A resumed run may train for as many hours again. null: no
    limit."""

    @field_validator("compile", mode="before")
    @classmethod
    def _no_number(cls, value: object) -> object:
        # In Python, 0 equals False and 1 equals True: without this check, both numbers would be accepted.
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
        """Whether the run has a moving average of the weights. If so, evaluations use it."""
        return bool(self.ema_decay or self.ema_horizon)


class EvaluationConfig(Section):
    """When and how a run evaluates, and which evaluation results end the run early."""

    every: Annotated[int, Field(ge=1)] = 1
    """Number of epochs between two evaluations; the last epoch is always evaluated."""
    early: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Epochs after which the run evaluates, in addition to the epochs that `every` selects; 0: evaluate before the
    first iteration."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Images per rank in one forward pass of an evaluation."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width, in pixels, of the images in evaluations, and in predictions with the trained model; null:
    `data.image_size`."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after this many consecutive evaluations without a lower error; 0: never."""
    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """For `patience`: smallest decrease of the error, in percentage points, that counts as a lower error."""
    inference: Literal["plain", "folded", "compiled", "auto"] = "plain"
    """Implementation of the forward pass in evaluations. `plain`: the network as it is. `folded`: BatchNorm is folded
    into the convolutions. `compiled`: the folded network, compiled. `auto`: the fastest, measured at the first start of
    the run. The results agree up to rounding."""
    target_error: Annotated[float, Field(ge=0, le=100)] | None = None
    """Stop when the error, in percent, is at most this value; null: never."""
    abandon: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0, le=100)]], ...] = ()
    """Limits of the error, in percent, by epoch, for example `{5: 60, 20: 15}` (stored as pairs). The run stops if its
    error after one of these epochs is above the limit for that epoch. A limit for the last epoch is ignored. The run
    evaluates after these epochs in addition to the epochs that `every` selects."""
    flip_tta: bool = False
    """Also evaluate with mirror images: the prediction for an image is the mean of the class probabilities for the
    image and for its mirror image. The metrics of these predictions are reported separately."""

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
    """Number of epochs between two saves; the last epoch is always saved."""
    every_iterations: Annotated[int, Field(ge=0)] = 0
    """Number of iterations between two saves inside an epoch; 0: save only at the end of an epoch."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Number of checkpoints to keep: the newest ones. `best.pt` and `final.pt` are kept in addition."""


class DistributedConfig(Section):
    """Training on several ranks."""

    timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    """Seconds that ranks wait for another rank. After this time, the other rank counts as failed, and the run ends with
    exit code 8."""
    compress_gradients: bool = False
    """Send and sum the gradients of the ranks in bf16: half as many bytes, but only 8 significant bits."""


class LoggingConfig(Section):
    """The metrics, plots and images that a run records."""

    every_iterations: Annotated[int, Field(ge=1)] = 50
    """Number of iterations between two log points of the training metrics. The console also shows these metrics about
    every five seconds."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    curves: bool = True
    """Draw `curves.png`: error, loss and learning rate over the epochs."""
    mistakes: Annotated[int, Field(ge=0, le=256)] = 64
    """Number of worst mistakes that the run stores in `evaluation.json` after each evaluation, and shows in
    `mistakes.png` at the end; 0: none."""
    images: Annotated[int, Field(ge=0, le=256)] = 64
    """Number of images on each TensorBoard sheet: a sheet shows augmented training images, or worst mistakes (at most
    `logging.mistakes`). 0: write neither sheets nor the confusion matrix to TensorBoard."""
    histograms: bool = False
    """Write TensorBoard histograms of all weights at each evaluation."""
