"""One network on several ranks: wrapped to share its gradients, its statistics averaged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.errors import ConfigError


def wrap_for_ranks(
    model: nn.Module,
    device: torch.device,
    ranks: Ranks,
    *,
    sync_bn: bool,
    compiled: bool | str = False,
    accumulate: int = 1,
    compress_gradients: bool = False,
) -> nn.Module:
    """The model as the training iteration calls it: itself on one rank, else in DistributedDataParallel.

    Args:
        compiled: by torch.compile, for each size of images that comes, when it comes; "cuda_graphs": and played back as
            CUDA graphs, which have one size.
        accumulate: micro-batches an iteration.
        compress_gradients: let the gradients travel, and be summed, as bf16.

    Raises:
        ConfigError: `sync_bn` or CUDA graphs on a CPU, for which torch has none.
    """
    if sync_bn:
        if device.type != "cuda":
            raise ConfigError("train.sync_bn: torch has a synchronised BatchNorm for GPUs only; set it to false")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compiled:
        if compiled == "cuda_graphs" and device.type != "cuda":
            raise ConfigError("train.compile: cuda_graphs is for GPUs only; set it to true or false")
        # Images may grow through more sizes (at most 32) than torch compiles for before it gives up, without a word.
        torch._dynamo.config.recompile_limit = 40
        # In place: torch.compile(model) would put its own prefix before every saved key.
        model.compile(dynamic=False, mode="reduce-overhead" if compiled == "cuda_graphs" else None)
    if ranks.world_size == 1:
        return model
    # Not idist.auto_model: one process that sees several GPUs would silently become DataParallel. Buffers stay a
    # rank's own and are averaged before they are used (`average_statistics`).
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # Not where some of the backward passes are not reduced, nor where the compiler draws the graph.
        static_graph=accumulate == 1 and not compiled,
    )
    if compress_gradients:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def warm_up_ddp_buckets(wrapped: nn.Module, images: Tensor) -> None:
    """Let DistributedDataParallel settle the order of its gradients in the buckets that are summed, changing nothing.

    It does so after a process's first two backward passes. Without these a resumed run's first sums would have another
    order than the same ones of the run left alone, and of three ranks or more other last bits.

    Args:
        images: any that the network can be trained on, as many as ghost batches allow.
    """
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return
    before = {name: buffer.clone() for name, buffer in wrapped.module.named_buffers()}
    training = wrapped.training
    wrapped.train()
    for _ in range(2):
        wrapped(images).sum().backward()
        wrapped.zero_grad(set_to_none=True)
    wrapped.train(training)
    with torch.no_grad():
        for name, buffer in wrapped.module.named_buffers():
            buffer.copy_(before[name])


def own_statistics(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The running statistics of BatchNorm that are this rank's own, by their names in the state; none on one rank."""
    if ranks.world_size == 1:
        return {}
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


@torch.no_grad()
def averaged_statistics(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The mean of `own_statistics` over all ranks."""
    own = own_statistics(model, ranks)
    if not own:
        return {}
    # In float64 the mean of equal values is that value, on any number of ranks.
    flat = torch.cat([buffer.double().flatten() for buffer in own.values()])
    dist.all_reduce(flat)
    flat /= ranks.world_size
    means = flat.split([buffer.numel() for buffer in own.values()])
    return {name: mean.view_as(own[name]).to(own[name].dtype) for name, mean in zip(own, means, strict=True)}


def average_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Average the running statistics of BatchNorm over all ranks, in place."""
    model.load_state_dict(averaged_statistics(model, ranks), strict=False)
