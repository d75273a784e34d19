"""Logits without training: as the network is, or faster, with BatchNorm folded into the convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Inference:
    """A network's logits, computed in one of three ways that agree to rounding.

    - `plain`: by the network itself, under autocast.
    - `folded`: by a copy whose BatchNorms are part of its convolutions, its weights in the precision of the arithmetic.
    - `compiled`: that copy, compiled for batches of the size of the first one.

    Args:
        model: its convolutions and BatchNorms named as in `resnext.py`.
        dtype: of the arithmetic.
        way: as above.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, way: str = "plain") -> None:
        self.model, self.dtype = model, dtype
        self._folded = None if way == "plain" else fold_batch_norm(model).to(dtype)
        self._compiled: Callable[[Tensor], Tensor] | None = None
        if way == "compiled" and self._folded is not None:
            self._compiled = torch.compile(self._folded, dynamic=False)
        self._compiled_size = 0

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights and statistics that the network has now: call it before each evaluation."""
        self.model.eval()
        if self._folded is not None:
            # Into the same tensors, which may be compiled for.
            self._folded.load_state_dict(fold_batch_norm(self.model).state_dict())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits float32 (N, num_classes)."""
        if self._folded is None:
            with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
                # Not by a call, which would compile a network that is compiled for training for these batches too.
                return self.model.forward(images).float()
        network: Callable[[Tensor], Tensor] = self._folded
        if self._compiled is not None:
            self._compiled_size = self._compiled_size or len(images)
            # The last batch of a split is smaller: compiling for it takes longer than computing it.
            network = self._compiled if len(images) == self._compiled_size else network
        return network(images.to(self.dtype)).float()


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which each BatchNorm, by its running statistics, is part of the convolution before it.

    Raises:
        ValueError: there is a BatchNorm without one.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        for name, norm in children.items():
            # bn1 follows conv1, as in the blocks; of a shortcut's Sequential 1 follows 0.
            before = name.replace("bn", "conv") if name.startswith("bn") else "0"
            convolution = children.get(before)
            if isinstance(norm, _BatchNorm) and isinstance(convolution, nn.Conv2d):
                setattr(parent, before, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, name, nn.Identity())
    left = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise ValueError(f"{left[0]}: no convolution before it to fold it into")
    return model


class MeanOverViews(nn.Module):
    """The mean of a network's logits over several views of each image.

    Of logits, as facebookresearch/ResNeXt averages its ten crops.

    Args:
        model: (N, 3, H, W) -> (N, num_classes).
        flip: take each view's mirror image, too.
    """

    def __init__(self, model: nn.Module, *, flip: bool) -> None:
        super().__init__()
        self.model, self.flip = model, flip

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W), or (N, views, 3, H, W) -> logits (N, num_classes)."""
        count, *_, height, width = images.shape
        # (N, views, 3, H, W) -> (N * views, 3, H, W), a pixel's values together as the weights are.
        views = images.reshape(-1, 3, height, width).contiguous(memory_format=torch.channels_last)
        logits = self.model(views)
        if self.flip:
            logits = (logits + self.model(views.flip(-1))) / 2
        # (N * views, C) -> (N, views, C) -> (N, C)
        return logits.view(count, -1, logits.shape[1]).mean(1)
