"""Builds the alternatives to this project: the networks and the training loops of other packages.

The networks have the same architecture as this project's networks. Each loop is a reimplementation of the package's
training script with some of its documented flags. It receives batches that are already on the device.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet as torchvision_resnet

from resnext_ignite.data.loaders import Batch
from resnext_ignite.models import create_model
from resnext_ignite.runtime.model_names import parse_model_name

# With this small learning rate, the loss stays finite while a benchmark trains on noise.
_LR = 1e-4


Network = Callable[[str, int], nn.Module]


@dataclass(frozen=True)
class Peer:
    """A network, its optimizer, and one iteration of its training loop."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    iterate: Callable[[Batch], None]


def torchvision_network(name: str, num_classes: int) -> nn.Module:
    """Build torchvision's ResNeXt for a model name; the network for CIFAR has a 3x3 stem and three stages.

    Raises:
        ValueError: torchvision cannot build the same network.
    """
    shape = parse_model_name(name)
    cifar = shape.layout == "cifar"
    # torchvision always builds four stages. For CIFAR, the fourth stage gets one block here, and is removed below.
    blocks = [*shape.blocks, 1] if cifar else list(shape.blocks)
    model = torchvision_resnet.ResNet(
        torchvision_resnet.Bottleneck,
        blocks,
        num_classes,
        groups=shape.cardinality,
        width_per_group=shape.base_width,
    )
    if cifar:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool, model.layer4 = nn.Identity(), nn.Identity()
        model.fc = nn.Linear(1024, num_classes)
    return _same_size(model, name, num_classes)


def has_timm() -> bool:
    """Return whether timm is installed; it is an optional extra."""
    return importlib.util.find_spec("timm") is not None


def timm_network(name: str, num_classes: int) -> nn.Module:
    """Build timm's ResNeXt for a model name; the network for CIFAR has a 3x3 stem and three stages.

    Raises:
        ValueError: timm cannot build the same network.
    """
    # The type is Any, because type checkers find the types of timm only where timm is installed.
    timm_resnet: Any = importlib.import_module("timm.models.resnet")
    shape = parse_model_name(name)
    cifar = shape.layout == "cifar"
    model = timm_resnet.ResNet(
        timm_resnet.Bottleneck,
        shape.blocks,
        num_classes=num_classes,
        cardinality=shape.cardinality,
        base_width=shape.base_width,
        channels=(64, 128, 256) if cifar else (64, 128, 256, 512),
    )
    if cifar:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool, model.layer4 = nn.Identity(), nn.Identity()
    return _same_size(model, name, num_classes)


def _same_size(model: nn.Module, name: str, num_classes: int) -> nn.Module:
    sizes = [sum(p.numel() for p in network.parameters()) for network in (model, create_model(name, num_classes))]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name}: {sizes[0]} parameters in the other package, {sizes[1]} here: not the same network")
    return model


def resnext_pytorch_loop(name: str, num_classes: int, device: torch.device) -> Peer:
    """Build ResNeXt.pytorch's loop: fp32 and NCHW. Each iteration reads the loss; this waits for the device."""
    model = create_model(name, num_classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), _LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    average = 0.0

    def iterate(batch: Batch) -> None:
        nonlocal average
        loss = F.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = 0.8 * average + 0.2 * loss.item()

    return Peer(model, optimizer, iterate)


def torchvision_loop(name: str, num_classes: int, device: torch.device) -> Peer:
    """Build the loop of torchvision's references/classification/train.py with `--amp`.

    `--amp` is fp16 with a gradient scaler on a GPU; on a CPU it has no effect, and the loop computes in fp32. Images
    are NCHW, since the script has no flag for channels_last. The loop reads loss, top-1 and top-5 in each iteration.
    """
    model = torchvision_network(name, num_classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), _LR, momentum=0.9, weight_decay=1e-4)
    amp = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=amp)

    def iterate(batch: Batch) -> None:
        with torch.autocast(device.type, torch.float16, enabled=amp):
            logits = model(batch.images)
            loss = F.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        hits = (logits.topk(5, 1).indices == batch.labels[:, None]).float()
        for figure in (hits[:, :1].sum(), hits.sum(), loss):
            figure.item()

    return Peer(model, optimizer, iterate)


def amp_loop(network: Network, name: str, num_classes: int, device: torch.device, *, compiled: bool = False) -> Peer:
    """Build a loop with bf16 autocast, channels_last and torch's SGD.

    This corresponds to timm's train.py with `--amp --amp-dtype bfloat16 --channels-last` (and `--torchcompile` if
    `compiled` is true), with one difference: timm's script reads the loss at log points; this loop never reads it.
    """
    model = network(name, num_classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), _LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

    def iterate(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Peer(model, optimizer, iterate)
