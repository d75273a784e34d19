"""Reads Caffe's .caffemodel files with protobuf. It declares only the fields that a ResNeXt needs.

The original declarations are in BVLC/caffe, src/caffe/proto/caffe.proto.
`caffe_network.py` finds the network in the layers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from torch import Tensor

from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.binary import content_of, float_tensor

# For each message, the number and type of each field; '*' marks a repeated field. Strings are read as bytes, because
# they may be invalid UTF-8. A blob's packed numbers are read as bytes too, to avoid a Python object for each number.
_MESSAGES = {
    "Shape": {"dim": (1, "*int64")},
    "Blob": {
        "num": (1, "int32"),
        "channels": (2, "int32"),
        "height": (3, "int32"),
        "width": (4, "int32"),
        "data": (5, "*bytes"),
        "shape": (7, "Shape"),
        "double_data": (8, "*bytes"),
    },
    "Convolution": {
        "pad": (3, "*uint32"),
        "kernel_size": (4, "*uint32"),
        "group": (5, "uint32"),
        "stride": (6, "*uint32"),
        "pad_h": (9, "uint32"),
        "pad_w": (10, "uint32"),
        "kernel_h": (11, "uint32"),
        "kernel_w": (12, "uint32"),
        "stride_h": (13, "uint32"),
        "stride_w": (14, "uint32"),
        "dilation": (18, "*uint32"),
    },
    "BatchNorm": {"eps": (3, "float")},
    "ReLU": {"negative_slope": (1, "float")},
    "Eltwise": {"operation": (1, "int32"), "coeff": (2, "*float")},
    "Pooling": {
        "pool": (1, "int32"),
        "kernel_size": (2, "*uint32"),
        "stride": (3, "*uint32"),
        "pad": (4, "*uint32"),
        "kernel_h": (5, "uint32"),
        "kernel_w": (6, "uint32"),
        "stride_h": (7, "uint32"),
        "stride_w": (8, "uint32"),
        "pad_h": (9, "uint32"),
        "pad_w": (10, "uint32"),
        "rounding": (13, "int32"),
    },
    "Layer": {
        "name": (1, "bytes"),
        "type": (2, "bytes"),
        "bottom": (3, "*bytes"),
        "top": (4, "*bytes"),
        "blobs": (7, "*Blob"),
        "convolution_param": (106, "Convolution"),
        "eltwise_param": (110, "Eltwise"),
        "pooling_param": (121, "Pooling"),
        "relu_param": (123, "ReLU"),
        "batch_norm_param": (139, "BatchNorm"),
    },
    "OldLayer": {},
    "Net": {"name": (1, "bytes"), "layers": (2, "*OldLayer"), "layer": (100, "*Layer")},
}


def load_caffemodel(file: Path) -> Any:
    """Return the layers of a file, as protobuf messages with the fields of "Layer" above.

    Raises:
        CheckpointError: the file is damaged, or in Caffe's old format (V1).
    """
    net = _net_class()()
    try:
        net.ParseFromString(content_of(file))
    except (message.DecodeError, RuntimeError):
        raise CheckpointError(f"{file}: no .caffemodel, or damaged") from None
    if net.layers and not net.layer:
        raise CheckpointError(f"{file}: in Caffe's old format (V1); run Caffe's upgrade_net_proto_binary on it first")
    if not net.layer:
        raise CheckpointError(f"{file}: no .caffemodel: it has no layer")
    return net.layer


def _net_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="resnext_ignite_caffe.proto", package="caffe", syntax="proto2")
    for name, fields in _MESSAGES.items():
        described = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = described.field.add(name=field, number=number)
            added.label = added.LABEL_REPEATED if kind.startswith("*") else added.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            if kind in _MESSAGES:
                added.type, added.type_name = added.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                added.type = added.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.Net"))


def blob_of(blob: Any, where: str) -> Tensor:
    """Return a blob as a float32 tensor.

    Raises:
        CheckpointError: the size of the data does not match the shape; the error message begins with `where`.
    """
    shape = tuple(blob.shape.dim)
    if not blob.HasField("shape"):
        shape = (blob.num, blob.channels, blob.height, blob.width)
    is_double = bool(blob.double_data)
    dtype: np.dtype[Any] = np.dtype("<f8" if is_double else "<f4")
    data = b"".join(blob.double_data if is_double else blob.data)
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise CheckpointError(f"{where}: a blob of shape {shape} in {len(data)} bytes; damaged")
    return float_tensor(data, dtype, shape)


def text(value: bytes) -> str:
    """Decode a name; replace invalid UTF-8 and unprintable characters with U+FFFD."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in value.decode("utf-8", "replace"))


def pair(parameters: Any, both: str, each: str, default: int) -> tuple[int, int]:
    """Read a kernel, stride or padding from a layer's parameters, and return it as (height, width).

    Args:
        parameters: the message with the layer's parameters.
        both: name of the repeated field, which holds either one number for both sides, or height and width.
        each: common prefix of the two separate fields: their names are this prefix with `_h` and with `_w`.
        default: value for both sides if none of the fields is set.
    """
    if parameters.HasField(f"{each}_h") or parameters.HasField(f"{each}_w"):
        return getattr(parameters, f"{each}_h"), getattr(parameters, f"{each}_w")
    sizes = list(getattr(parameters, both)) or [default]
    return sizes[0], sizes[-1]
