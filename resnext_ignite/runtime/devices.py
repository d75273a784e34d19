"""Selects the device, the precision and the kernels of a run, and moves a model to its device."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from resnext_ignite.runtime.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, local_rank: int) -> torch.device:
    """Return the device for a value of `train.device`; `auto`: the rank's own GPU if there is one, else the CPU.

    Raises:
        ConfigError: `cuda` is requested, but no GPU is available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: cuda, but this machine has no GPU that torch can use; set train.device=cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def resolve_precision(name: str, device: torch.device) -> str:
    """Return the precision for a value of `train.precision`; `auto`: bf16 if the hardware supports it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def set_up_machine(device: torch.device, *, deterministic: bool) -> None:
    """Select deterministic kernels or the fastest ones; on a CPU, do not return freed memory to the system."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    # With deterministic algorithms, torch fills new memory, to expose reads of uninitialised values. This code has no
    # such reads, and the filling costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    # By default, glibc returns the memory of the activations to the system in every iteration, and the next iteration
    # causes a page fault for each page of this memory. For a small network, the page faults take a quarter of the
    # iteration time.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def place(model: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """Move a model to its device, with the weights in the same memory format as the images."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format)  # type: ignore[call-overload]
