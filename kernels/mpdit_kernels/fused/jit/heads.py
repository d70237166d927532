"""RMSNorm over each head of queries or keys, with rotary positions if there are tables of them.

    n = x / sqrt(mean(x^2) + eps)    over d
    y = rotate(n * gain)             neighbours (2e, 2e + 1) by the token's angle e

A tile is TILE heads of neighbouring tokens: a few lanes of a warp share a head, so that its sums need no barrier.
Backward takes the norm from x again instead of storing it.
"""

import triton
import triton.language as tl

from mpdit_kernels.fused.jit.numbers import NUMBERS


@triton.jit
def _turned(x, cos, sin, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """[TILE, BLOCK], its pairs of neighbours turned by angles [TILE, BLOCK / 2]."""
    even, odd = tl.split(tl.reshape(x, [TILE, BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [TILE, BLOCK])


@triton.jit(do_not_specialize=NUMBERS)
def heads_forward(
    x,
    gain,
    cos,  # None: no rotation
    sin,
    out,
    rows,
    chunks,  # of a group
    chunk_tiles,
    x_group,
    x_row,
    x_head,
    out_group,
    out_row,
    table_group,
    table_row,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
):
    group = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk_tiles
    last = tl.minimum(first + chunk_tiles, (rows * H + TILE - 1) // TILE)
    cols = tl.arange(0, BLOCK)
    pairs = tl.arange(0, BLOCK // 2)
    weight = tl.load(gain + cols, mask=cols < D, other=0.0).to(tl.float32)
    for tile in range(first, last):
        index = tile * TILE + tl.arange(0, TILE)  # 2^31 heads fit no GPU
        row = (index // H).to(tl.int64)
        head = (index % H).to(tl.int64)
        there = row < rows
        inside = there[:, None] & (cols < D)[None, :]
        start = (group * x_group + row * x_row + head * x_head) * VECTOR
        n = tl.load(x + start[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        n *= tl.rsqrt(tl.sum(n * n, 1) / D + eps)[:, None]
        y = n * weight[None, :]
        if cos is not None:
            angle = (group * table_group + row * table_row)[:, None] * TABLE_VECTOR + pairs[None, :]
            known = there[:, None] & (pairs < D // 2)[None, :]
            c = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
            y = _turned(y, c, s, TILE, BLOCK)
        start = (group * out_group + row * out_row) * VECTOR + head * D
        tl.store(out + start[:, None] + cols[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def heads_backward(
    x,
    gain,
    cos,
    sin,
    d_out,
    dx,
    partial,  # [groups; chunks; D]
    rows,
    chunks,  # of a group
    chunk_tiles,
    x_group,
    x_row,
    x_head,
    do_group,
    do_row,
    do_head,
    dx_group,
    dx_row,
    table_group,
    table_row,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
):
    group = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk_tiles
    last = tl.minimum(first + chunk_tiles, (rows * H + TILE - 1) // TILE)
    cols = tl.arange(0, BLOCK)
    pairs = tl.arange(0, BLOCK // 2)
    weight = tl.load(gain + cols, mask=cols < D, other=0.0).to(tl.float32)
    to_gain = tl.zeros([TILE, BLOCK], tl.float32)
    for tile in range(first, last):
        index = tile * TILE + tl.arange(0, TILE)  # 2^31 heads fit no GPU
        row = (index // H).to(tl.int64)
        head = (index % H).to(tl.int64)
        there = row < rows
        inside = there[:, None] & (cols < D)[None, :]
        start = (group * x_group + row * x_row + head * x_head) * VECTOR
        n = tl.load(x + start[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        start = (group * do_group + row * do_row + head * do_head) * VECTOR
        dy = tl.load(d_out + start[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if cos is not None:
            angle = (group * table_group + row * table_row)[:, None] * TABLE_VECTOR + pairs[None, :]
            known = there[:, None] & (pairs < D // 2)[None, :]
            c = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
            dy = _turned(dy, c, -s, TILE, BLOCK)
        inverse = tl.rsqrt(tl.sum(n * n, 1) / D + eps)[:, None]
        n *= inverse
        to_gain += dy * n
        dn = dy * weight[None, :]
        along_n = (tl.sum(dn * n, 1) / D)[:, None]
        start = (group * dx_group + row * dx_row) * VECTOR + head * D
        out = (dn - n * along_n) * inverse
        tl.store(dx + start[:, None] + cols[None, :], out.to(dx.dtype.element_ty), mask=inside)
    here = partial + tl.program_id(0).to(tl.int64) * D + cols
    tl.store(here, tl.sum(to_gain, 0), mask=cols < D)
