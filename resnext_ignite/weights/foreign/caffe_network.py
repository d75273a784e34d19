"""Finds the ResNeXt in the layers that `caffe_file.py` reads.

It follows the connections between the layers and ignores their names, because each converter names layers differently.

A .caffemodel does not state how images must be prepared. The ResNeXts published for Caffe take BGR images, as OpenCV
reads them (soeaver/caffe-model, cls/evaluation_cls.py). For every file, this project assumes BGR images, normalised
with ImageNet's mean and standard deviation, or with CIFAR's if the stem is 3x3. The reader reverses the stem's input
channels, so that the network takes RGB images, as every network in this project does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.caffe_file import blob_of, load_caffemodel, pair, text
from resnext_ignite.weights.foreign.graph import Block, Classifier, Convolution, Norm, no_norm, weights_of
from resnext_ignite.weights.foreign.keys import Weights

log = logging.getLogger(__name__)
# EltwiseOp.SUM and PoolMethod.MAX in caffe.proto.
_SUM, _MAX = 1, 0
# Types of layers: _SOURCES supply the images. _PASSING change no value in inference, so the reader passes their input
# on. _ENDS come after the classifier.
_SOURCES = ("Input", "Data", "ImageData", "DummyData", "MemoryData", "HDF5Data")
_PASSING = ("Split", "Dropout", "Flatten", "Reshape")
_ENDS = ("Softmax", "SoftmaxWithLoss", "Accuracy", "Silence")


@dataclass(frozen=True)
class _Value:
    """The content of a blob.

    Args:
        begins: where its convolutions begin: -1 at the image, 0 after the stem, n after the n-th block.
        convolutions: the convolutions from there to this blob, in order.
        is_rectified: whether a ReLU follows the last convolution or sum.
        joined: the block, if this blob is the sum at the end of a block and its ReLU has not come yet; otherwise None.
        is_averaged: whether the blob comes after an average pooling; only the classifier may follow.
    """

    begins: int
    convolutions: tuple[Convolution, ...] = ()
    is_rectified: bool = False
    joined: Block | None = None
    is_averaged: bool = False


_IMAGE = _Value(-1)


def read_caffe(file: Path) -> Weights:
    """Return the weights of a .caffemodel under this project's names.

    Raises:
        CheckpointError: the file is damaged, or its network is not a ResNeXt; the message names the layer.
    """
    return _Graph(load_caffemodel(file), file).weights()


class _Graph:
    """Follows the layers from blob to blob and collects the stem, the blocks and the classifier."""

    def __init__(self, layers: Any, file: Path) -> None:
        self.file, self.layers = file, layers
        self.values: dict[str, _Value] = {}
        self.stem: Convolution | None = None
        self.is_pooled = False
        self.blocks: list[Block] = []
        self.classifier: Classifier | None = None

    def failure(self, layer: Any, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: layer {text(layer.name)} ({text(layer.type)}): {reason}")

    def weights(self) -> Weights:
        follow: dict[str, Callable[..., _Value]] = {
            "Convolution": self._convolution,
            "BatchNorm": self._batch_norm,
            "Scale": self._scale,
            "ReLU": self._relu,
            "Pooling": self._pooling,
            "Eltwise": self._sum,
            "InnerProduct": self._inner_product,
        }
        for layer in self.layers:
            kind = text(layer.type)
            if kind in _SOURCES or kind in _ENDS:
                continue
            if kind not in follow and kind not in _PASSING:
                raise self.failure(layer, "a ResNeXt has no such layer")
            bottoms = [self.values.get(text(name), _IMAGE) for name in layer.bottom]
            if len(bottoms) != (2 if kind == "Eltwise" else 1) or not layer.top:
                raise self.failure(layer, f"{len(bottoms)} input and {len(layer.top)} output blobs: not a ResNeXt")
            if any(value.is_averaged for value in bottoms) and kind not in (*_PASSING, "InnerProduct"):
                raise self.failure(layer, "after an average pooling, where a ResNeXt has only the classifier")
            made = bottoms[0] if kind in _PASSING else follow[kind](layer, *bottoms)
            for top in layer.top:
                self.values[text(top)] = made
        if self.stem is None or self.classifier is None:
            raise CheckpointError(f"{self.file}: no stem, or no classifier: not the weights of a ResNeXt")
        weights = weights_of(self.stem, self.blocks, self.classifier, is_pooled=self.is_pooled, file=self.file)
        weights["conv1.weight"] = weights["conv1.weight"].flip(1)  # blue, green, red -> red, green, blue
        return weights

    def _convolution(self, layer: Any, value: _Value) -> _Value:
        if value.joined or (value.convolutions and not value.is_rectified):
            raise self.failure(layer, "a convolution without a ReLU before it; a ResNeXt has none")
        parameters = layer.convolution_param
        if any(dilation != 1 for dilation in parameters.dilation):
            raise self.failure(layer, "a dilated convolution; a ResNeXt has none")
        geometry = (
            pair(parameters, "kernel_size", "kernel", 0),
            pair(parameters, "stride", "stride", 1),
            pair(parameters, "pad", "pad", 0),
        )
        weight = self._blob(layer, 0)
        if weight.ndim != 4 or 0 in weight.shape or tuple(weight.shape[2:]) != geometry[0]:
            raise self.failure(layer, f"weights of shape {tuple(weight.shape)} for a kernel of {geometry[0]}")
        bias = self._blob(layer, 1).flatten() if len(layer.blobs) > 1 else None
        groups = parameters.group if parameters.HasField("group") else 1
        made = Convolution(f"layer {text(layer.name)}", weight, bias, geometry, groups, None)
        return replace(value, convolutions=(*value.convolutions, made), is_rectified=False)

    def _batch_norm(self, layer: Any, value: _Value) -> _Value:
        if self._last(layer, value).norm is not None:
            raise self.failure(layer, "a second BatchNorm for the same convolution")
        mean, var, factor = (self._blob(layer, number).flatten() for number in range(3))
        if len(factor) != 1:
            raise self.failure(layer, f"a scale factor of {len(factor)} numbers")
        # Caffe stores the mean and the variance as weighted sums over the batches. `factor` is the sum of these
        # weights. It is 0 before the first training step.
        scale = 1 / float(factor[0]) if factor[0] else 0.0
        ones, zeros = torch.ones(mean.shape), torch.zeros(mean.shape)
        eps = layer.batch_norm_param.eps if layer.batch_norm_param.HasField("eps") else 1e-5
        return _with_norm(value, Norm(mean * scale, var * scale, ones, zeros, eps))

    def _scale(self, layer: Any, value: _Value) -> _Value:
        gamma = self._blob(layer, 0).flatten()
        beta = self._blob(layer, 1).flatten() if len(layer.blobs) > 1 else torch.zeros(gamma.shape)
        last = self._last(layer, value)
        before = last.norm or no_norm(len(last.weight))
        if gamma.shape != before.weight.shape or beta.shape != before.bias.shape:
            raise self.failure(layer, f"{len(gamma)} channels, but the convolution before it has {len(before.weight)}")
        norm = replace(before, weight=before.weight * gamma, bias=before.bias * gamma + beta)
        return _with_norm(value, norm)

    def _last(self, layer: Any, value: _Value) -> Convolution:
        if not value.convolutions or value.is_rectified:
            raise self.failure(layer, "no convolution before it")
        return value.convolutions[-1]

    def _relu(self, layer: Any, value: _Value) -> _Value:
        if layer.relu_param.negative_slope:
            raise self.failure(layer, f"a slope of {layer.relu_param.negative_slope:g} below 0; a ResNeXt has none")
        if value.joined is not None:
            self.blocks.append(value.joined)
            return _Value(len(self.blocks), is_rectified=True)
        if value.begins < 0 and len(value.convolutions) == 1:
            if self.stem is not None:
                raise self.failure(layer, "a second stem")
            self.stem = value.convolutions[0]
            return _Value(0, is_rectified=True)
        return replace(value, is_rectified=True)

    def _pooling(self, layer: Any, value: _Value) -> _Value:
        parameters = layer.pooling_param
        if parameters.pool != _MAX:
            return replace(value, is_averaged=True)
        if value.begins != 0 or value.convolutions or self.blocks or self.is_pooled:
            raise self.failure(layer, "a max pooling elsewhere than after the stem")
        kernel, stride = (pair(parameters, f"{n}{s}", n, 1) for n, s in (("kernel", "_size"), ("stride", "")))
        padding = pair(parameters, "pad", "pad", 0)
        if (kernel, stride) != ((3, 3), (2, 2)) or padding not in ((0, 0), (1, 1)):
            raise self.failure(layer, "a max pooling other than 3x3 with stride 2 and padding 0 or 1")
        # By default, Caffe rounds output sizes up. A model that rounds them down has field 13: in Caffe, this field is
        # round_mode, with the value FLOOR (1); in the forks with pull request 3057, it is ceil_mode, with the value
        # false (0). The published ResNeXts are from these forks.
        if padding == (0, 0) or not parameters.HasField("rounding"):
            log.warning(
                "%s: layer %s: its pooling pads by %d and rounds sizes %s; this project's pads by 1 and rounds down: "
                "logits will differ a little",
                self.file,
                text(layer.name),
                padding[0],
                "down" if parameters.HasField("rounding") else "up",
            )
        self.is_pooled = True
        return value

    def _sum(self, layer: Any, first: _Value, second: _Value) -> _Value:
        parameters = layer.eltwise_param
        if parameters.HasField("operation") and parameters.operation != _SUM:
            raise self.failure(layer, "not a sum; a ResNeXt has only sums")
        if any(coefficient != 1 for coefficient in parameters.coeff):
            raise self.failure(layer, "a weighted sum; a ResNeXt has none")
        shortcut, branch = sorted((first, second), key=lambda value: len(value.convolutions))
        now = len(self.blocks)
        if first.begins != now or second.begins != now or first.joined or second.joined:
            raise self.failure(layer, "the inputs of the sum do not begin at the previous block")
        if len(shortcut.convolutions) > 1 or branch.is_rectified or (shortcut.convolutions and shortcut.is_rectified):
            raise self.failure(layer, "not the sum of a branch and a shortcut of at most one convolution")
        projection = shortcut.convolutions[0] if shortcut.convolutions else None
        return _Value(now, joined=Block(f"layer {text(layer.name)}", branch.convolutions, projection))

    def _inner_product(self, layer: Any, value: _Value) -> _Value:
        is_last = value.begins == len(self.blocks) and not value.convolutions and value.joined is None
        if self.classifier is not None or not is_last or not value.is_averaged:
            raise self.failure(layer, "a classifier elsewhere than after the average pooling of the last block")
        weight = self._blob(layer, 0)
        if weight.ndim < 2:
            raise self.failure(layer, f"weights of shape {tuple(weight.shape)}")
        # Old blobs have four dimensions: (1, 1, classes, channels).
        weight = weight.reshape(weight.shape[-2:]) if set(weight.shape[:-2]) <= {1} else weight
        bias = self._blob(layer, 1).flatten() if len(layer.blobs) > 1 else torch.zeros(len(weight))
        self.classifier = Classifier(weight, bias)
        return value

    def _blob(self, layer: Any, number: int) -> Tensor:
        if number >= len(layer.blobs):
            raise self.failure(layer, f"{len(layer.blobs)} blobs of weights, where it needs {number + 1}")
        return blob_of(layer.blobs[number], f"{self.file}: layer {text(layer.name)}")


def _with_norm(value: _Value, norm: Norm) -> _Value:
    *before, last = value.convolutions
    return replace(value, convolutions=(*before, replace(last, norm=norm)))
