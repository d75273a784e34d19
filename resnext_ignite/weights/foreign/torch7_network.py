"""Reads a ResNeXt from a Torch7 file that facebookresearch/ResNeXt or fb.resnet.torch saved.

The layers may be from nn or from cudnn. This module accepts the bottleneck types `resnext_C` and `resnet`. It refuses
the split form (`resnext_B`) and shortcuts padded with zeros (type A).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.graph import Block, Classifier, Convolution, Norm, weights_of
from resnext_ignite.weights.foreign.keys import Weights
from resnext_ignite.weights.foreign.torch7_file import Array, Object, load_t7

_CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")
_SOFTMAX = ("SoftMax", "LogSoftMax")
# Both limits are far above any real network. Only a damaged file, or a module that contains itself, exceeds them.
_MOST_LAYERS = 10_000
_DEEPEST = 100


def read_torch7(file: Path) -> Weights:
    """Return the weights of the model in a .t7 file, under this project's names.

    Raises:
        CheckpointError: the file is damaged, or holds no ResNeXt; the message names the module.
    """
    content = load_t7(file)
    if isinstance(content, dict):
        content = content.get("model")
    if not isinstance(content, Object):
        raise CheckpointError(f"{file}: holds no Torch7 model, and no table with one under 'model'")
    return _Model(content, file).weights()


class _Model:
    """The layers of a model in order, without containers; `weights` consumes them one after the other."""

    def __init__(self, model: Object, file: Path) -> None:
        self.file = file
        self.seen = 0
        self.layers = list(self._flat(model, "model", 0))

    def failure(self, where: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {where}: {reason}")

    def _flat(self, module: Any, where: str, depth: int) -> Iterator[tuple[str, Object]]:
        self.seen += 1
        if self.seen > _MOST_LAYERS or depth > _DEEPEST:
            raise self.failure(where, "more layers than any ResNeXt has; damaged, or a model that contains itself")
        if not isinstance(module, Object):
            raise self.failure(where, "no module")
        if module.kind == "DataParallelTable":
            # Its modules are replicas of one network, so the first one is enough.
            inner = self._modules(module, where)[:1] or [module.fields.get("impl")]
            yield from self._flat(inner[0], where, depth + 1)
        elif module.kind == "Sequential":
            for number, inner in enumerate(self._modules(module, where), 1):
                yield from self._flat(inner, f"{where}:get({number})", depth + 1)
        elif module.kind != "Identity":
            yield where, module

    def _modules(self, module: Object, where: str) -> list[Any]:
        table = module.fields.get("modules")
        if not isinstance(table, dict):
            raise self.failure(where, f"{module.kind} without modules")
        return [table.get(float(number)) for number in range(1, len(table) + 1)]

    def weights(self) -> Weights:
        layers = self.layers
        stem = self._convolution(layers)
        self._take(layers, "ReLU")
        pooled = bool(layers) and layers[0][1].kind == "SpatialMaxPooling"
        if pooled:
            self._check_pooling(*layers.pop(0))
        blocks = []
        while layers and layers[0][1].kind == "ConcatTable":
            blocks.append(self._block(*layers.pop(0)))
            self._take(layers, "CAddTable")
            self._take(layers, "ReLU")
        self._take(layers, "SpatialAveragePooling")
        self._take(layers, "View", "Reshape")
        where, linear = self._take(layers, "Linear")
        classifier = Classifier(self._tensor(linear, "weight", where), self._tensor(linear, "bias", where))
        if layers and (len(layers) > 1 or layers[0][1].kind not in _SOFTMAX):
            raise self.failure(layers[0][0], f"{layers[0][1].kind} after the classifier")
        return weights_of(stem, blocks, classifier, is_pooled=pooled, file=self.file)

    def _take(self, layers: list[tuple[str, Object]], *kinds: str) -> tuple[str, Object]:
        where, found = layers[0] if layers else ("its end", Object("nothing"))
        if found.kind not in kinds:
            raise self.failure(where, f"{found.kind}, where a ResNeXt has {' or '.join(kinds)}")
        return layers.pop(0)

    def _block(self, where: str, table: Object) -> Block:
        paths = [
            list(self._flat(path, f"{where}:get({number})", 0))
            for number, path in enumerate(self._modules(table, where), 1)
        ]
        kinds = [layer.kind for path in paths for _, layer in path]
        if "ConcatTable" in kinds or len(paths) > 2:
            raise self.failure(where, "the split form of the block (resnext_B); only resnext_C, by groups, is read")
        if "Concat" in kinds or "MulConstant" in kinds:
            raise self.failure(where, "a shortcut padded with zeros (type A); only type B, by a 1x1, is read")
        if len(paths) != 2:
            raise self.failure(where, f"{len(paths)} paths, where a block has two")
        branch, shortcut = paths
        first = self._convolution(branch)
        self._take(branch, "ReLU")
        second = self._convolution(branch)
        self._take(branch, "ReLU")
        third = self._convolution(branch)
        projection = self._convolution(shortcut) if shortcut else None
        for rest in (branch, shortcut):
            if rest:
                raise self.failure(rest[0][0], f"{rest[0][1].kind}, where the block of a ResNeXt ends")
        return Block(where, (first, second, third), projection)

    def _convolution(self, layers: list[tuple[str, Object]]) -> Convolution:
        where, layer = self._take(layers, *_CONVOLUTIONS)
        kernel, stride = self._pair(layer, "k", where), self._pair(layer, "d", where)
        groups = self._whole(layer, "groups", where, 1)
        outputs, inputs = self._whole(layer, "nOutputPlane", where), self._whole(layer, "nInputPlane", where)
        weight = self._tensor(layer, "weight", where)
        # SpatialConvolutionMM stores its weight as (out, in * height * width).
        shape = (outputs, inputs // groups if groups > 0 else 0, *kernel)
        if min(shape) < 1 or weight.numel() != shape[0] * shape[1] * shape[2] * shape[3]:
            raise self.failure(where, f"weight: {weight.numel()} numbers, not those of {shape}")
        bias = self._tensor(layer, "bias", where) if layer.fields.get("bias") is not None else None
        has_norm = bool(layers) and layers[0][1].kind == "SpatialBatchNormalization"
        norm = self._norm(*layers.pop(0)) if has_norm else None
        padding = self._pair(layer, "pad", where, 0)
        return Convolution(where, weight.reshape(shape), bias, (kernel, stride, padding), groups, norm)

    def _norm(self, where: str, layer: Object) -> Norm:
        eps = layer.fields.get("eps", 1e-5)
        if not isinstance(eps, float) or not 0 <= eps < 1:
            raise self.failure(where, f"eps: {eps!r} is no small number")
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self._tensor(layer, part, where) for part in parts)
        return Norm(mean, var, weight, bias, eps)

    def _check_pooling(self, where: str, layer: Object) -> None:
        kernel, stride = self._pair(layer, "k", where), self._pair(layer, "d", where)
        padding = self._pair(layer, "pad", where, 0)
        if (kernel, stride, padding) != ((3, 3), (2, 2), (1, 1)) or layer.fields.get("ceil_mode"):
            raise self.failure(where, "a max pooling other than 3x3 with stride 2 and padding 1")

    def _pair(self, layer: Object, name: str, where: str, default: int | None = None) -> tuple[int, int]:
        return self._whole(layer, f"{name}H", where, default), self._whole(layer, f"{name}W", where, default)

    def _whole(self, layer: Object, name: str, where: str, default: int | None = None) -> int:
        value = layer.fields.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, float) or not value.is_integer():
            raise self.failure(where, f"{layer.kind}: {name}: {value!r} is no whole number")
        return int(value)

    def _tensor(self, layer: Object, name: str, where: str) -> Tensor:
        value = layer.fields.get(name)
        if not isinstance(value, Array):
            raise self.failure(where, f"{layer.kind}: {name} is missing")
        return value.tensor(f"{self.file}: {where}: {name}")
