"""Files of Torch7, Caffe and MXNet, written here from their published formats and apart from what reads them.

And the network in them: a small ResNeXt of plain torch modules, apart from this project's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Unit(nn.Module):
    """A convolution and its BatchNorm."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, groups: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(after, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class SmallBlock(nn.Module):
    """Figure 3c of the paper."""

    def __init__(self, before: int, planes: int, groups: int, stride: int, eps: float, projected: bool) -> None:
        super().__init__()
        self.first = Unit(before, planes, 1, 1, 1, eps)
        self.second = Unit(planes, planes, 3, stride, groups, eps)
        self.third = Unit(planes, 4 * planes, 1, 1, 1, eps)
        self.shortcut = Unit(before, 4 * planes, 1, stride, 1, eps) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.third(F.relu(self.second(F.relu(self.first(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class SmallNetwork(nn.Module):
    """A ResNeXt of so many blocks a stage, with 4 groups and `stem` channels: 4 stages have a 7x7 stem, 3 a 3x3."""

    def __init__(self, counts: tuple[int, ...], stem: int = 8, classes: int = 10, eps: float = 1e-5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large = len(counts) == 4
        self.stem = Unit(3, stem, 7 if self.large else 3, 2 if self.large else 1, 1, eps)
        self.blocks = nn.ModuleList()
        channels = stem
        self.counts = counts
        for stage, count in enumerate(counts):
            for number in range(count):
                planes, stride = stem * 2**stage, 2 if stage and not number else 1
                self.blocks.append(SmallBlock(channels, planes, 4, stride, eps, projected=not number))
                channels = 4 * planes
        self.fc = nn.Linear(channels, classes)

    def stages(self) -> Iterator[list[SmallBlock]]:
        blocks = iter(self.blocks)
        for count in self.counts:
            yield [next(blocks) for _ in range(count)]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if self.large:
            x = F.max_pool2d(x, 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class T7:
    """A writer of Torch7's binary files (torch7 File.lua, Tensor.c, Storage.c).

    Args:
        cuda: name tensors and modules as a file of a GPU does.
        versioned: write 'V 1' before a class, as all but the oldest files do.
    """

    def __init__(self, *, cuda: bool = False, versioned: bool = True) -> None:
        self.cuda, self.versioned = cuda, versioned
        self.count = 0
        self.known: dict[int, int] = {}
        # What has a number stays alive, so that no other object gets its id.
        self.kept: list[Any] = []
        self.storages: dict[int, int] = {}

    def number(self, value: float) -> bytes:
        return struct.pack("<id", 1, value)

    def text(self, value: str) -> bytes:
        return struct.pack("<ii", 2, len(value)) + value.encode()

    def _index(self, value: Any) -> tuple[int, bool]:
        if id(value) in self.known:
            return self.known[id(value)], True
        self.count += 1
        self.known[id(value)] = self.count
        self.kept.append(value)
        return self.count, False

    def table(self, value: dict[Any, Any]) -> bytes:
        index, again = self._index(value)
        head = struct.pack("<ii", 3, index)
        if again:
            return head
        body = b"".join(self.value(key) + self.value(inner) for key, inner in value.items())
        return head + struct.pack("<i", len(value)) + body

    def named(self, kind: str) -> bytes:
        names = ["V 1", kind] if self.versioned else [kind]
        return b"".join(struct.pack("<i", len(name)) + name.encode() for name in names)

    def tensor(self, value: Tensor) -> bytes:
        index, again = self._index(value)
        if again:
            return struct.pack("<ii", 4, index)
        kind = {torch.float64: "Double", torch.int64: "Long", torch.float16: "Half"}.get(value.dtype, "Float")
        kind = "Cuda" if self.cuda and kind == "Float" else f"Cuda{kind}" if self.cuda else kind
        head = struct.pack("<ii", 4, index) + self.named(f"torch.{kind}Tensor") + struct.pack("<i", value.ndim)
        head += struct.pack(f"<{2 * value.ndim}q", *value.shape, *value.stride())
        storage = value.untyped_storage()
        numbers = torch.as_strided(value, (len(storage) // value.element_size(),), (1,), 0).numpy()
        head += struct.pack("<q", value.storage_offset() + 1)
        address = storage.data_ptr()
        if address in self.storages and len(numbers):
            return head + struct.pack("<ii", 4, self.storages[address])
        self.count += 1
        self.storages[address] = self.count
        head += struct.pack("<ii", 4, self.count) + self.named(f"torch.{kind}Storage")
        return head + struct.pack("<q", len(numbers)) + numbers.tobytes()

    def value(self, value: Any) -> bytes:
        if value is None:
            return struct.pack("<i", 0)
        if isinstance(value, bool):
            return struct.pack("<ii", 5, value)
        if isinstance(value, int | float):
            return self.number(value)
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, bytes):
            # A function: its dump, and its upvalues.
            self.count += 1
            return struct.pack("<iii", 8, self.count, len(value)) + value + self.table({})
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, Module):
            index, again = self._index(value)
            head = struct.pack("<ii", 4, index)
            return head if again else head + self.named(value.kind) + self.table(value.fields)
        return self.table(value)


class Module:
    """A module of Torch's nn: its class and its fields."""

    def __init__(self, kind: str, /, *modules: Module, **fields: Any) -> None:
        self.kind, self.fields = kind, fields
        # As all modules have them.
        fields.update(_type="torch.FloatTensor", train=False, output=torch.zeros(0))
        if modules:
            fields["modules"] = dict(enumerate(modules, 1))


def torch7_model(network: SmallNetwork, nn_: str = "nn", *, flat: bool = False) -> Module:
    """A network as facebookresearch/ResNeXt builds it. `flat`: with the weights of SpatialConvolutionMM."""

    def unit(unit: Unit) -> list[Module]:
        conv, norm = unit.conv, unit.norm
        weight = conv.weight.detach()
        mm = flat and conv.groups == 1
        shape = {name + axis: getattr(conv, full)[0] for name, full in NAMES.items() for axis in "WH"}
        convolution = Module(
            f"{nn_}.SpatialConvolution{'MM' if mm else ''}",
            nInputPlane=conv.in_channels,
            nOutputPlane=conv.out_channels,
            weight=weight.flatten(1) if mm else weight,
            # Its bias is part of what the BatchNorm behind it takes away.
            **({"bias": 0.1 * torch.ones(conv.out_channels)} if mm else {}),
            **({} if conv.groups == 1 else {"groups": conv.groups}),
            **shape,
        )
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = norm.running_mean + 0.1 if mm else norm.running_mean
        fields = {"running_mean": mean, "running_var": norm.running_var, "eps": norm.eps, "momentum": 0.1}
        weights = {"weight": norm.weight.detach(), "bias": norm.bias.detach()}
        return [convolution, Module(f"{nn_}.SpatialBatchNormalization", **fields, **weights)]

    def block(block: SmallBlock) -> Module:
        branch = Module("nn.Sequential", *unit(block.first), relu, *unit(block.second), relu, *unit(block.third))
        shortcut = Module("nn.Identity") if block.shortcut is None else Module("nn.Sequential", *unit(block.shortcut))
        table = Module("nn.ConcatTable", branch, shortcut)
        return Module("nn.Sequential", table, Module("nn.CAddTable", inplace=True), relu)

    relu = Module(f"{nn_}.ReLU", inplace=True)
    pooling = {"kW": 3, "kH": 3, "dW": 2, "dH": 2, "padW": 1, "padH": 1, "ceil_mode": False}
    return Module(
        "nn.Sequential",
        *unit(network.stem),
        relu,
        *([Module("nn.SpatialMaxPooling", **pooling)] if network.large else []),
        *(Module("nn.Sequential", *map(block, stage)) for stage in network.stages()),
        Module(f"{nn_}.SpatialAveragePooling", kW=8, kH=8, dW=1, dH=1),
        Module("nn.View", numElements=network.fc.in_features),
        Module("nn.Linear", weight=network.fc.weight.detach(), bias=network.fc.bias.detach()),
    )


NAMES = {"k": "kernel_size", "d": "stride", "pad": "padding"}


def varint(value: int) -> bytes:
    """An unsigned number in protobuf's wire format."""
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes | str | float) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(value: Tensor, *, old: bool = False) -> bytes:
    """A BlobProto; `old`: with four sizes instead of a shape."""
    sizes = [1] * (4 - value.ndim) + list(value.shape)
    shape = b"".join(field(number, size) for number, size in enumerate(sizes, 1))
    if not old:
        shape = field(7, field(1, b"".join(map(varint, value.shape))))
    return field(7, shape + field(5, value.detach().float().numpy().tobytes()))


class CaffeNet:
    """A .caffemodel of a network, and the .prototxt that goes with it.

    Args:
        merged: without BatchNorm: part of the convolutions.
        pad: of the stem's pooling.
        rounding: the bytes that say that it rounds down; none: it rounds up.
    """

    def __init__(
        self, network: SmallNetwork, *, merged: bool = False, pad: int = 1, rounding: bytes = b"", size: int = 32
    ) -> None:
        self.merged, self.count = merged, 0
        self.layers: list[bytes] = []
        self.prototxt = [f'input: "data" input_shape {{ dim: 1 dim: 3 dim: {size} dim: {size} }}']
        top = self.relu(self.unit(network.stem, "data"))
        if network.large:
            pooling = POOLING % (pad, "ceil_mode: false" if rounding else "")
            sizes = field(2, 3) + field(3, 2) + field(4, pad)
            top = self.add("Pooling", [top], extra=field(121, field(1, 0) + sizes + rounding), text=pooling)
        for block in network.blocks:
            assert isinstance(block, SmallBlock)
            branch = self.relu(self.unit(block.second, self.relu(self.unit(block.first, top))))
            branch = self.unit(block.third, branch)
            shortcut = top if block.shortcut is None else self.unit(block.shortcut, top)
            top = self.relu(self.add("Eltwise", [shortcut, branch], extra=field(110, field(1, 1))))
        text = "pooling_param { pool: AVE global_pooling: true }"
        top = self.add("Pooling", [top], extra=field(121, field(1, 1) + field(12, 1)), text=text)
        text = f"inner_product_param {{ num_output: {network.fc.out_features} }}"
        blobs = blob(network.fc.weight, old=True) + blob(network.fc.bias, old=True)
        self.add("InnerProduct", [top], blobs, text=text)

    def content(self) -> bytes:
        return field(1, "ResNeXt") + b"".join(field(100, layer) for layer in self.layers)

    def add(self, kind: str, bottoms: list[str], rest: bytes = b"", extra: bytes = b"", *, text: str = "") -> str:
        return self.write(kind, bottoms, "", rest + extra, text)

    def write(self, kind: str, bottoms: list[str], top: str, rest: bytes, text: str) -> str:
        self.count += 1
        name = f"layer {self.count}"
        top = top or name
        tops = b"".join(field(3, bottom) for bottom in bottoms) + field(4, top)
        self.layers.append(field(1, name) + field(2, kind) + tops + rest)
        lines = " ".join(f'bottom: "{bottom}"' for bottom in bottoms)
        self.prototxt.append(f'layer {{ name: "{name}" type: "{kind}" {lines} top: "{top}" {text} }}')
        return top

    def relu(self, top: str) -> str:
        return self.write("ReLU", [top], top, b"", "")

    def unit(self, unit: Unit, bottom: str) -> str:
        conv, norm = unit.conv, unit.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        kernel, stride, pad = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        sizes = field(3, varint(pad)) + field(4, varint(kernel)) + field(6, varint(stride)) + field(5, conv.groups)
        text = (
            f"convolution_param {{ num_output: {conv.out_channels} kernel_size: {kernel} stride: {stride} "
            f"pad: {pad} group: {conv.groups} bias_term: {'true' if self.merged else 'false'} }}"
        )
        if self.merged:
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            blobs = blob(conv.weight * factor.view(-1, 1, 1, 1)) + blob(norm.bias - norm.running_mean * factor)
            return self.add("Convolution", [bottom], blobs + field(106, sizes), text=text)
        top = self.add("Convolution", [bottom], blob(conv.weight) + field(106, sizes), text=text)
        # Sums over pictures, with the weight that they have.
        blobs = blob(norm.running_mean * 4) + blob(norm.running_var * 4) + blob(torch.tensor([4.0]))
        text = f"batch_norm_param {{ use_global_stats: true eps: {norm.eps} }}"
        self.write("BatchNorm", [top], top, blobs + field(139, field(3, norm.eps)), text)
        blobs = blob(norm.weight) + blob(norm.bias)
        return self.write("Scale", [top], top, blobs + field(142, field(4, 1)), "scale_param { bias_term: true }")


POOLING = "pooling_param { pool: MAX kernel_size: 3 stride: 2 pad: %d %s }"


def params_file(arrays: dict[str, Tensor], version: int = 2) -> bytes:
    """A .params file of MXNet; `version` 0: the oldest."""
    content = struct.pack("<QQQ", 0x112, 0, len(arrays))
    for value in arrays.values():
        numbers = value.detach().numpy()
        if version >= 2:
            content += struct.pack("<Ii", 0xF993FAC7 + version, 0)
        elif version == 1:
            content += struct.pack("<I", 0xF993FAC8)
        code = "q" if version else "I"
        content += struct.pack(f"<I{numbers.ndim}{code}", numbers.ndim, *numbers.shape)
        flag = {np.dtype("f4"): 0, np.dtype("f8"): 1, np.dtype("f2"): 2}[numbers.dtype]
        content += struct.pack("<iii", 1, 0, flag) + numbers.tobytes()
    content += struct.pack("<Q", len(arrays))
    return content + b"".join(struct.pack("<Q", len(name)) + name.encode() for name in arrays)


def mxnet_arrays(network: SmallNetwork) -> dict[str, Tensor]:
    """A network's weights by the symbol zoo's names, without the BatchNorm of the pictures."""
    arrays: dict[str, Tensor] = {}

    def add(unit: Unit, convolution: str, norm: str) -> None:
        assert unit.norm.running_mean is not None
        assert unit.norm.running_var is not None
        arrays[f"arg:{convolution}_weight"] = unit.conv.weight
        arrays[f"arg:{norm}_gamma"], arrays[f"arg:{norm}_beta"] = unit.norm.weight, unit.norm.bias
        arrays[f"aux:{norm}_moving_mean"], arrays[f"aux:{norm}_moving_var"] = (
            unit.norm.running_mean,
            unit.norm.running_var,
        )

    add(network.stem, "conv0", "bn0")
    for stage, blocks in enumerate(network.stages(), 1):
        for number, block in enumerate(blocks, 1):
            name = f"stage{stage}_unit{number}"
            for part, unit in enumerate((block.first, block.second, block.third), 1):
                add(unit, f"{name}_conv{part}", f"{name}_bn{part}")
            if block.shortcut is not None:
                add(block.shortcut, f"{name}_sc", f"{name}_sc_bn")
    arrays["arg:fc1_weight"], arrays["arg:fc1_bias"] = network.fc.weight, network.fc.bias
    return arrays


def gluoncv_arrays(network: SmallNetwork) -> dict[str, Tensor]:
    """A network's weights by the names of gluoncv/model_zoo/resnext.py, as save_parameters writes them."""
    arrays: dict[str, Tensor] = {}

    def add(unit: Unit, name: str, place: int) -> None:
        assert unit.norm.running_mean is not None
        assert unit.norm.running_var is not None
        arrays[f"{name}.{place}.weight"] = unit.conv.weight
        arrays[f"{name}.{place + 1}.gamma"], arrays[f"{name}.{place + 1}.beta"] = unit.norm.weight, unit.norm.bias
        arrays[f"{name}.{place + 1}.running_mean"] = unit.norm.running_mean
        arrays[f"{name}.{place + 1}.running_var"] = unit.norm.running_var

    add(network.stem, "features", 0)
    for stage, blocks in enumerate(network.stages(), 4):
        for number, block in enumerate(blocks):
            for part, unit in enumerate((block.first, block.second, block.third)):
                add(unit, f"features.{stage}.{number}.body", 3 * part)
            if block.shortcut is not None:
                add(block.shortcut, f"features.{stage}.{number}.downsample", 0)
    arrays["output.weight"], arrays["output.bias"] = network.fc.weight, network.fc.bias
    return arrays
