"""What Transformer Engine's FP8 linears cost, for stages on tensors without memory: what is multiplied, kept and sent.

A stand-in for te.Linear, in its place in :mod:`imagined`'s layouts. It makes the casts, products and exchanges of TE
2.20 (pytorch/module/linear.py) and keeps what TE keeps: of the input a byte a number, transposed for cuBLAS where it
need not be gathered again, and of the weight two copies of a byte, which stay over the micro-batches of a step.

An estimate: amaxes, scales of blocks and what kernels fuse are left out, and every recipe is taken for one with a scale
a tensor on Hopper.

T rows (tokens x samples) of this rank, K inputs, N outputs of its part of the layer.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn

from mpdit.config import Config
from mpdit.parallel import fp8_rules, linears, tokens
from mpdit.parallel.stages import Stage

_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def take_place(config: Config, stage: Stage) -> None:
    """Let the FP8 linears of `stage`, built of this project's own, cost what Transformer Engine's do."""
    for index, block in stage.blocks.items():
        if config.parallel.precision == "fp8" and fp8_rules.quantised(config, int(index)):
            for module in block.modules():
                if isinstance(module, linears.ColumnLinear | linears.RowLinear):
                    _take(module)


def copies(module: nn.Module) -> list[Tensor]:
    """The FP8 weights under `module`, which lie beside its own from step to step."""
    return [copy for one in module.modules() for copy in getattr(one, "fp8_copies", ())]


def _take(module: Any) -> None:
    row, sp = isinstance(module, linears.RowLinear), module.ctx.megatron.sequence_parallel
    w_NK = module.weight.detach().to(_FORWARD)
    module.fp8_copies = (w_NK, w_NK.t().contiguous())

    def forward(x: Tensor) -> Tensor:
        y = _Linear.apply(x, module.weight, module.fp8_copies, row, sp)
        if module.bias is not None:
            y = y + module.bias
        if isinstance(module, linears.WholeLinear):
            y = tokens.scatter(module.ctx, tensor_parallel.gather_from_tensor_model_parallel_region(y))
        return y

    module.forward = forward


class _Linear(torch.autograd.Function):
    """x [..., K] -> [..., N]. `row`: of a row-parallel layer; `sp`: tensor ranks share the tokens between layers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, copies: tuple[Tensor, Tensor], row: bool, sp: bool
    ) -> Tensor:
        ctx.copies, ctx.row, ctx.sp, ctx.shape = copies, row, sp, x.shape
        x_TK = x.flatten(0, -2).to(_FORWARD)
        gathers = sp and not row
        ctx.save_for_backward(x_TK if gathers else x_TK.t().contiguous())
        y_TN = _product(_gathered(x_TK) if gathers else x_TK, copies[0].t())
        return (_summed(y_TN, scatter=sp) if row else y_TN).unflatten(0, (-1, *x.shape[1:-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        dy_TN = grads[0].flatten(0, -2).to(_BACKWARD)
        if ctx.row and ctx.sp:
            dy_TN = _gathered(dy_TN)
        x_KT = _gathered(kept).t().contiguous() if ctx.sp and not ctx.row else kept
        dx_TK = _product(dy_TN, ctx.copies[1].t())
        dw_NK = _product(dy_TN.t().contiguous(), x_KT.t())
        dx_TK = dx_TK if ctx.row else _summed(dx_TK, scatter=ctx.sp)
        return dx_TK.view(ctx.shape), dw_NK, None, None, None


def _product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    one = torch.ones((), device=a_MK.device)
    return torch._scaled_mm(a_MK, b_KN, one, one, out_dtype=torch.bfloat16)


def _group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def _gathered(x_TK: Tensor) -> Tensor:
    whole = x_TK.new_empty(x_TK.shape[0] * _group().size(), x_TK.shape[1])
    dist.all_gather_into_tensor(whole, x_TK, group=_group())
    return whole


def _summed(y_TN: Tensor, *, scatter: bool) -> Tensor:
    if _group().size() == 1:
        return y_TN
    if scatter:
        part = y_TN.new_empty(y_TN.shape[0] // _group().size(), y_TN.shape[1])
        dist.reduce_scatter_tensor(part, y_TN, group=_group())
        return part
    dist.all_reduce(y_TN, group=_group())
    return y_TN
