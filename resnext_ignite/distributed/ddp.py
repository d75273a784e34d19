"""Wraps a model in DistributedDataParallel (DDP), and averages its BatchNorm statistics over ranks."""

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
    """Return the module that a training iteration calls: the model itself for one rank, the model in DDP for several.

    Args:
        compiled: True: use torch.compile, which compiles for each image size when this size first occurs.
            "cuda_graphs": also record CUDA graphs, which need one fixed image size.
        accumulate: micro-batches per iteration.
        compress_gradients: send and sum the gradients as bf16.

    Raises:
        ConfigError: `sync_bn` or CUDA graphs are requested on a CPU; torch supports them on GPUs only.
    """
    if sync_bn:
        if device.type != "cuda":
            raise ConfigError("train.sync_bn: torch has a synchronised BatchNorm for GPUs only; set it to false")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compiled:
        if compiled == "cuda_graphs" and device.type != "cuda":
            raise ConfigError("train.compile: cuda_graphs is for GPUs only; set it to true or false")
        # Progressive resizing has at most 64 sizes (1024 pixels in steps of 16). By default, torch compiles for 8
        # sizes, then falls back to eager execution.
        torch._dynamo.config.recompile_limit = 72
        # Compile in place: torch.compile(model) would add a prefix to every key of the state dict.
        model.compile(dynamic=False, mode="reduce-overhead" if compiled == "cuda_graphs" else None)
    if ranks.world_size == 1:
        return model
    # Do not use idist.auto_model: with several visible GPUs and one process, it silently uses DataParallel.
    # broadcast_buffers=False: each rank has its own BatchNorm statistics. `average_statistics` averages them before an
    # evaluation.
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # static_graph is incompatible with no_sync (gradient accumulation) and torch.compile.
        static_graph=accumulate == 1 and not compiled,
    )
    if compress_gradients:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def warm_up_ddp_buckets(wrapped: nn.Module, images: Tensor) -> None:
    """Run two backward passes, so that DDP rebuilds its gradient buckets now; weights and buffers do not change.

    DDP rebuilds its buckets after the first two backward passes of a process. Without this warm-up, the first
    iterations after a resume would sum the gradients in a different order than the same iterations of an uninterrupted
    run. With three or more ranks, the results would differ in the last bits.

    Args:
        images: float32 (n, 3, H, W), any values; if the model has ghost batches, n must be a multiple of their size.
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
    """Return the BatchNorm running statistics of this rank, as a dict: state-dict name -> buffer.

    With a single rank, the dict is empty: there is nothing to average.
    """
    if ranks.world_size == 1:
        return {}
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


@torch.no_grad()
def averaged_statistics(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Return the mean of `own_statistics` over all ranks; call it on all ranks."""
    own = own_statistics(model, ranks)
    if not own:
        return {}
    # In float64, the mean of equal values is exactly that value, for any number of ranks.
    flat = torch.cat([buffer.double().flatten() for buffer in own.values()])
    dist.all_reduce(flat)
    flat /= ranks.world_size
    means = flat.split([buffer.numel() for buffer in own.values()])
    return {name: mean.view_as(own[name]).to(own[name].dtype) for name, mean in zip(own, means, strict=True)}


def average_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Average the BatchNorm running statistics over all ranks, in place; call it on all ranks."""
    model.load_state_dict(averaged_statistics(model, ranks), strict=False)
