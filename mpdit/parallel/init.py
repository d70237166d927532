"""Initial weights are f(seed, parameter name, global shape), then sliced: the same in every layout."""

import hashlib

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from mpdit.mup.roles import Role, Tag
from mpdit.mup.table import Entry, Table


def full_value(name: str, entry: Entry, seed: int) -> Tensor:
    """The whole initial value of a parameter, fp32 on the CPU, shape ``entry.tag.shape``."""
    tag, std = entry.tag, entry.rule.init_std
    if tag.role is Role.VECTOR:
        return torch.full(tag.shape, tag.fill)
    if std == 0.0:
        return torch.zeros(tag.shape)
    key = hashlib.blake2b(f"{seed}/{name}/{tag.shape}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.randn(tag.shape, generator=generator) * std


def sharded_dim(parameter: Tensor) -> int | None:
    """The dimension along which tensor ranks hold parts of a parameter; None if each holds it whole."""
    return getattr(parameter, "partition_dim") if getattr(parameter, "tensor_model_parallel", False) else None  # noqa: B009


def shard(whole: Tensor, parameter: nn.Parameter, tag: Tag) -> Tensor:
    """This tensor rank's part of a `whole` value for `parameter`."""
    dim = sharded_dim(parameter)
    if dim is not None:
        size = parallel_state.get_tensor_model_parallel_world_size()
        whole = whole.chunk(size, dim)[parallel_state.get_tensor_model_parallel_rank()]
    if whole.shape != parameter.shape:
        raise ValueError(
            f"{tag.shape} gives a shard {tuple(whole.shape)}, but the parameter is {tuple(parameter.shape)}"
        )
    return whole


def whole(shard: Tensor, parameter: nn.Parameter) -> Tensor:
    """The inverse of :func:`shard` for something of `parameter`'s shape; collective over the tensor ranks."""
    dim = sharded_dim(parameter)
    if dim is None:
        return shard
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    torch.distributed.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, dim)


@torch.no_grad()
def initialise(model: nn.Module, table: Table, seed: int) -> None:
    """Give every parameter of a stage its initial value, and every readout its forward multiplier, from the table."""
    for name, parameter in model.named_parameters():
        parameter.copy_(shard(full_value(name, table[name], seed), parameter, table[name].tag))
    for prefix, module in model.named_modules():
        if hasattr(module, "multiplier"):
            module.multiplier = table[f"{prefix}.weight"].rule.multiplier
