"""The second stage of sums over rows: the shares of the programs, added up in the same order every time."""

import triton
import triton.language as tl

from mpdit_kernels.fused.jit.numbers import NUMBERS


@triton.jit(do_not_specialize=NUMBERS)
def add_chunks(
    partial,
    out,
    chunks,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial [sums, chunks, D] -> out [sums, D]; the same order of additions every time."""
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    this = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        here = partial + (this * chunks + chunk[:, None]) * D + cols[None, :]
        total += tl.load(here, mask=(chunk[:, None] < chunks) & (cols[None, :] < D), other=0.0)
    tl.store(out + this * D + cols, tl.sum(total, 0).to(out.dtype.element_ty), mask=cols < D)
