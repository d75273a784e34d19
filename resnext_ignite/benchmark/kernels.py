"""Measures each implementation of the grouped 3x3 convolutions, and compares the times with the machine's limits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnext_ignite.benchmark.limits import measure_limits
from resnext_ignite.benchmark.setup import measured_device
from resnext_ignite.models import create_model
from resnext_ignite.models.grouped_conv import GroupedConv2d, GroupedShape, grouped_shapes, in_each_implementation
from resnext_ignite.runtime.devices import set_up_machine
from resnext_ignite.runtime.timing import in_turns, kernel_timer, medians
from resnext_ignite.training.tuning import ComputeSettings, gradient_for

PASSES = ("forward", "data gradient", "weight gradient")
# The largest relative error that rounding can explain. bf16 has 8 significant bits. A sum of thousands of products that
# is rounded to bf16 only once, at its end, has an error well below this limit.
_TOLERANCE = 0.02


def measure_kernels(models: dict[str, tuple[int, int]], rounds: int = 3) -> dict[str, Any]:
    """Measure the seconds of each pass, for each shape and each implementation, in bf16 and channels_last.

    For each shape, the fastest implementation is the one that takes the least time for all three passes together.
    Before the measurement of a shape, `check` compares the results of all implementations with float64 results.

    Args:
        models: a dict: model name -> (batch size, image size in pixels).

    Raises:
        ValueError: an implementation computes a different result.
    """
    device = measured_device()
    set_up_machine(device, deterministic=device.type == "cpu")
    arithmetic = ComputeSettings(device, torch.bfloat16, channels_last=True)
    limits = measure_limits(device, "bf16")
    samples: dict[str, list[float]] = {}
    shapes: dict[str, Any] = {}
    ratios = {}
    for model, (images, image_size) in models.items():
        plain, best = 0.0, 0.0
        for shape in grouped_shapes(create_model(model, 10), image_size):
            name = f"{model}, {describe(shape)}"
            check(shape, arithmetic)
            taken = _measure_shape(shape, images, arithmetic, rounds, name)
            samples |= {f"{name}, {way}, {step}": values for (way, step), values in taken.items()}
            seconds = {key: medians({"": values})[""] for key, values in taken.items()}
            ways = list(dict.fromkeys(way for way, _ in seconds))
            whole = {way: sum(seconds[way, step] for step in PASSES) for way in ways}
            fastest = min(whole, key=whole.__getitem__)
            least = _least_seconds(shape, images, limits.flop_per_s, limits.bytes_per_s)
            shapes[name] = {
                "fastest": fastest,
                "of_limit": {step: least / seconds[fastest, step] for step in PASSES},
                "grouped_of_limit": {step: least / seconds["grouped", step] for step in PASSES},
            }
            plain, best = plain + whole["grouped"], best + whole[fastest]
        ratios[f"grouped_conv_auto_vs_grouped, {model}"] = plain / best
    return {"unit": "s", "images": {m: n for m, (n, _) in models.items()}, "shapes": shapes} | {
        "samples": samples,
        "ratios": ratios,
    }


def describe(shape: GroupedShape) -> str:
    """Return a description such as `8 groups of 64, 32x32 / 1`; the number after the slash is the stride."""
    module = shape.module
    width = module.in_channels // module.groups
    return f"{module.groups} groups of {width}, {shape.size}x{shape.size} / {module.stride[0]}"


def _measure_shape(
    shape: GroupedShape, images: int, arithmetic: ComputeSettings, rounds: int, title: str
) -> dict[tuple[str, str], list[float]]:
    channels = shape.module.in_channels
    noise = arithmetic.noise(images, channels, shape.size).to(arithmetic.dtype)
    passes: dict[str, Callable[[], float]] = {}
    for way, module in in_each_implementation(shape.module).items():
        arithmetic.place(module)
        for step, work in _passes(module, noise, arithmetic).items():
            passes[f"{way}|{step}"] = kernel_timer(arithmetic.device, work)
    taken = in_turns(passes, rounds, title)
    return {(name.split("|")[0], name.split("|")[1]): values for name, values in taken.items()}


def _passes(module: GroupedConv2d, images: Tensor, arithmetic: ComputeSettings) -> dict[str, Callable[[], object]]:
    images = images.detach().requires_grad_()
    with arithmetic.autocast():
        out = module(images)
    gradient = gradient_for(out)

    def forward() -> None:
        with torch.no_grad(), arithmetic.autocast():
            module(images)

    return {
        PASSES[0]: forward,
        PASSES[1]: lambda: torch.autograd.grad(out, images, gradient, retain_graph=True),
        PASSES[2]: lambda: torch.autograd.grad(out, module.weight, gradient, retain_graph=True),
    }


def _least_seconds(shape: GroupedShape, images: int, flop_per_s: float, bytes_per_s: float) -> float:
    """Return a lower bound for the seconds of one pass in bf16: the larger of its compute bound and its memory bound.

    The result is the same for all three passes. Each pass has the same number of multiply-adds, and accesses each of
    three tensors once. These tensors are as large as the input, the output and the weights.
    """
    module = shape.module
    pixels_in, pixels_out = shape.size**2, (shape.size // module.stride[0]) ** 2
    flop = 2 * 9 * module.in_channels * (module.in_channels // module.groups) * pixels_out * images
    numbers = images * module.in_channels * (pixels_in + pixels_out) + module.weight.numel()
    return max(flop / flop_per_s, 2 * numbers / bytes_per_s)


@torch.enable_grad()
def check(shape: GroupedShape, arithmetic: ComputeSettings, images: int = 2) -> dict[str, float]:
    """Compare the results of each implementation with those of the grouped convolution in float64; return the errors.

    The relative error of a tensor is ||tensor - exact tensor|| / ||exact tensor||. The error of an implementation is
    the largest relative error among its output, its data gradient and its weight gradient.

    Raises:
        ValueError: an error is too large to be due to rounding.
    """
    noise = arithmetic.noise(images, shape.module.in_channels, shape.size)

    def results(module: GroupedConv2d, dtype: torch.dtype) -> list[Tensor]:
        inputs = noise.to(dtype).requires_grad_()
        exact = dtype == torch.float64
        module = module.double() if exact else module
        with contextlib.nullcontext() if exact else arithmetic.autocast():
            out = arithmetic.place(module)(inputs)
        return [out.detach(), *torch.autograd.grad(out, [inputs, module.weight], gradient_for(out))]

    modules = in_each_implementation(shape.module)
    expected = results(in_each_implementation(shape.module)["grouped"], torch.float64)
    errors = {}
    for way, module in modules.items():
        pairs = zip(results(module, arithmetic.dtype), expected, strict=True)
        errors[way] = max(float((mine.double() - exact).norm() / exact.norm()) for mine, exact in pairs)
        if not errors[way] <= _TOLERANCE:
            raise ValueError(f"{describe(shape)}, {way}: relative error {errors[way]:.3g} against float64")
    return errors
