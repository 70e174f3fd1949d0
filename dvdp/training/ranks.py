"""Several ranks: each with the whole network, or with a share of its weights (FSDP).

Whole tensors are what checkpoints hold, so that a run goes on with any number of ranks, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dvdp.config import Precision
from dvdp.models.unet import Stage


def replicate(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The same network on each rank.

    Gradients are exchanged in buckets, while the backward pass goes on to the layers before: of a compiled network too,
    as torch.compile cuts it at the buckets of the module that calls it.
    """
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        # Otherwise it regroups the gradients after its first step, and a resumed run adds in another order.
        find_unused_parameters=True,
    )


def shard(network: nn.Module, device: torch.device, precision: Precision) -> None:
    """Spread the fp32 weights of a network over all ranks, in place and to the device.

    The weights of a stage are whole while it computes, in the precision; its gradients are added up over ranks in fp32,
    after each part of a step, while the backward pass goes on to the stage before.

    Args:
        network: on the host. It and its stages are called by all ranks alike.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)
    computed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*stages(network), network):
        # What stays whole after a forward pass without gradients would be drawn with when the weights have moved on.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=computed)


def stages(network: nn.Module) -> list[Stage]:
    """Of a UNet, or of the UNets of all levels."""
    return [module for module in network.modules() if isinstance(module, Stage)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over ranks, which all call this; any other as it is."""
    found: Tensor = tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def share_like(tensor: Tensor, like: Any) -> Tensor:
    """This rank's share of a whole tensor where ``like`` is spread over ranks; else the tensor."""
    if not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Each rank has the whole one: nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on rank 0, none on others; all call this. One at a time is whole on a device, then on the host."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if not dist.is_initialized() or dist.get_rank() == 0:
            found[name] = gathered.cpu() if _is_sharded(tensor) else gathered
    return found


def _is_sharded(tensor: Any) -> bool:
    # Importing DTensor takes a second, which one rank need not wait.
    return hasattr(tensor, "full_tensor")
