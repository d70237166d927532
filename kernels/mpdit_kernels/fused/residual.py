"""The residual sum with a gated branch: x + multiplier * gate * branch. No row needs all of its numbers at once, so a
program takes a block of columns: a chunk of one group's rows with the same piece of the gate."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpdit_kernels.fused.launch import (
    Rows,
    dense,
    launch,
    processors,
    promoted,
    require_known,
    rows_a_program,
    sums_over_rows,
    vector_of,
)


@triton.jit
def residual_forward(
    x,
    gate,
    branch,
    out,
    rows,
    chunks,  # of a group
    chunk_rows,
    x_group,
    x_row,
    gate_group,
    branch_group,
    branch_row,
    out_group,
    out_row,
    multiplier,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunk = tl.program_id(0) // blocks
    group = (chunk // chunks).to(tl.int64)
    first = chunk % chunks * chunk_rows
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    weight = tl.load(gate + group * gate_group * VECTOR + cols, mask=inside, other=0.0).to(tl.float32) * multiplier
    row = first.to(tl.int64)
    x += (group * x_group + row * x_row) * VECTOR
    branch += (group * branch_group + row * branch_row) * VECTOR
    out += (group * out_group + row * out_row) * VECTOR
    for _ in range(first, tl.minimum(first + chunk_rows, rows)):
        r = tl.load(x + cols, mask=inside, other=0.0).to(tl.float32)
        r += weight * tl.load(branch + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + cols, r.to(out.dtype.element_ty), mask=inside)
        x += tl.cast(x_row, tl.int64) * VECTOR
        branch += tl.cast(branch_row, tl.int64) * VECTOR
        out += tl.cast(out_row, tl.int64) * VECTOR


@triton.jit
def residual_backward(
    gate,
    branch,
    d_out,
    d_branch,
    partial,  # [groups; chunks; D]
    rows,
    chunks,  # of a group
    chunk_rows,
    gate_group,
    branch_group,
    branch_row,
    do_group,
    do_row,
    db_group,
    db_row,
    multiplier,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunk = tl.program_id(0) // blocks
    group = (chunk // chunks).to(tl.int64)
    first = chunk % chunks * chunk_rows
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    weight = tl.load(gate + group * gate_group * VECTOR + cols, mask=inside, other=0.0).to(tl.float32) * multiplier
    to_gate = tl.zeros([BLOCK], tl.float32)
    row = first.to(tl.int64)
    branch += (group * branch_group + row * branch_row) * VECTOR
    d_out += (group * do_group + row * do_row) * VECTOR
    d_branch += (group * db_group + row * db_row) * VECTOR
    for _ in range(first, tl.minimum(first + chunk_rows, rows)):
        dr = tl.load(d_out + cols, mask=inside, other=0.0).to(tl.float32)
        to_gate += dr * tl.load(branch + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_branch + cols, (dr * weight).to(d_branch.dtype.element_ty), mask=inside)
        branch += tl.cast(branch_row, tl.int64) * VECTOR
        d_out += tl.cast(do_row, tl.int64) * VECTOR
        d_branch += tl.cast(db_row, tl.int64) * VECTOR
    tl.store(partial + chunk.to(tl.int64) * D + cols, to_gate * multiplier, mask=inside)


# ---- the launches ----------------------------------------------------------------------------------------------------


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
        chunk = min(rows_a_program(layout.groups, layout.rows, least=1, programs=programs), 8)
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
        programs = processors(branch.device) * 64 // blocks
        chunk = rows_a_program(layout.groups, layout.rows, least=16, programs=programs)
        chunks = triton.cdiv(layout.rows, chunk)
        partial = torch.empty(1, layout.groups, chunks, D, dtype=torch.float32, device=branch.device)
        launch(
            residual_backward,
            layout.groups * chunks * blocks,
            *(gate, branch, d_out, d_branch, partial, layout.rows, chunks, chunk),
            *(stride // vector for stride in strides),
            multiplier,
            D=D,
            BLOCK=block,
            VECTOR=vector,
            warps=block // 256,
        )
        (d_gate,) = sums_over_rows(partial, [gate])
        return gradients[0].to(x_type), d_gate, d_branch, None
