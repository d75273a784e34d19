"""Measures which implementations of grouped convolutions, and of inference in evaluations, are fastest on this machine.

A run measures once, at its first start; its config stores the choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.data import Data
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.models import build_model
from resnext_ignite.models.grouped_conv import grouped_shapes, in_each_implementation
from resnext_ignite.models.inference import Inference
from resnext_ignite.runtime.devices import DTYPES, place
from resnext_ignite.runtime.timing import in_turns, kernel_timer, medians, timed

log = logging.getLogger(__name__)
_ROUNDS = 3
# On a CPU, the time is proportional to the number of images, so a few images suffice. A GPU reaches its full speed only
# on a whole batch.
_MAX_IMAGES_ON_CPU = 8
# Drop a candidate after its first measurement if it is slower than the fastest candidate by more than this factor.
_DROP_IF_SLOWER_BY = 1.5
# Compiling takes about a minute. Try it only if all evaluations together take more than five minutes without it.
_MIN_SECONDS_TO_COMPILE = 300


def resolve_auto(config: Config, data: Data, device: torch.device, ranks: Ranks) -> Config:
    """Return the config with each `auto` replaced by the implementation that rank 0 measures as fastest.

    All other values of the config must be filled in already.
    """
    train, evaluation = config.train, config.evaluation
    if "auto" not in train.grouped_conv and evaluation.inference != "auto":
        return config

    def measure() -> dict[str, Any]:
        values: dict[str, Any] = {}
        if "auto" in train.grouped_conv:
            values["train.grouped_conv"] = grouped_conv_for(config, data.image_size, device, ranks.world_size)
        if evaluation.inference == "auto":
            times = train.epochs // evaluation.every + len(evaluation.early) + len(evaluation.abandon)
            in_all = times * len(data.splits[data.selection]) // ranks.world_size
            model, arithmetic = _plain_model(config), _arithmetic(config, device)
            batch = evaluation.batch_size
            values["evaluation.inference"] = choose_inference(model, data.evaluation_size, batch, in_all, arithmetic)
        for key, value in values.items():
            log.info(f"measured as fastest: {key}={value if isinstance(value, str) else ', '.join(value)}")
        return values

    return with_values(config, ranks.from_rank_zero(measure))


def grouped_conv_for(config: Config, image_size: int, device: torch.device, world_size: int = 1) -> list[str]:
    """Return the fastest implementation for each shape of grouped 3x3 convolution, in the order of the forward pass.

    Each measurement uses as many images as a micro-batch has on one rank, if there are `world_size` ranks (on a CPU, at
    most `_MAX_IMAGES_ON_CPU`).
    """
    images = config.train.batch_size // config.train.accumulate // world_size
    return choose_grouped_conv(_plain_model(config), image_size, images, _arithmetic(config, device))


def _plain_model(config: Config) -> nn.Module:
    # This model is only for the measurements. fork_rng restores the state of the random generator, so that this model
    # does not change the initial weights of the run's own model.
    with torch.random.fork_rng(devices=[]):
        return build_model(with_values(config, {"train.grouped_conv": ["grouped"]}))


def inference_for(config: Config, model: nn.Module, data: Data, split: str, device: torch.device) -> str:
    """Return the fastest inference implementation for a single evaluation of a split."""
    images = len(data.splits[split])
    batch = config.evaluation.batch_size
    return choose_inference(model, data.evaluation_size, batch, images, _arithmetic(config, device))


@dataclass(frozen=True)
class ComputeSettings:
    """The device, precision and memory format with which networks compute."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    def noise(self, images: int, channels: int, size: int) -> Tensor:
        """Return random values to use as images or activations: float32 (images, channels, size, size).

        All calls with the same arguments return the same values.
        """
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(images, channels, size, size, generator=generator)
        return noise.to(
            self.device, memory_format=torch.channels_last if self.channels_last else torch.contiguous_format
        )

    def autocast(self) -> torch.autocast:
        """Return the autocast context for `dtype`; disabled for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in the memory format of the images."""
        return place(model, self.device, channels_last=self.channels_last)

    def enough(self, images: int) -> int:
        """Return how many images of a batch suffice to find the fastest implementation."""
        return images if self.device.type == "cuda" else min(images, _MAX_IMAGES_ON_CPU)


def _arithmetic(config: Config, device: torch.device) -> ComputeSettings:
    return ComputeSettings(device, DTYPES[config.train.precision], config.train.channels_last)


def choose_grouped_conv(model: nn.Module, image_size: int, images: int, arithmetic: ComputeSettings) -> list[str]:
    """Return the fastest implementation for each shape of grouped 3x3 convolution, in the order of the forward pass.

    Each measurement covers a forward and a backward pass.

    Args:
        images: number of images in one forward pass of training on this device.
    """
    choices = []
    for shape in grouped_shapes(model, image_size):
        noise = arithmetic.noise(arithmetic.enough(images), shape.module.in_channels, shape.size)
        ways = {
            way: _training_step(arithmetic.place(module), noise, arithmetic)
            for way, module in in_each_implementation(shape.module).items()
        }
        choices.append(fastest(ways, arithmetic.device))
    return choices


def _training_step(module: nn.Module, images: Tensor, arithmetic: ComputeSettings) -> Callable[[], object]:
    images = images.to(arithmetic.dtype).requires_grad_()

    def step() -> object:
        # As in training: the weights are float32, and autocast casts them.
        with arithmetic.autocast():
            out = module(images)
        return torch.autograd.grad(out, [images, *module.parameters()], gradient)

    with torch.no_grad(), arithmetic.autocast():
        gradient = gradient_for(module(images))
    return step


def gradient_for(out: Tensor) -> Tensor:
    """Return a gradient with the shape and memory format of an output; its elements rise evenly from -1 to 1."""
    return torch.empty_like(out).copy_(torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out))


def choose_inference(
    model: nn.Module, image_size: int, images: int, total_images: int, arithmetic: ComputeSettings
) -> str:
    """Return the fastest of `plain`, `folded` and `compiled`.

    `compiled` is tried only if there are enough images to justify the time of compiling.

    Args:
        images: number of images in one evaluation batch.
        total_images: number of images that this device will evaluate, summed over all evaluations.
    """
    count = arithmetic.enough(images)
    model, noise = arithmetic.place(model).eval(), arithmetic.noise(count, 3, image_size)

    def contender(way: str) -> Callable[[], object]:
        network = Inference(model, arithmetic.dtype, way)
        return lambda: network(noise)

    ways = {way: contender(way) for way in ("plain", "folded")}
    folded = min(timed(arithmetic.device, ways["folded"]) for _ in range(_ROUNDS))
    if folded / count * total_images > _MIN_SECONDS_TO_COMPILE:
        ways["compiled"] = contender("compiled")
    return fastest(ways, arithmetic.device)


def fastest(ways: dict[str, Callable[[], object]], device: torch.device) -> str:
    """Return the name of the fastest candidate.

    Call each candidate once to warm up, and measure it once. Drop the slow candidates (`_DROP_IF_SLOWER_BY`). Measure
    the others in `_ROUNDS` more rounds, and compare the medians of these rounds.
    """
    for way in ways.values():
        way()
    first = {name: timed(device, way) for name, way in ways.items()}
    hopeful = {name: way for name, way in ways.items() if first[name] <= _DROP_IF_SLOWER_BY * min(first.values())}
    times = medians(in_turns({name: kernel_timer(device, way) for name, way in hopeful.items()}, _ROUNDS))
    return min(times, key=times.__getitem__)
