"""Layer norm with modulation, alone or of a sum with a gated branch: one kernel forward, one backward.

    r = x + multiplier * gate * branch          (without a branch, r is x)
    n = (r - mean) / sqrt(var + eps)            over D
    y = n * (base + scale) + shift              base 1 for a modulation, 0 for the gain and bias of a LayerNorm

A row lies in the registers of one program from its load to its store. Backward, a program goes through a chunk of one
group's rows, writes their gradients and adds up its share of those of shift, scale and gate; a second kernel adds the
shares. r is rounded to its type before it is normalised, as if the sum were an operation of its own.

STAGES is how many rows are under way: those to come are copied into shared memory meanwhile. Forward advances its
addresses from row to row and backward computes them from the row's number: either takes fewer registers so.
"""

import triton
import triton.language as tl

from mpdit_kernels.fused.jit.numbers import NUMBERS


@triton.jit(do_not_specialize=NUMBERS)
def norm_forward(
    x,
    branch,  # None: no sum
    gate,  # None: 1
    shift,
    scale,
    summed,  # r; None without a branch
    out,
    stats,  # [groups; rows; mean and 1 / sqrt(var + eps)]
    rows,
    chunks,  # of a group
    chunk_rows,
    x_group,
    x_row,
    branch_group,
    branch_row,
    gate_group,
    shift_group,
    scale_group,
    out_group,
    out_row,
    multiplier,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    BASE: tl.constexpr,
    STAGES: tl.constexpr,
):
    group = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk_rows
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    factor = BASE + tl.load(scale + group * scale_group * VECTOR + cols, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + group * shift_group * VECTOR + cols, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        weight = tl.load(gate + group * gate_group * VECTOR + cols, mask=inside, other=0.0).to(tl.float32) * multiplier
    row = first.to(tl.int64)
    x += (group * x_group + row * x_row) * VECTOR
    out += (group * out_group + row * out_row) * VECTOR
    if branch is not None:
        branch += (group * branch_group + row * branch_row) * VECTOR
        summed += (group * out_group + row * out_row) * VECTOR
    stats += 2 * (group * rows + row)
    for _ in tl.range(first, tl.minimum(first + chunk_rows, rows), num_stages=STAGES):
        r = tl.load(x + cols, mask=inside, other=0.0).to(tl.float32)
        if branch is not None:
            b = tl.load(branch + cols, mask=inside, other=0.0).to(tl.float32)
            if gate is not None:
                r += weight * b
            else:
                r += multiplier * b
            rounded = r.to(summed.dtype.element_ty)
            tl.store(summed + cols, rounded, mask=inside)
            r = rounded.to(tl.float32)
            branch += tl.cast(branch_row, tl.int64) * VECTOR
            summed += tl.cast(out_row, tl.int64) * VECTOR
        mean = tl.sum(r, 0) / D
        centred = tl.where(inside, r - mean, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        y = centred * inverse * factor + offset
        tl.store(out + cols, y.to(out.dtype.element_ty), mask=inside)
        tl.store(stats, mean)
        tl.store(stats + 1, inverse)
        x += tl.cast(x_row, tl.int64) * VECTOR
        stats += 2
        out += tl.cast(out_row, tl.int64) * VECTOR


@triton.jit(do_not_specialize=NUMBERS)
def norm_backward(
    r,
    branch,  # None without a gate
    gate,  # None: 1
    scale,
    stats,  # [groups; rows; mean and 1 / sqrt(var + eps)]
    d_summed,  # of r where it is an output; None without a branch
    d_out,
    dx,
    d_branch,
    partial,  # [shift, scale and, with a gate, gate; groups; chunks; D]
    rows,
    chunks,  # of a group
    chunk_rows,
    r_group,
    r_row,
    branch_group,
    branch_row,
    gate_group,
    scale_group,
    ds_group,
    ds_row,
    do_group,
    do_row,
    dx_group,
    dx_row,
    multiplier,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    BASE: tl.constexpr,
    STAGES: tl.constexpr,
    REREAD: tl.constexpr,
):
    group = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk_rows
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    scale += group * scale_group * VECTOR
    r += group * r_group * VECTOR
    d_out += group * do_group * VECTOR
    dx += group * dx_group * VECTOR
    stats += 2 * group * rows
    to_shift = tl.zeros([BLOCK], tl.float32)
    to_scale = tl.zeros([BLOCK], tl.float32)
    if d_summed is None:
        factor = BASE + tl.load(scale + cols, mask=inside, other=0.0).to(tl.float32)
    else:
        d_summed += group * ds_group * VECTOR
        d_branch += group * dx_group * VECTOR
    if gate is not None:
        gate += group * gate_group * VECTOR
        branch += group * branch_group * VECTOR
        to_gate = tl.zeros([BLOCK], tl.float32)
    for index in tl.range(first, tl.minimum(first + chunk_rows, rows), num_stages=STAGES):
        row = tl.cast(index, tl.int64) * VECTOR
        dy = tl.load(d_out + row * do_row + cols, mask=inside, other=0.0)
        raw = tl.load(r + row * r_row + cols, mask=inside, other=0.0)
        if d_summed is not None:
            # What comes from far is asked for before the sums, whose barriers no load passes. Modulations come from the
            # first cache in every row: kept in registers, they would not leave enough of them.
            ds = tl.load(d_summed + row * ds_row + cols, mask=inside, other=0.0)
            if gate is not None:
                b = tl.load(branch + row * branch_row + cols, mask=inside, other=0.0)
            factor = BASE + tl.load(scale + cols, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats + 2 * index)
        inverse = tl.load(stats + 2 * index + 1)
        n = (raw.to(tl.float32) - mean) * inverse
        to_shift += dy.to(tl.float32)
        to_scale += dy.to(tl.float32) * n
        dn = dy.to(tl.float32) * factor  # 0 beyond D, where n is not
        along_one = tl.sum(dn, 0) / D
        along_n = tl.sum(dn * n, 0) / D
        if REREAD:
            # Again out of the first cache: over the sums the widest rows have no room for them in fp32.
            dy = tl.load(d_out + row * do_row + cols, mask=inside, other=0.0, eviction_policy="evict_first")
            raw = tl.load(r + row * r_row + cols, mask=inside, other=0.0, eviction_policy="evict_first")
            factor = BASE + tl.load(scale + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
            n = (raw.to(tl.float32) - mean) * inverse
            dn = dy.to(tl.float32) * factor
        dr = (dn - along_one - n * along_n) * inverse
        if d_summed is not None:
            dr += ds.to(tl.float32)
            db = dr * multiplier
            if gate is not None:
                to_gate += db * b.to(tl.float32)
                db *= tl.load(gate + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_branch + row * dx_row + cols, db.to(d_branch.dtype.element_ty), mask=inside)
        tl.store(dx + row * dx_row + cols, dr.to(dx.dtype.element_ty), mask=inside)
    kind = tl.num_programs(0).to(tl.int64) * D
    partial += tl.program_id(0).to(tl.int64) * D + cols
    tl.store(partial, to_shift, mask=inside)
    tl.store(partial + kind, to_scale, mask=inside)
    if gate is not None:
        tl.store(partial + 2 * kind, to_gate, mask=inside)
