"""A model whose weights, gradients and optimiser's state lie in shards, one in each process: PyTorch's FSDP2."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from unveil.layers import CrossBlock, blocks_of


def shard(model: nn.Module, device: str) -> None:
    """Leave to each process of the group its part of every parameter, on its device; the names stay.

    A block's parameters come together when it is called, and what lies between the blocks when the model is. Every process
    must call the same ones in the same order. An optimiser for the model has to be made afterwards.

    Args:
        device: as "cuda:1"; a model on the CPU is brought there block by block.
    """
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for block in blocks_of(model):
        if isinstance(block, CrossBlock):
            fully_shard(block.cross_attn.kv, mesh=mesh)  # which is called apart from its block
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor: all of it, if it is not in shards."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """A tensor put together from all processes' parts, which all must ask for; itself, if it is not in shards."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def kept(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """A model's tensors as they are now, whole and on the CPU. All processes must ask for those of shards.

    Args:
        keep: whether this process wants them; it gets none if not.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        value = whole(value).detach()
        if keep:
            tensors[name] = value.to("cpu", copy=True)
    return tensors
