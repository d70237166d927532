"""Linear layers, norms and tables that know their muP role and their place in a layout.

Shapes: S tokens (this rank's, under sequence parallelism), B samples, D width. A column-parallel weight is sharded over
its outputs, a row-parallel one over its inputs; both keep Megatron's names. Biases unless said otherwise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core import tensor_parallel as tp
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim, _reduce_scatter_along_first_dim
from torch import Tensor, nn

from mpdit.mup.roles import Group, declare, matrix, table, vector
from mpdit.parallel import fp8, tokens
from mpdit.parallel.context import Context
from mpdit_kernels.heads import head_norm
from mpdit_kernels.linear import linear
from mpdit_kernels.modulate import layer_norm, residual_layer_norm


def _mark_sharded(weight: nn.Parameter, dim: int) -> None:
    # megatron-core 0.16 tags a weight only where it initialises it. Untagged, its shards are left out of the gradient
    # norm on all tensor ranks but one.
    if not hasattr(weight, "tensor_model_parallel"):
        tp.set_tensor_model_parallel_attributes(weight, True, dim, 1)


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x [..., K], w [N, K], b [N] -> x w' + b, [..., N]


def _megatrons_or_plain(ctx: Context) -> Product | None:
    """How a rank multiplies; None: as Megatron does, whose communication between tensor ranks overlaps with it."""
    return linear if ctx.config.parallel.tp == 1 else None


def _product(ctx: Context, *sharded: fp8.Name) -> Product | None:
    """The same for hidden linears, which may be in FP8. `sharded`: which of x, w and dy, the gradient of the product,
    each tensor rank has a part of."""
    return fp8.product(ctx, frozenset(sharded)) if ctx.emulates_fp8 else _megatrons_or_plain(ctx)


class _OnCPU:
    """Of a Megatron linear: on a CPU, where communication overlaps with nothing, its products are :func:`linear`'s, as
    those of a rank alone are."""

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs["input"].is_cuda:
            y_SBD: Tensor = super()._forward_impl(*args, **kwargs)  # type: ignore[misc]
            return y_SBD
        x_SBD, weight, bias = kwargs["input"], kwargs["weight"], kwargs["bias"]
        if kwargs["sequence_parallel"]:
            return _GatheredLinear.apply(x_SBD, weight, bias)
        if kwargs["allreduce_dgrad"]:
            x_SBD = tp.copy_to_tensor_model_parallel_region(x_SBD)
        return linear(x_SBD, weight, bias)


class _GatheredLinear(torch.autograd.Function):
    """Of this rank's tokens, joined before the product; they are joined again for the gradient, not kept, as Megatron
    does it."""

    @staticmethod
    def forward(ctx: Any, x_SBD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_SBD, weight)
        return linear(_joined(x_SBD), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x_SBD, weight = ctx.saved_tensors
        dy_TN = grads[0].flatten(0, -2)
        dw_ND = linear(dy_TN.T, _joined(x_SBD).flatten(0, -2).T)
        group = parallel_state.get_tensor_model_parallel_group()
        dx_SBD = _reduce_scatter_along_first_dim(linear(grads[0], weight.T), group)
        return dx_SBD, dw_ND, dy_TN.sum(0) if ctx.needs_input_grad[2] else None


def _joined(x_SBD: Tensor) -> Tensor:
    whole_SBD: Tensor = _gather_along_first_dim(x_SBD, parallel_state.get_tensor_model_parallel_group())
    return whole_SBD


class ColumnLinear(_OnCPU, tp.ColumnParallelLinear):
    """[S, B, fan_in] whole -> [S, B, fan_out / tp]: this rank's outputs. Under SP the input is gathered along S."""

    def __init__(self, ctx: Context, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        super().__init__(fan_in, fan_out, config=ctx.megatron, init_method=None, bias=bias, gather_output=False)
        self.ctx, self.product = ctx, _product(ctx, "w", "dy")
        _mark_sharded(self.weight, 0)
        declare(self, weight=matrix(fan_out, fan_in), **({"bias": vector(fan_out)} if bias else {}))

    def forward(self, x_SBD: Tensor) -> Tensor:
        if self.product is None:
            return super().forward(x_SBD)[0]
        return self.product(tokens.whole_input(self.ctx, x_SBD), self.weight, self.bias)


class RowLinear(_OnCPU, tp.RowParallelLinear):
    """[S, B, fan_in / tp] -> [S, B, fan_out] summed over the tensor ranks. Under SP the output is scattered along S."""

    def __init__(self, ctx: Context, fan_in: int, fan_out: int, *, gain: float = 1.0) -> None:
        super().__init__(
            fan_in,
            fan_out,
            config=ctx.megatron,
            init_method=None,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        self.ctx, self.product = ctx, _product(ctx, "x", "w")
        _mark_sharded(self.weight, 1)
        declare(self, weight=matrix(fan_out, fan_in, gain=gain), bias=vector(fan_out))

    def forward(self, x_SBD: Tensor) -> Tensor:
        if self.product is None:
            return super().forward(x_SBD)[0]
        if self.ctx.config.parallel.tp == 1:
            return self.product(x_SBD, self.weight, self.bias)
        return tokens.summed_output(self.ctx, self.product(x_SBD, self.weight, None)) + self.bias


class WholeLinear(ColumnLinear):
    """[S, B, fan_in] -> [S, B, fan_out]: its outputs are sharded, then put together on every rank again."""

    def forward(self, x_SBD: Tensor) -> Tensor:
        y_SBD = super().forward(x_SBD)
        return tokens.scatter(self.ctx, tp.gather_from_tensor_model_parallel_region(y_SBD))


class Modulation(_OnCPU, tp.ColumnParallelLinear):
    """adaLN: conditioning [1, B, D] -> `parts` tensors [1, B, D]. A third of an MMDiT's weights, so sharded under TP.

    The conditioning is whole on every rank, so the layer takes a config without sequence parallelism. Under SP what it
    makes multiplies a slice of the tokens, and its gradient is partial: it is summed over the tensor ranks
    (`tokens_sharded`), except at the readout, where the tokens are whole again.
    """

    def __init__(self, ctx: Context, parts: int, *, tokens_sharded: bool = True) -> None:
        config = dataclasses.replace(ctx.megatron, sequence_parallel=False)
        super().__init__(ctx.width, parts * ctx.width, config=config, init_method=None, bias=True, gather_output=True)
        _mark_sharded(self.weight, 0)
        self.parts, self.product = parts, _megatrons_or_plain(ctx)
        self.sum_gradient = tokens_sharded and ctx.megatron.sequence_parallel
        gain = 0.0 if ctx.config.mup.adaln_init == "zero" else 1.0
        weight = matrix(parts * ctx.width, ctx.width, group=Group.MODULATION, gain=gain)
        declare(self, weight=weight, bias=vector(parts * ctx.width))

    def forward(self, cond_1BD: Tensor) -> tuple[Tensor, ...]:
        if self.product is not None:
            return self.product(cond_1BD, self.weight, self.bias).chunk(self.parts, -1)
        y = super().forward(cond_1BD)[0]
        if self.sum_gradient:
            y = tp.copy_to_tensor_model_parallel_region(y)
        return y.chunk(self.parts, -1)


class ScaleShift(nn.Module):
    """PixArt's adaLN-single: learned offsets [parts, D] to a modulation that all blocks share -> `parts` of [1, B, D].

    As in :class:`Modulation`, under SP the gradient of what multiplies a slice of the tokens is summed.
    """

    def __init__(self, ctx: Context, parts: int, *, tokens_sharded: bool = True) -> None:
        super().__init__()
        self.sum_gradient = tokens_sharded and ctx.megatron.sequence_parallel
        self.table = nn.Parameter(torch.empty(parts, ctx.width, dtype=ctx.dtype))
        declare(self, table=table(parts, ctx.width, gain=0.02))

    def forward(self, shared_NBD: Tensor) -> tuple[Tensor, ...]:
        """`shared_NBD` has a row for each part, or one for all."""
        y_NBD = shared_NBD + self.table[:, None]
        if self.sum_gradient:
            y_NBD = tp.copy_to_tensor_model_parallel_region(y_NBD)
        return y_NBD.split(1)


class ReplicatedLinear(nn.Linear):
    """A small linear that every tensor rank holds whole: embedders, on whole tokens."""

    def __init__(self, ctx: Context, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, dtype=ctx.dtype)
        declare(self, weight=matrix(fan_out, fan_in), bias=vector(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Readout(nn.Linear):
    """width -> finite: muP's output layer. The multiplier acts on the input and is set from the table."""

    def __init__(self, ctx: Context, fan_out: int, *, gain: float | None = None) -> None:
        super().__init__(ctx.width, fan_out, dtype=ctx.dtype)
        self.multiplier = 1.0
        if gain is None:
            gain = 0.0 if ctx.config.mup.readout_init == "zero" else 1.0
        declare(self, weight=matrix(fan_out, ctx.width, gain=gain), bias=vector(fan_out))

    def forward(self, x_SBD: Tensor) -> Tensor:
        return linear(x_SBD * self.multiplier, self.weight, self.bias)


class Table(nn.Embedding):
    """Learned vectors looked up by id: [rows, width]."""

    def __init__(self, ctx: Context, rows: int) -> None:
        super().__init__(rows, ctx.width, dtype=ctx.dtype)
        declare(self, weight=table(rows, ctx.width))


class Positions(nn.Module):
    """Learned positions [tokens, D], added to whole tokens [tokens, B, D] before they are shared out."""

    def __init__(self, ctx: Context, count: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(count, ctx.width, dtype=ctx.dtype))
        declare(self, table=table(count, ctx.width, gain=0.02))

    def forward(self, x_TBD: Tensor) -> Tensor:
        return x_TBD + self.table[:, None]


class LayerNorm(nn.LayerNorm):
    """With gain and bias [D]. On a slice of the tokens their gradients are partial; Megatron sums those so marked."""

    def __init__(self, ctx: Context, *, tokens_sharded: bool = True, eps: float = 1e-5) -> None:
        super().__init__(ctx.width, eps=eps, dtype=ctx.dtype)
        declare(self, weight=vector(ctx.width, fill=1.0), bias=vector(ctx.width))
        for parameter in self.parameters():
            parameter.sequence_parallel = tokens_sharded and ctx.megatron.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBD: Tensor, branch_SBD: Tensor | None = None, multiplier: float = 1.0) -> Any:
        if branch_SBD is None:
            return layer_norm(x_SBD, self.weight, self.bias, self.eps)
        return residual_layer_norm(x_SBD, branch_SBD, self.weight, self.bias, multiplier, self.eps)

    def of_sum(self, x_SBD: Tensor, branch_SBD: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """x + multiplier * branch, and its norm."""
        both: tuple[Tensor, Tensor] = self(x_SBD, branch_SBD, multiplier)  # with its hooks: Megatron's fetch weights
        return both


class HeadNorm(nn.Module):
    """RMSNorm of queries or keys over head_dim, with a gain shared by all heads.

    Must be named ``q_layernorm`` or ``k_layernorm``: a tensor rank sees its own heads only, and Megatron sums gains
    with these names over the tensor ranks when ``qk_layernorm`` is set.
    """

    def __init__(self, ctx: Context, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim, dtype=ctx.dtype))
        self.eps = eps
        declare(self, weight=vector(head_dim, fill=1.0))

    def forward(self, x_SBHd: Tensor) -> Tensor:
        return head_norm(x_SBHd, self.weight, self.eps)
