"""The layers that both backends have: this project's own over megatron-core, and Transformer Engine's.

Models build them by these names and never ask which they get. Names, global shapes, muP roles, initial values and the
marks by which Megatron reduces gradients are the same, so that checkpoints move between backends.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from mpdit.parallel import attention, fp8, linears
from mpdit.parallel.context import Context


def _te(ctx: Context) -> Any:
    """Transformer Engine's layers where ``parallel.backend`` is te: importing them takes seconds and needs CUDA."""
    if ctx.config.parallel.backend != "te":
        return None
    from mpdit.parallel import te

    return te


def ColumnLinear(ctx: Context, fan_in: int, fan_out: int, *, bias: bool = True) -> nn.Module:
    """[S, B, fan_in] whole -> [S, B, fan_out / tp]: see :class:`linears.ColumnLinear`."""
    return (_te(ctx) or linears).ColumnLinear(ctx, fan_in, fan_out, bias=bias)


def RowLinear(ctx: Context, fan_in: int, fan_out: int, *, gain: float = 1.0) -> nn.Module:
    """[S, B, fan_in / tp] -> [S, B, fan_out] summed over the tensor ranks: see :class:`linears.RowLinear`."""
    return (_te(ctx) or linears).RowLinear(ctx, fan_in, fan_out, gain=gain)


def WholeLinear(ctx: Context, fan_in: int, fan_out: int) -> nn.Module:
    """[S, B, fan_in] -> [S, B, fan_out], sharded within: see :class:`linears.WholeLinear`."""
    return (_te(ctx) or linears).WholeLinear(ctx, fan_in, fan_out)


class Norm(Protocol):
    """Of tokens [S, B, D], or of a sum of two such, which is given as well: (x + multiplier * branch, its norm)."""

    def __call__(self, x_SBD: Tensor) -> Tensor: ...
    def of_sum(self, x_SBD: Tensor, branch_SBD: Tensor, multiplier: float) -> tuple[Tensor, Tensor]: ...


def LayerNorm(ctx: Context, *, tokens_sharded: bool = True, eps: float = 1e-5) -> Norm:
    """With gain and bias: see :class:`linears.LayerNorm`."""
    norm: Norm = (_te(ctx) or linears).LayerNorm(ctx, tokens_sharded=tokens_sharded, eps=eps)
    return norm


def Attention(ctx: Context) -> nn.Module:
    """Of [S, B, H, d] to twice [L, B, H, d] -> [S, B, H * d]: see :class:`attention.Attention`."""
    return (_te(ctx) or attention).Attention(ctx)


def forward_pass(ctx: Context) -> contextlib.AbstractContextManager[Any]:
    """What a stage's forward pass runs in: FP8 in training, nothing otherwise."""
    te = _te(ctx)
    return te.forward_pass(ctx) if te else contextlib.nullcontext()


def recomputed(ctx: Context, block: nn.Module, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`block(*streams)`, of which only the streams are kept for the backward pass."""
    te = _te(ctx)
    if te:
        return te.recomputed(ctx, block, streams)
    return tensor_parallel.checkpoint(fp8.run_twice(block), False, *streams)


def accumulate_in_buffers(ctx: Context, stages: Sequence[nn.Module]) -> None:
    """Tell layers that can that their weights have DDP's gradient buffers."""
    for stage in stages if (te := _te(ctx)) else ():
        te.accumulate_in_buffers(stage)


# ---- what FP8 keeps beside the parameters ----------------------------------------------------------------------------


def scales(ctx: Context, stages: Sequence[nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The weight's name: kind (:data:`fp8.STATE`): fp32 tensor, of all that delayed scaling remembers under `stages`,
    bare or under DDP; the same on all ranks that hold the layer, in any layout and on either backend."""
    te = _te(ctx)
    return te.scales(ctx, stages) if te else fp8.state(stages)


def set_scales(ctx: Context, stages: Sequence[nn.Module], kept: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put back what :func:`scales` gave; what `kept` does not name stays as it is."""
    te = _te(ctx)
    if te:
        te.set_scales(ctx, stages, kept)
        return
    for name, kinds in fp8.state(stages).items():
        for kind, value in kinds.items():
            if kind in kept.get(name, {}):
                value.copy_(kept[name][kind])


class Undo:
    """What delayed scaling remembers under `stages`, as it was at the last :meth:`mark`. Costs nothing where nothing is
    remembered; no collectives, as the ranks of a layer agree before and after.

    Both backends move scales on at the end of each pass, in place: between steps nothing of a step is still to come.
    """

    def __init__(self, ctx: Context, stages: Sequence[nn.Module]) -> None:
        self._live = (_te(ctx) or fp8).remembered(ctx, stages)
        self._marked = [tensor.clone() for tensor in self._live]

    def mark(self) -> None:
        if self._live:  # torch refuses empty lists
            torch._foreach_copy_(self._marked, self._live)

    def back(self) -> None:
        if self._live:
            torch._foreach_copy_(self._live, self._marked)
