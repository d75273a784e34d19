"""Checkpoints of Torch7, Caffe and MXNet: the same logits here, and no file of theirs that does harm."""

from __future__ import annotations

import logging
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_files import (
    T7,
    CaffeNet,
    Module,
    SmallNetwork,
    blob,
    field,
    gluoncv_arrays,
    mxnet_arrays,
    params_file,
    torch7_model,
)
from test_convert import living
from torch import Tensor, nn

from resnext_ignite import convert
from resnext_ignite.data.sources import cifar, folders
from resnext_ignite.runs.checkpoint import load_model
from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.conversion import checkpoint_of
from resnext_ignite.weights.foreign.reading import read_foreign
from resnext_ignite.weights.loading import open_model

CIFAR, IMAGENET = (1, 1, 1), (3, 4, 6, 3)


def network(counts: tuple[int, ...], eps: float = 1e-5) -> SmallNetwork:
    """With statistics of its own, so that each part of each BatchNorm tells."""
    made = SmallNetwork(counts, eps=eps)
    living(made)
    return made


def pictures(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(file: Path, images: Tensor, *arguments: str) -> tuple[Tensor, Any]:
    """Of what the convert command makes of a file, and its metadata."""
    output = file.with_suffix(".pt")
    assert convert.main(["--checkpoint", str(file), "--output", str(output), *arguments]) == 0
    model, metadata = load_model(output)
    return model(images), metadata


@torch.no_grad()
def assert_same(found: Tensor, model: nn.Module, images: Tensor) -> None:
    expected = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def t7_file(file: Path, value: Any, **options: Any) -> Path:
    file.write_bytes(T7(**options).value(value))
    return file


# 1. Torch7


@pytest.mark.parametrize("counts", [CIFAR, IMAGENET], ids=["3x3", "7x7"])
def test_torch7(tmp_path: Path, counts: tuple[int, ...]) -> None:
    model = network(counts, eps=1e-3)
    file = t7_file(tmp_path / "model_best.t7", torch7_model(model))
    found, metadata = logits_of(file, pictures())
    assert_same(found, model, pictures())
    # As it is, too.
    assert torch.equal(open_model(file)[0](pictures()), found)
    if counts == CIFAR:
        assert metadata.config.model.name == "cifar_resnext11_4x16d"
        assert (metadata.mean, metadata.std) == (cifar.MEAN, cifar.STD)
        assert (metadata.image_size, metadata.classes) == (32, cifar.CLASSES["cifar10"])
    else:
        assert metadata.config.model.name == "resnext50_4x16d"
        assert (metadata.mean, metadata.std, metadata.image_size) == (folders.MEAN, folders.STD, 224)


def in_table(model: Module) -> Any:
    # What a script saved beside it: an epoch, a function, and a table that contains itself.
    table: dict[Any, Any] = {"epoch": 7, "hook": b"\x1bLJ nothing that is run", "opt": {1: "a", 2: None}}
    return {**table, "self": table, "model": model}


@pytest.mark.parametrize(
    ("wrap", "options", "build"),
    [
        (lambda model: model, {"cuda": True}, {"nn_": "cudnn"}),
        (lambda model: model, {"versioned": False}, {"flat": True}),
        (in_table, {}, {}),
        (lambda model: Module("nn.DataParallelTable", model, model), {}, {}),
        (lambda model: Module("nn.Sequential", Module("nn.Sequential", model), Module("nn.SoftMax")), {}, {}),
    ],
    ids=["cudnn", "old, matrices and biases", "in a table", "of several GPUs", "with a softmax"],
)
def test_torch7_variants(tmp_path: Path, wrap: Any, options: dict[str, Any], build: dict[str, Any]) -> None:
    model = network(CIFAR)
    file = t7_file(tmp_path / "m.t7", wrap(torch7_model(model, **build)), **options)
    assert_same(logits_of(file, pictures())[0], model, pictures())


def test_torch7_parameters_in_one_storage(tmp_path: Path) -> None:
    """As getParameters leaves them: views, of which one is transposed; in double."""
    model = network(CIFAR)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).double()
    place, written = 0, torch7_model(model)

    def view(module: Module, name: str) -> None:
        nonlocal place
        value = module.fields[name]
        if name == "weight" and value.ndim == 2:
            flat[place : place + value.numel()] = value.t().flatten()
            module.fields[name] = flat[place : place + value.numel()].view(value.t().shape).t()
        else:
            flat[place : place + value.numel()] = value.flatten()
            module.fields[name] = flat[place : place + value.numel()].view(value.shape)
        place += value.numel()

    def walk(module: Module) -> None:
        for name in ("weight", "bias"):
            if name in module.fields:
                view(module, name)
        for inner in module.fields.get("modules", {}).values():
            walk(inner)

    walk(written)
    assert place == len(flat)
    file = t7_file(tmp_path / "m.t7", written)
    assert file.stat().st_size < 10 * len(flat), "the storage is written once"
    assert_same(logits_of(file, pictures())[0], model, pictures())


def layer(model: Module, *path: int) -> Module:
    """As model:get(a):get(b)."""
    for number in path:
        model = model.fields["modules"][number]
    return model


def put_stride_on_first(model: Module) -> None:
    # Stage 2, block 1, the table, the branch.
    layer(model, 5, 1, 1, 1, 1).fields.update(dW=2, dH=2)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (put_stride_on_first, "model:get(5):get(1):get(1):get(1):get(1): the stride is on the 1x1"),
        (
            lambda m: layer(m, 4, 1, 1).fields.update(modules=dict.fromkeys((1, 2, 3), layer(m, 4, 1, 1, 1))),
            "model:get(4):get(1):get(1): the split form of the block (resnext_B)",
        ),
        (
            lambda m: layer(m, 4, 1, 1).fields["modules"].update({2: Module("nn.Concat", Module("nn.Identity"))}),
            "model:get(4):get(1):get(1): a shortcut padded with zeros (type A)",
        ),
        (lambda m: layer(m, 1).fields.update(kW=5), "model:get(1): weight: 216 numbers, not those of (8, 3, 3, 5)"),
        (lambda m: layer(m, 1).fields.pop("weight"), "model:get(1): SpatialConvolution: weight is missing"),
        (lambda m: layer(m, 2).fields.update(eps="x"), "model:get(2): eps: 'x' is no small number"),
        (
            lambda m: layer(m, 2).fields.update(bias=torch.zeros(3)),
            "model:get(1): bias: shape (3,), not (8,)",
        ),
        (
            lambda m: layer(m, 4, 1, 1, 1, 4).fields.update(padW=0, padH=0),
            "model:get(4):get(1):get(1):get(1):get(4): kernel, stride and padding 3x3, 1x1, 0x0, where",
        ),
        (
            lambda m: m.fields["modules"].update({3: Module("nn.Tanh")}),
            "model:get(3): Tanh, where a ResNeXt has ReLU",
        ),
        (lambda m: m.fields["modules"].update({3: m}), "more layers than any ResNeXt has"),
        (lambda m: m.fields["modules"].update({3: 1.0}), "model:get(3): no module"),
    ],
)
def test_what_is_no_resnext_of_torch7_is_named(tmp_path: Path, change: Callable[[Module], Any], line: str) -> None:
    model = torch7_model(network(CIFAR))
    change(model)
    file = t7_file(tmp_path / "m.t7", model)
    with pytest.raises(CheckpointError) as caught:
        read_foreign(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def t7_tensor(sizes: tuple[int, ...], strides: tuple[int, ...], offset: int, numbers: int) -> bytes:
    """The bytes of a FloatTensor that may lie about its storage."""
    name = b"\x03\0\0\0V 1\x11\0\0\0torch.FloatTensor"
    shape = struct.pack(f"<i{2 * len(sizes)}qq", len(sizes), *sizes, *strides, offset)
    storage = struct.pack("<ii", 4, 901) + b"\x03\0\0\0V 1\x12\0\0\0torch.FloatStorage" + struct.pack("<q", numbers)
    return struct.pack("<ii", 4, 900) + name + shape + storage + bytes(4 * min(numbers, 100))


class Raw:
    """Bytes where a weight would be."""

    def __init__(self, content: bytes) -> None:
        self.content = content


class RawT7(T7):
    def value(self, value: Any) -> bytes:
        return value.content if isinstance(value, Raw) else super().value(value)


@pytest.mark.parametrize(
    ("weight", "line"),
    [
        (t7_tensor((8, 3, 3, 3), (0, 0, 0, 0), 1, 1), "leave a storage of 1; damaged"),
        (t7_tensor((8, 3, 3, 3), (27, 9, 3, 1), 1, 100), "leave a storage of 100; damaged"),
        (t7_tensor((4,), (1,), 0, 4), "leave a storage of 4; damaged"),
        (t7_tensor((4,), (-1,), 4, 4), "leave a storage of 4; damaged"),
        (t7_tensor((-1,), (1,), 1, 4), "torch.FloatTensor of sizes (-1,); damaged"),
        (t7_tensor((4,), (1,), 1, 2**40), f"a count of {2**40}, but"),
        (struct.pack("<iii", 3, 900, 2**31 - 1), f"a count of {2**31 - 1}, but"),
        (struct.pack("<ii", 2, -5), "a count of -5, but"),
        (struct.pack("<i", 77), "a value of the unknown type 77"),
        (b"".join(struct.pack("<iii", 3, number, 1) for number in range(900, 1200)), "nested over 200 deep"),
    ],
)
def test_lies_in_a_t7_file_are_refused(tmp_path: Path, weight: bytes, line: str) -> None:
    model = torch7_model(network(CIFAR))
    layer(model, 1).fields["weight"] = Raw(weight)
    file = tmp_path / "m.t7"
    file.write_bytes(RawT7().value(model))
    with pytest.raises(CheckpointError) as caught:
        read_foreign(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert line in str(caught.value)


# 2. Caffe


@pytest.mark.parametrize("merged", [False, True], ids=["BatchNorm and Scale", "merged"])
@pytest.mark.parametrize("counts", [CIFAR, IMAGENET], ids=["3x3", "7x7"])
def test_caffe(tmp_path: Path, counts: tuple[int, ...], merged: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = network(counts, eps=1e-4)
    file = tmp_path / "resnext.caffemodel"
    # As the published ones say that their pooling rounds down: ceil_mode false.
    file.write_bytes(CaffeNet(model, merged=merged, rounding=field(13, 0)).content())
    found, metadata = logits_of(file, pictures())
    # The Caffe network takes blue first; what it became takes red first.
    assert_same(found, model, pictures().flip(1))
    assert metadata.config.model.name == ("cifar_resnext11_4x16d" if counts == CIFAR else "resnext50_4x16d")
    assert not caplog.records


@pytest.mark.parametrize(
    ("pad", "rounding", "line"),
    [(0, b"", "pads by 0 and rounds sizes up"), (1, b"", "pads by 1 and rounds sizes up"), (1, field(13, 1), "")],
)
def test_another_pooling_is_warned_of(
    tmp_path: Path, pad: int, rounding: bytes, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "resnext.caffemodel"
    file.write_bytes(CaffeNet(network(IMAGENET), pad=pad, rounding=rounding).content())
    with caplog.at_level(logging.WARNING):
        assert read_foreign(file).source == "caffe"
    assert [line in record.getMessage() for record in caplog.records] == [True] * bool(line)


def with_field(model: SmallNetwork, index: int, number: int, value: bytes) -> bytes:
    """A .caffemodel with one more piece of a message in a layer; protobuf puts the pieces together."""
    net = CaffeNet(model)
    net.layers[index] += field(number, value)
    return net.content()


def test_what_is_no_resnext_of_caffe_is_named(tmp_path: Path) -> None:
    model = network(CIFAR)
    file = tmp_path / "m.caffemodel"

    def refused(content: bytes, line: str) -> None:
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_foreign(file)
        assert str(caught.value).startswith(f"{file}: {line}")

    def changed(index: int, part: bytes, by: bytes) -> bytes:
        net = CaffeNet(model)
        assert part in net.layers[index]
        net.layers[index] = net.layers[index].replace(part, by)
        return net.content()

    refused(b"nonsense", "no .caffemodel, or damaged")
    refused(b"", "no .caffemodel: it has no layer")
    refused(field(2, field(4, "x")), "in Caffe's old format (V1); run Caffe's upgrade_net_proto_binary on it first")
    refused(changed(3, b"ReLU", b"TanH"), "layer layer 4 (TanH): a ResNeXt has no such layer")
    refused(
        changed(0, field(6, b"\x01"), field(6, b"\x02")),
        "layer layer 1: kernel, stride and padding 3x3, 2x2, 1x1, where",
    )
    refused(changed(8, field(5, 4), field(5, 2)), "layer layer 9: 2 groups of 2 do not match its 8 output channels")
    refused(with_field(model, 3, 123, field(1, 0.1)), "layer layer 4 (ReLU): a slope of 0.1 below 0")
    refused(with_field(model, 0, 106, field(18, b"\x02")), "layer layer 1 (Convolution): a dilated convolution")
    refused(with_field(model, 18, 110, field(2, struct.pack("<2f", 1, 2))), "layer layer 19 (Eltwise): a weighted sum")
    refused(with_field(model, 18, 110, field(1, 2)), "layer layer 19 (Eltwise): not a sum")
    # An average pooling in a shortcut, as ResNet-D has it: after the first block's sum and its ReLU.
    net = CaffeNet(model)
    pooling = field(1, "average") + field(2, "Pooling") + field(3, "layer 19") + field(4, "layer 19")
    net.layers.insert(20, pooling + field(121, field(1, 1)))
    refused(net.content(), "layer layer 21 (Convolution): after an average pooling")
    net = CaffeNet(model)
    del net.layers[-2]
    refused(net.content(), f"layer layer {len(net.layers) + 1} (InnerProduct): a classifier elsewhere")
    net = CaffeNet(model)
    net.layers[1] = net.layers[1].replace(blob(torch.tensor([4.0])), blob(torch.tensor([4.0, 4.0])))
    refused(net.content(), "layer layer 2 (BatchNorm): a scale factor of 2 numbers")
    refused(field(1, "x") + field(100, net.layers[0]), "no stem, or no classifier")
    net = CaffeNet(model)
    net.layers[2] = net.layers[1]
    refused(net.content(), "layer layer 2 (BatchNorm): a second BatchNorm for the same convolution")
    # The stride of the second stage, on the first 1x1 as in the original ResNets.
    net = CaffeNet(model)
    first = next(index for index, made in enumerate(net.layers) if field(6, b"\x02") in made) - 4
    net.layers[first] = net.layers[first].replace(field(6, b"\x01"), field(6, b"\x02"))
    refused(net.content(), f"layer layer {first + 1}: the stride is on the 1x1")


# 3. MXNet


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_mxnet(tmp_path: Path, version: int) -> None:
    model = network(IMAGENET, eps=2e-5)
    data = nn.BatchNorm2d(3, 2e-5)
    assert data.running_mean is not None
    assert data.running_var is not None
    data.running_mean.copy_(torch.tensor([123.0, 117.0, 104.0]))
    data.running_var.copy_(torch.tensor([58.0, 57.0, 55.0]) ** 2)
    data.bias.data.copy_(torch.tensor([0.1, -0.2, 0.3]))
    arrays = {
        **mxnet_arrays(model),
        # Whatever it is: with fix_gamma it counts as 1.
        "arg:bn_data_gamma": torch.tensor([5.0, 5.0, 5.0]),
        "arg:bn_data_beta": data.bias,
        "aux:bn_data_moving_mean": data.running_mean,
        "aux:bn_data_moving_var": data.running_var,
    }
    file = tmp_path / "resnext-50-0000.params"
    file.write_bytes(params_file(arrays, version))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1)).float()
    _, metadata = load_model_of(file)
    # By hand: (123 - 0.1 * 58) / 255 and 58 / 255, but for the eps.
    assert metadata.mean == pytest.approx((117.2 / 255, 128.4 / 255, 87.5 / 255), rel=1e-6)
    assert metadata.std == pytest.approx((58 / 255, 57 / 255, 55 / 255), rel=1e-6)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (metadata.mean, metadata.std))
    file.with_suffix(".pt").unlink()
    found, metadata = logits_of(file, (pixels / 255 - mean) / std)
    assert_same(found, nn.Sequential(data.eval(), model), pixels)
    assert (metadata.image_size, metadata.config.model.name) == (224, "resnext50_4x16d")


def load_model_of(file: Path) -> tuple[nn.Module, Any]:
    output = file.with_suffix(".pt")
    assert convert.main(["--checkpoint", str(file), "--output", str(output), "--from", "mxnet"]) == 0
    return load_model(output)


def test_mxnet_without_normalisation_and_in_half(tmp_path: Path) -> None:
    model = network(IMAGENET, eps=2e-5)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    halves = {k: v.detach().half() if k.startswith("arg") else v for k, v in mxnet_arrays(model).items()}
    file = tmp_path / "m.params"
    file.write_bytes(params_file(halves))
    found, metadata = logits_of(file, pictures())
    assert_same(found, model, pictures())
    assert (metadata.mean, metadata.std) == (folders.MEAN, folders.STD)


def test_gluoncv(tmp_path: Path) -> None:
    model = network(IMAGENET)
    file = tmp_path / "resnext50_32x4d.params"
    file.write_bytes(params_file(gluoncv_arrays(model)))
    found, metadata = logits_of(file, pictures())
    assert_same(found, model, pictures())
    assert (metadata.mean, metadata.std, metadata.image_size) == (folders.MEAN, folders.STD, 224)


def test_what_is_no_resnext_of_mxnet_is_named(tmp_path: Path) -> None:
    arrays = mxnet_arrays(network(IMAGENET))
    whole = params_file(arrays)
    file = tmp_path / "m.params"

    def refused(content: bytes, line: str) -> None:
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_foreign(file)
        assert line in str(caught.value)
        assert str(caught.value).startswith(f"{file}: ")

    refused(whole[:-3], f"byte {whole.rindex(b'arg:fc1_bias')}: a count of 12, but")
    refused(whole[:24] + struct.pack("<Ii", 0xF993FAC9, 1) + whole[32:], "byte 32: a sparse array (storage type 1)")
    refused(whole[:32] + struct.pack("<i", 99) + whole[36:], "byte 36: an array of 99 dimensions; damaged")
    refused(whole[:36] + struct.pack("<q", -8) + whole[44:], "an array of shape (-8, 3, 7, 7)")
    refused(whole[:36] + struct.pack("<q", 2**62) + whole[44:], "bytes should follow")
    refused(whole[:16] + struct.pack("<Q", 2**63) + whole[24:], f"byte 24: a count of {2**63}, but")
    unknown = params_file({**arrays, "arg:extra": torch.zeros(1)})
    refused(unknown, "extra: mxnet has no such weight in a ResNeXt")
    lying = {f"aux:bn_data_moving_{name}": torch.full((3,), -1.0) for name in ("mean", "var")}
    refused(params_file({**arrays, **lying, "arg:bn_data_beta": torch.zeros(3)}), "its statistics are not those of")
    refused(params_file({**arrays, **lying}), "bn_data: needs beta, moving_mean and moving_var")


# 4. Any bytes at all


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    for name, content in small_files().items():
        file = tmp_path / f"{name.partition('.')[2]} without a suffix"
        file.write_bytes(content)
        told = read_foreign(file)
        assert told.source == {"m.t7": "torch7", "m.caffemodel": "caffe", "m.params": "mxnet"}[name]
        again = read_foreign(file, told.source).weights
        assert all(torch.equal(again[key], value) for key, value in told.weights.items())
        wrong = "caffe" if told.source != "caffe" else "torch7"
        with pytest.raises(CheckpointError, match=r"no \.caffemodel|not a \.t7 file"):
            read_foreign(file, wrong)
        with pytest.raises(CheckpointError, match=r"no file of weights|resnext.pytorch has no such weight"):
            read_foreign(file, "resnext.pytorch")
    for name in ("missing.t7", "missing.caffemodel", "missing.params"):
        for source in ("auto", "torch7", "caffe", "mxnet"):
            with pytest.raises(CheckpointError, match=rf"{name}: No such file"):
                read_foreign(tmp_path / name, source)


def small_files() -> dict[str, bytes]:
    """One valid file a format, as small as they come."""
    model = SmallNetwork(CIFAR, stem=4, classes=2)
    living(model)
    return {
        "m.t7": T7().value(torch7_model(model)),
        "m.caffemodel": CaffeNet(model).content(),
        "m.params": params_file(mxnet_arrays(model)),
    }


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A file with one to three damages; half of them fall where the structure is dense, at its begin and end."""
    made = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        ends = min(2000, len(made))
        place = draw.choice([draw.randrange(len(made)), draw.randrange(ends), len(made) - 1 - draw.randrange(ends)])
        kind = draw.randrange(6)
        if kind == 0:
            made[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del made[max(place, 1) :]
        elif kind == 2:
            made[place:place] = draw.randbytes(draw.randint(1, 12))
        elif kind == 3:
            made[place : place + draw.randint(1, 64)] = bytes(draw.randint(1, 64))
        elif kind == 4:
            huge = draw.choice([2**31 - 1, -1, 2**62, -(2**62), 2**40, 0x7FFFFFFF0000])
            made[place : place + 8] = struct.pack("<q", huge)
        else:
            start = draw.randrange(len(made))
            made[place:place] = made[start : start + draw.randint(1, 300)]
    return bytes(made)


def refusal_of(file: Path) -> str:
    """The line by which a file is refused; empty where it is read."""
    try:
        checkpoint_of(read_foreign(file))
    except CheckpointError as error:
        return str(error)
    return ""


def attack(folder: Path, name: str, rounds: int) -> int:
    """Read so many damaged files; how many were refused. Each in under 2 s, and in memory that goes with its size."""
    whole, draw, refused = small_files()[name], random.Random(name), 0
    file = folder / name
    file.write_bytes(whole)
    checkpoint_of(read_foreign(file))
    for number in range(rounds):
        content = mutated(whole, draw)
        file.write_bytes(content)
        measured = number % 10 == 0
        if measured:
            tracemalloc.start()
        began = time.process_time()
        line = refusal_of(file)
        refused += bool(line)
        assert not line or (line.startswith(f"{file}: ") and "\n" not in line), number
        assert time.process_time() - began < 2, number
        if measured:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 20 * len(content) + 50e6, number
    return refused


@pytest.mark.parametrize("name", ["m.t7", "m.caffemodel", "m.params"])
def test_damaged_files_are_refused_or_read(tmp_path: Path, name: str) -> None:
    assert attack(tmp_path, name, 300) > 100


@pytest.mark.soak
@pytest.mark.parametrize("name", ["m.t7", "m.caffemodel", "m.params"])
def test_thousands_of_damaged_files_are_refused_or_read(tmp_path: Path, name: str) -> None:
    assert attack(tmp_path, name, 3000) > 1000
