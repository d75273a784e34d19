"""The machine that a run computes on: its device, its precision, its kernels, and where a model lies on it."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from resnext_ignite.runtime.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, local_rank: int) -> torch.device:
    """`auto` is a rank's own GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: cuda, but this machine has no GPU that torch can use; set train.device=cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the machine multiplies matrices in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def set_up_machine(device: torch.device, *, deterministic: bool) -> None:
    """Choose between bit-identical repeats and the fastest kernels, and let a CPU keep the memory that it frees."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    # Filling fresh memory guards against reads of what was never written, which this code does not do; it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    # glibc gives the activations of every iteration back to the system, which then hands out the same pages again, one
    # fault each: a quarter of a small network's iteration.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def place(model: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """The model on its device, its weights in the memory format of the images."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format)  # type: ignore[call-overload]
