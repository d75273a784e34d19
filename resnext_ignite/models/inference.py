"""Computes logits for evaluation, with the network itself or with a faster copy of it without BatchNorms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Inference:
    """Computes a network's logits with one of three implementations, which agree up to rounding.

    - `plain`: the network itself, under autocast.
    - `folded`: a copy in `dtype`, with each BatchNorm folded into the convolution before it.
    - `compiled`: the same copy, compiled for the size of the first batch.

    Args:
        model: a network whose convolutions and BatchNorms are named as in `resnext.py`.
        dtype: precision of the computation.
        way: name of the implementation, from the list above.
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
        """Set evaluation mode, and copy the network's current weights and statistics into the folded copy, if any.

        Call this before each evaluation.
        """
        self.model.eval()
        if self._folded is not None:
            # Keep the old tensors and overwrite their values, because compiled code may refer to these tensors.
            self._folded.load_state_dict(fold_batch_norm(self.model).state_dict())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits, float32 (N, num_classes)."""
        if self._folded is None:
            with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
                # Call `forward`: if the network is compiled for training, calling the network itself would compile it
                # again for this batch size.
                return self.model.forward(images).float()
        network: Callable[[Tensor], Tensor] = self._folded
        if self._compiled is not None:
            self._compiled_size = self._compiled_size or len(images)
            # The last batch of a split may be smaller. Compiling the network for this batch alone would take longer
            # than computing the batch without compilation.
            network = self._compiled if len(images) == self._compiled_size else network
        return network(images.to(self.dtype)).float()


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode, with each BatchNorm folded into the convolution before it.

    The copy uses the current running statistics of the BatchNorms; it does not follow later changes.

    Raises:
        ValueError: a BatchNorm has no convolution before it.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        for name, norm in children.items():
            # In the stem and in the blocks, bn<n> follows conv<n>. In a shortcut's Sequential, "1" follows "0".
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
    """Averages a network's logits over several views of each image.

    It averages logits, not probabilities. facebookresearch/ResNeXt does the same for its ten crops.

    Args:
        model: (N, 3, H, W) -> (N, num_classes).
        flip: also use the mirror image of each view.
    """

    def __init__(self, model: nn.Module, *, flip: bool) -> None:
        super().__init__()
        self.model, self.flip = model, flip

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) or (N, views, 3, H, W) to logits (N, num_classes)."""
        count, *_, height, width = images.shape
        # (N, views, 3, H, W) -> (N * views, 3, H, W), in channels_last like the weights.
        views = images.reshape(-1, 3, height, width).contiguous(memory_format=torch.channels_last)
        logits = self.model(views)
        if self.flip:
            logits = (logits + self.model(views.flip(-1))) / 2
        # (N * views, classes) -> (N, views, classes) -> (N, classes)
        return logits.view(count, -1, logits.shape[1]).mean(1)
