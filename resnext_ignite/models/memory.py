"""What a picture's activations take of memory, seen by running a network without numbers on the `meta` device.

Activations alone: weights, their gradients, and what libraries take for their work are not counted.
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
    """Bytes a picture that the forward pass keeps for the backward, by row, as autograd asks for them.

    What two layers keep of one tensor is counted once, at the first. With `dtype` bfloat16, as under autocast but for
    the copies of the weights; the indices of a max pooling are int64 in either.

    Args:
        model: on the `meta` device; it is left in training mode.
        rows: the row that begins where a module of this name is entered.
    """
    # BatchNorm keeps statistics as well, whatever the batch: what one more picture adds is a picture's own.
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
        # Held until all is counted: a tensor that is freed would leave its place to another.
        logits = model(torch.empty(batch, 3, image_size, image_size, dtype=dtype, device="meta"))
    del logits
    for hook in hooks:
        hook.remove()
    return kept


def inference_peak_bytes(model: nn.Module, image_size: int, dtype: torch.dtype) -> int:
    """The most bytes of one picture's tensors, the picture among them, that live at once where nothing is fused.

    Args:
        model: on the `meta` device; it is left in evaluation mode.
    """
    # As above: without what BatchNorm puts out whatever the batch.
    one, two = (_peak(model, image_size, dtype, batch) for batch in (1, 2))
    return two - one


def _peak(model: nn.Module, image_size: int, dtype: torch.dtype, batch: int) -> int:
    model = model.to(dtype).eval()
    with torch.no_grad(), _LiveBytes() as live:
        model(torch.empty(batch, 3, image_size, image_size, dtype=dtype, device="meta"))
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have made and that are still held."""

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
