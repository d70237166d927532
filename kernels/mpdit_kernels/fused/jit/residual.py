"""The residual sum with a gated branch: x + multiplier * gate * branch. No row needs all of its numbers at once, so a
program takes a block of columns: a chunk of one group's rows with the same piece of the gate."""

import triton
import triton.language as tl

from mpdit_kernels.fused.jit.numbers import NUMBERS


@triton.jit(do_not_specialize=NUMBERS)
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


@triton.jit(do_not_specialize=NUMBERS)
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
