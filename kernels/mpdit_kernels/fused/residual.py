"""The residual sum with a gated branch: autograd around jit/residual.py."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpdit_kernels.fused.jit.residual import residual_backward, residual_forward
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


def _block(D: int) -> int:
    """Columns of a program: the more the better, unless much of the last block were beyond D."""
    padded = {block: triton.cdiv(D, block) * block for block in (1024, 512, 256)}
    return next((block for block, width in padded.items() if width <= 1.15 * D), 256)


class GatedResidual(torch.autograd.Function):
    """(x, gate, branch) -> x + multiplier * gate * branch. Shapes: modulate.py's, all of three dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor, multiplier: float) -> Tensor:
        for name, tensor in {"x": x, "gate": gate, "branch": branch}.items():
            require_known(name, tensor)
        x, gate, branch = dense(x), dense(gate), dense(branch)
        D, layout = x.shape[-1], Rows.of(x, [gate])
        out = torch.empty(x.shape, dtype=promoted(x, gate, branch), device=x.device)
        strides = [
            *layout.strides(x),
            layout.strides(gate)[0],
            *layout.strides(branch),
            *layout.strides(out),
        ]
        vector, block = vector_of([D, *strides]), _block(D)
        blocks = triton.cdiv(D, block)
        programs = processors(x.device) * 128 // blocks
        chunk = few_rows(layout.groups, layout.rows, programs=programs, most=8)
        chunks = triton.cdiv(layout.rows, chunk)
        launch(
            residual_forward,
            layout.groups * chunks * blocks,
            *(x, gate, branch, out, layout.rows, chunks, chunk),
            *(stride // vector for stride in strides),
            multiplier,
            D=D,
            BLOCK=block,
            VECTOR=vector,
            warps=block // 256,
        )
        ctx.save_for_backward(gate, branch)
        ctx.settings = layout, multiplier, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch = ctx.saved_tensors
        layout, multiplier, x_type = ctx.settings
        d_out = dense(gradients[0])
        d_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
        strides = [
            layout.strides(gate)[0],
            *layout.strides(branch),
            *layout.strides(d_out),
            *layout.strides(d_branch),
        ]
        D = branch.shape[-1]
        vector, block = vector_of([D, *strides]), _block(D)
        blocks = triton.cdiv(D, block)
        warps = block // 256
        programs = max(1, processors(branch.device) * 32 // (warps * blocks))
        chunks = chunks_of(layout.groups, layout.rows, programs=programs)
        partial = torch.empty(1, layout.groups, chunks, D, dtype=torch.float32, device=branch.device)
        launch(
            residual_backward,
            layout.groups * chunks * blocks,
            *(gate, branch, d_out, d_branch, partial),
            *(layout.rows, chunks, triton.cdiv(layout.rows, chunks)),
            *(stride // vector for stride in strides),
            multiplier,
            D=D,
            BLOCK=block,
            VECTOR=vector,
            warps=warps,
        )
        (d_gate,) = sums_over_rows(partial, [gate])
        return gradients[0].to(x_type), d_gate, d_branch, None


def residual(x: Tensor, gate: Tensor | None, branch: Tensor, multiplier: float) -> Tensor:
    if gate is None:  # PyTorch does it in one pass
        return torch.add(x, branch, alpha=multiplier)
    r: Tensor = GatedResidual.apply(x, gate, branch, multiplier)
    return r
