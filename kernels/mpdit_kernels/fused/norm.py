"""Layer norm with modulation or affine, alone or of a sum with a branch: autograd around jit/norm.py."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpdit_kernels.fused.jit.norm import norm_backward, norm_forward
from mpdit_kernels.fused.launch import (
    Rows,
    chunks_of,
    dense,
    few_rows,
    launch,
    processors,
    promoted,
    require_known,
    sums_over_rows,
    vector_of,
)


def _warps(block: int, numbers: int) -> int:
    """So that a thread holds about `numbers` numbers of a row."""
    return max(1, min(16, block // (32 * numbers)))


class NormModulate(torch.autograd.Function):
    """(x, branch, gate, shift, scale) -> y, or (r, y) with a branch. Shapes: modulate.py's, all of three dimensions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        multiplier: float,
        eps: float,
        base: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        given = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
        for name, tensor in given.items():
            if tensor is not None:
                require_known(name, tensor)
        x, shift, scale = dense(x), dense(shift), dense(scale)
        branch, gate = (None if t is None else dense(t) for t in (branch, gate))
        modulations = [t for t in (shift, scale, gate) if t is not None]
        D, layout = x.shape[-1], Rows.of(x, modulations)
        sum_type = promoted(x, branch, gate)
        r = None if branch is None else torch.empty(x.shape, dtype=sum_type, device=x.device)
        out = torch.empty(x.shape, dtype=promoted(x, branch, *modulations), device=x.device)
        stats = torch.empty(layout.groups, layout.rows, 2, dtype=torch.float32, device=x.device)
        strides = [
            *layout.strides(x),
            *((0, 0) if branch is None else layout.strides(branch)),
            0 if gate is None else layout.strides(gate)[0],
            layout.strides(shift)[0],
            layout.strides(scale)[0],
            *layout.strides(out),
        ]
        vector, block = vector_of([D, *strides]), triton.next_power_of_2(D)
        warps = _warps(block, 16)
        # Enough rows a program to keep the modulation for, few enough that programs hide each other's waiting.
        programs = processors(x.device) * 128 // warps
        chunk = few_rows(layout.groups, layout.rows, programs=programs, most=16)
        chunks = triton.cdiv(layout.rows, chunk)
        launch(
            norm_forward,
            layout.groups * chunks,
            *(x, branch, gate, shift, scale, r, out, stats, layout.rows, chunks, chunk),
            *(stride // vector for stride in strides),
            *(multiplier, eps),
            D=D,
            BLOCK=block,
            VECTOR=vector,
            BASE=base,
            STAGES=3 if branch is None else 2,
            warps=warps,
        )
        ctx.save_for_backward(x if r is None else r, None if gate is None else branch, gate, shift, scale, stats)
        ctx.settings = layout, multiplier, base, x.dtype, None if branch is None else branch.dtype
        return out if r is None else (r, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        r, branch, gate, shift, scale, stats = ctx.saved_tensors
        layout, multiplier, base, x_type, branch_type = ctx.settings
        d_summed, d_out = (None if branch_type is None else dense(gradients[0])), dense(gradients[-1])
        dx = torch.empty(r.shape, dtype=x_type, device=r.device)
        d_branch = None if branch_type is None else torch.empty(r.shape, dtype=branch_type, device=r.device)
        strides = [
            *layout.strides(r),
            *((0, 0) if branch is None else layout.strides(branch)),
            0 if gate is None else layout.strides(gate)[0],
            layout.strides(scale)[0],
            *((0, 0) if d_summed is None else layout.strides(d_summed)),
            *layout.strides(d_out),
            *layout.strides(dx),
        ]
        D = r.shape[-1]
        vector, block = vector_of([D, *strides]), triton.next_power_of_2(D)
        warps = _warps(block, 8)
        chunks = chunks_of(layout.groups, layout.rows, programs=processors(r.device) * 16 // warps)
        kinds = 2 if gate is None else 3
        partial = torch.empty(kinds, layout.groups, chunks, D, dtype=torch.float32, device=r.device)
        launch(
            norm_backward,
            layout.groups * chunks,
            *(r, branch, gate, scale, stats, d_summed, d_out, dx, d_branch, partial),
            *(layout.rows, chunks, triton.cdiv(layout.rows, chunks)),
            *(stride // vector for stride in strides),
            multiplier,
            D=D,
            BLOCK=block,
            VECTOR=vector,
            BASE=base,
            STAGES=2 if d_summed is None else 1,
            REREAD=d_summed is not None and block > 4096,
            warps=warps,
        )
        d_shift, d_scale, d_gate = sums_over_rows(partial, [shift, scale, gate])
        return dx, d_branch, d_gate, d_shift, d_scale, None, None, None


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    y: Tensor = NormModulate.apply(x, None, None, shift, scale, 1.0, eps, 1.0)
    return y


def sum_norm_modulate(
    x: Tensor, gate: Tensor | None, branch: Tensor, shift: Tensor, scale: Tensor, multiplier: float, eps: float
) -> tuple[Tensor, Tensor]:
    r, y = NormModulate.apply(x, branch, gate, shift, scale, multiplier, eps, 1.0)
    return r, y


def norm_affine(x: Tensor, gain_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    y: Tensor = NormModulate.apply(x, None, None, bias_D[None, None], gain_D[None, None], 1.0, eps, 0.0)
    return y


def sum_norm_affine(
    x: Tensor, branch: Tensor, gain_D: Tensor, bias_D: Tensor, multiplier: float, eps: float
) -> tuple[Tensor, Tensor]:
    r, y = NormModulate.apply(x, branch, None, bias_D[None, None], gain_D[None, None], multiplier, eps, 0.0)
    return r, y
