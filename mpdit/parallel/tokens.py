"""Where the tokens are: whole, this context rank's share, or this tensor rank's share under sequence parallelism.

Models call these by name and never ask how many ranks there are; each is the identity where there is nothing to split.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core import tensor_parallel as tp
from torch import Tensor

from mpdit.parallel.context import Context


def own_context(x_S: Tensor) -> Tensor:
    """This context rank's contiguous share of the tokens (dim 0) of something whole. Constant inputs, or lookups whose
    gradients are averaged over the context ranks anyway."""
    size = parallel_state.get_context_parallel_world_size()
    return x_S if size == 1 else x_S.chunk(size)[parallel_state.get_context_parallel_rank()]


def scatter(ctx: Context, x_SBD: Tensor) -> Tensor:
    """Into the blocks: under SP, this tensor rank's share of the tokens; the gradient is gathered."""
    return tp.scatter_to_sequence_parallel_region(x_SBD) if ctx.megatron.sequence_parallel else x_SBD


def gather(ctx: Context, x_SBD: Tensor) -> Tensor:
    """Out of the blocks: whole tokens for a readout that every tensor rank computes alike."""
    if not ctx.megatron.sequence_parallel:
        return x_SBD
    return tp.gather_from_sequence_parallel_region(x_SBD, tensor_parallel_output_grad=False)


def whole_input(ctx: Context, x_SBD: Tensor) -> Tensor:
    """What every tensor rank multiplies by its own part of a column-parallel weight; the gradient is summed."""
    if ctx.config.parallel.tp == 1:
        return x_SBD
    if ctx.megatron.sequence_parallel:
        return tp.gather_from_sequence_parallel_region(x_SBD)
    return tp.copy_to_tensor_model_parallel_region(x_SBD)


def summed_output(ctx: Context, y_SBD: Tensor) -> Tensor:
    """The sum of what each tensor rank has made with its part of a row-parallel weight; under SP this rank's tokens."""
    if ctx.megatron.sequence_parallel:
        return tp.reduce_scatter_to_sequence_parallel_region(y_SBD)
    return tp.reduce_from_tensor_model_parallel_region(y_SBD)


class _JoinContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_S: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        shares = [torch.empty_like(x_S) for _ in range(group.size())]
        dist.all_gather(shares, x_S.contiguous(), group=group)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole.chunk(ctx.group.size())[ctx.group.rank()], None


def join_context(x_S: Tensor) -> Tensor:
    """All context ranks' tokens, in order, on each of them; what each makes of them adds to the gradient."""
    group = parallel_state.get_context_parallel_group()
    return x_S if group.size() == 1 else _JoinContext.apply(x_S, group)
