"""Counts the memory of one image's activations. The network runs on the `meta` device, where tensors have no values.

Only activations count. Weights, gradients of weights, and the workspaces of libraries do not count.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_bytes(model: nn.Module, image_size: int, dtype: torch.dtype, rows: dict[str, str]) -> dict[str, int]:
    """Return the bytes per image that the forward pass saves for the backward pass, for each row of `layers.py`.

    A tensor that two layers save counts once, for the first layer. With `dtype` bfloat16, the result is valid for bf16
    autocast, but does not include autocast's copies of the weights. The indices of a max pooling are int64 for every
    `dtype`.

    Args:
        model: a network on the `meta` device. The function converts it to `dtype` and sets training mode.
        rows: maps the name of a module to the name of the row that begins with this module.
    """
    # BatchNorm also saves statistics, whose size does not depend on the batch size. They cancel out in the difference
    # between two batch sizes.
    two, three = (_kept(model, image_size, dtype, rows, batch) for batch in (2, 3))
    return {row: three[row] - two[row] for row in dict.fromkeys(rows.values())}


def _kept(model: nn.Module, image_size: int, dtype: torch.dtype, rows: dict[str, str], batch: int) -> Counter[str]:
    model = model.to(dtype).train()
    seen = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept, row = Counter[str](), next(iter(rows.values()))

    def entering(name: str) -> Callable[[nn.Module, object], None]:
        def enter(module: nn.Module, inputs: object) -> None:
            nonlocal row
            row = name

        return enter

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            kept[row] += tensor.untyped_storage().nbytes()
        return tensor

    hooks = [model.get_submodule(n).register_forward_pre_hook(entering(name)) for n, name in rows.items()]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        # `seen` holds addresses of storages. `logits` keeps the saved tensors alive until everything is counted;
        # otherwise, a new tensor could get the address of a freed storage and would not be counted.
        logits = model(torch.empty(batch, 3, image_size, image_size, dtype=dtype, device="meta"))
    del logits
    for hook in hooks:
        hook.remove()
    return kept


def inference_peak_bytes(model: nn.Module, image_size: int, dtype: torch.dtype) -> int:
    """Return the peak memory of an image and its activations in inference, in bytes, if no layers are fused.

    Args:
        model: a network on the `meta` device. The function converts it to `dtype` and sets evaluation mode.
    """
    # As in `kept_bytes`, tensors whose size does not depend on the batch size cancel out in the difference.
    one, two = (_peak(model, image_size, dtype, batch) for batch in (1, 2))
    return two - one


def _peak(model: nn.Module, image_size: int, dtype: torch.dtype, batch: int) -> int:
    model = model.to(dtype).eval()
    with torch.no_grad(), _LiveBytes() as live:
        model(torch.empty(batch, 3, image_size, image_size, dtype=dtype, device="meta"))
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have created and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._holders = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        self.peak = max(self.peak, self.live)
        return made

    def _hold(self, tensor: Tensor) -> None:
        storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
        self.live += size if not self._holders[storage] else 0
        self._holders[storage] += 1
        weakref.finalize(tensor, self._release, storage, size)

    def _release(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        self.live -= size if not self._holders[storage] else 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
