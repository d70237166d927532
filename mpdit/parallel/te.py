"""Transformer Engine's linears, norm and attention, declared and sharded as this project's own (linears.py,
attention.py).

te.pytorch itself, not Megatron's wrappers of it: those draw a whole weight on the CPU before they shard it, hand TE the
context-parallel group (Ulysses is ours), and take other arguments in 0.16 than in 0.19. Imported where
``parallel.backend`` is te, and nowhere else.

In FP8 a pass through a stage in training runs in one autocast (:func:`forward_pass`): with delayed scaling TE reduces
what it has seen where the outermost one ends, so there may be one alone. A linear that is to stay in bf16 steps out of
it, and so do norms and attention. Passes without gradients (validation, pictures) are in bf16: their batches have any
size.

Shapes: S tokens (this rank's, under sequence parallelism), L others, B samples, D width, H heads, d head_dim.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn
from transformer_engine.common import recipe as recipes

from mpdit.config import Config
from mpdit.mup.roles import declare, matrix, vector
from mpdit.parallel import attention, fp8, fp8_rules, tokens
from mpdit.parallel.context import Context
from mpdit_kernels.modulate import gated_residual

Autocast = contextlib.AbstractContextManager[Any]


@functools.cache
def recipe(name: str) -> Any:
    """TE's recipe of a value of ``parallel.fp8_recipe``."""
    form = {"hybrid": recipes.Format.HYBRID, "e4m3": recipes.Format.E4M3}[fp8_rules.number_format(name)]
    if name == "delayed":
        history = {"amax_history_len": fp8_rules.AMAX_HISTORY, "amax_compute_algo": fp8_rules.AMAX_ALGORITHM}
        return recipes.DelayedScaling(fp8_format=form, **history)
    kinds = {
        "tensorwise": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }
    return kinds[name](fp8_format=form)


def _in_fp8(config: Config) -> Autocast:
    # As Megatron has it: all ranks that hold parts of the same layer, or see other samples, scale alike.
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    return te.autocast(enabled=True, recipe=recipe(config.parallel.fp8_recipe), amax_reduction_group=group)


def _in_bf16(config: Config) -> Autocast:
    if config.parallel.precision != "fp8":
        return contextlib.nullcontext()
    return te.autocast(enabled=False, recipe=recipe(config.parallel.fp8_recipe))


def forward_pass(ctx: Context) -> Autocast:
    """What a stage's forward pass runs in: FP8 where gradients are to follow."""
    if ctx.config.parallel.precision != "fp8" or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    return _in_fp8(ctx.config)


def recomputed(ctx: Context, block: nn.Module, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`block(*streams)`, of which only the streams are kept; in FP8 by TE, which scales as the first time."""
    if ctx.config.parallel.precision != "fp8":
        return tensor_parallel.checkpoint(block, False, *streams)
    return te.checkpoint(block, *streams, get_rng_state_tracker=tensor_parallel.get_cuda_rng_tracker)


def _leave(weight: Tensor) -> None:
    """Weights are drawn by mpdit.parallel.init."""


class _Linear(te.Linear):
    def __init__(
        self, ctx: Context, fan_in: int, fan_out: int, parallel_mode: str, *, bias: bool = True, gain: float = 1.0
    ) -> None:
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(
            int(fan_in),
            int(fan_out),
            sequence_parallel=ctx.megatron.sequence_parallel,
            tp_group=group,
            tp_size=group.size(),
            init_method=_leave,
            bias=bias,
            params_dtype=ctx.dtype,
            parallel_mode=parallel_mode,
            device="cpu",
        )
        self.ctx = ctx
        self.quantised = ctx.fp8
        self.is_first_microbatch = True  # set by Megatron's schedules: then the FP8 weights are made anew
        for parameter in self.parameters():
            parameter.allreduce = True  # over the data ranks, as Megatron marks its own
        weight = matrix(fan_out, fan_in, gain=gain)
        declare(self, weight=weight, **({"bias": vector(fan_out)} if bias else {}))

    def forward(self, x_SBD: Tensor) -> Tensor:
        first = self.is_first_microbatch if self.quantised else None
        self.is_first_microbatch = False
        with contextlib.nullcontext() if self.quantised else _in_bf16(self.ctx.config):
            return super().forward(x_SBD, is_first_microbatch=first)


class ColumnLinear(_Linear):
    """[S, B, fan_in] whole -> [S, B, fan_out / tp]: this rank's outputs. Under SP the input is gathered along S."""

    def __init__(self, ctx: Context, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        super().__init__(ctx, fan_in, fan_out, "column", bias=bias)


class RowLinear(_Linear):
    """[S, B, fan_in / tp] -> [S, B, fan_out] summed over the tensor ranks. Under SP the output is scattered along S."""

    def __init__(self, ctx: Context, fan_in: int, fan_out: int, *, gain: float = 1.0) -> None:
        super().__init__(ctx, fan_in, fan_out, "row", gain=gain)


class WholeLinear(ColumnLinear):
    """[S, B, fan_in] -> [S, B, fan_out]: its outputs are sharded, then put together on every rank again."""

    def forward(self, x_SBD: Tensor) -> Tensor:
        y_SBD = super().forward(x_SBD)
        return tokens.scatter(self.ctx, tensor_parallel.gather_from_tensor_model_parallel_region(y_SBD))


class LayerNorm(te.LayerNorm):
    """With gain and bias [D]. On a slice of the tokens their gradients are partial; Megatron sums those so marked."""

    def __init__(self, ctx: Context, *, tokens_sharded: bool = True, eps: float = 1e-5) -> None:
        partial = tokens_sharded and ctx.megatron.sequence_parallel
        super().__init__(int(ctx.width), eps=eps, sequence_parallel=partial, dtype=ctx.dtype, device="cpu")
        self.ctx = ctx
        declare(self, weight=vector(ctx.width, fill=1.0), bias=vector(ctx.width))

    def forward(self, x_SBD: Tensor) -> Tensor:
        with _in_bf16(self.ctx.config):
            return super().forward(x_SBD)

    def of_sum(self, x_SBD: Tensor, branch_SBD: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """x + multiplier * branch, and its norm."""
        sum_SBD = gated_residual(x_SBD, None, branch_SBD, multiplier)
        return sum_SBD, self(sum_SBD)


class Attention(attention.Attention):
    """As this project's, heads exchanged for tokens by it, but attended by TE (cuDNN or flash attention)."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        model, parallel = ctx.config.model, ctx.config.parallel
        self.ctx = ctx
        self.core = te.DotProductAttention(
            model.width // model.head_dim // (parallel.tp * parallel.cp),
            model.head_dim,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="no_mask",
            attention_type="cross",  # queries and keys need not be as many
            softmax_scale=self.softmax_scale,
        )

    def attend(self, q_SBHd: Tensor, k_LBHd: Tensor, v_LBHd: Tensor) -> Tensor:
        with _in_bf16(self.ctx.config):
            return self.core(q_SBHd, k_LBHd, v_LBHd).unflatten(-1, q_SBHd.shape[2:])


def accumulate_in_buffers(stage: nn.Module) -> None:
    """Let TE's products add to DDP's fp32 gradient buffers themselves, without rounding to bf16 in between."""
    for layer in stage.modules():
        if isinstance(layer, _Linear):
            layer.fuse_wgrad_accumulation = True


# ---- delayed scaling: what a layer has seen --------------------------------------------------------------------------
# TE keeps two states: of input, weight and output, and of the gradients of output and input. What is neither an input
# nor a weight nor an output's gradient is not quantised here, and its numbers stay as they are at first.

_FORWARD, _BACKWARD = "scaling_fwd", "scaling_bwd"


def scales(ctx: Context, stages: Sequence[nn.Module]) -> dict[str, dict[str, Tensor]]:
    """See :func:`backend.scales`: of x, w and dy, as :mod:`mpdit.parallel.fp8` has them."""
    found = {}
    for name, layer in _scaled(ctx, stages):
        (scale, history), (scale_back, history_back) = (
            layer.get_fp8_meta_tensors()[key] for key in (_FORWARD, _BACKWARD)
        )
        values = torch.cat([history[:, :2], history_back[:, :1]], 1), torch.cat([scale[:2], scale_back[:1]])
        found[name] = dict(zip(fp8.STATE, values, strict=True))
    return found


def set_scales(ctx: Context, stages: Sequence[nn.Module], kept: Mapping[str, Mapping[str, Tensor]]) -> None:
    """See :func:`backend.set_scales`."""
    for name, layer in _scaled(ctx, stages):
        if set(fp8.STATE) <= kept.get(name, {}).keys():
            history, scale = (kept[name][kind] for kind in fp8.STATE)
            forward, backward = layer.fp8_meta[_FORWARD], layer.fp8_meta[_BACKWARD]
            forward.scale[:2], backward.scale[:1] = scale[:2], scale[2:]
            forward.amax_history[:, :2], backward.amax_history[:, :1] = history[:, :2], history[:, 2:]


def remembered(ctx: Context, stages: Sequence[nn.Module]) -> list[Tensor]:
    """The tensors themselves that TE writes its scales and histories into: they are the same ones throughout."""
    states = [layer.fp8_meta[key] for _, layer in _scaled(ctx, stages) for key in (_FORWARD, _BACKWARD)]
    return [tensor for state in states for tensor in (state.scale, state.amax_history)]


def _scaled(ctx: Context, stages: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """(the weight's name, layer) of those that keep scales from step to step, which they then have."""
    for stage in stages if fp8_rules.remembers(ctx.config) else ():
        for name, layer in stage.named_modules():
            if isinstance(layer, _Linear) and layer.quantised:
                with torch.no_grad(), _in_fp8(ctx.config):
                    layer.init_fp8_metadata()  # as its first pass would; otherwise nothing
                yield f"{name.removeprefix('module.')}.weight", layer
