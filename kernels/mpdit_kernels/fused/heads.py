"""RMSNorm of heads, with rotation: autograd around jit/heads.py."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpdit_kernels.fused.jit.heads import heads_backward, heads_forward
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

_WARPS = 4


def _tile(block: int, numbers: int) -> int:
    """Heads a tile, so that a thread holds about `numbers` numbers."""
    return max(1, 32 * _WARPS * numbers // block)


def _table(layout: Rows, cos: Tensor | None) -> tuple[tuple[int, int], int]:
    """Strides of a table and what they are multiples of: 16 bytes of fp32."""
    strides = (0, 0) if cos is None else layout.strides(cos)
    return strides, vector_of(strides, 4)


class HeadNorm(torch.autograd.Function):
    """(x, gain, cos, sin) -> y. Shapes: heads.py's of mpdit_kernels; both tables or neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
        for name, tensor in {"x": x, "gain": gain, "cos": cos, "sin": sin}.items():
            if tensor is not None:
                require_known(name, tensor)
        x, gain = dense(x), dense(gain)
        cos, sin = (None if table is None else table.contiguous() for table in (cos, sin))
        layout, (H, D) = Rows.of(x), x.shape[2:]
        out = torch.empty(x.shape, dtype=promoted(x, gain), device=x.device)
        strides = [*layout.strides(x), x.stride(2) if H > 1 else 0, *layout.strides(out)]
        vector, block = vector_of([D, *strides]), triton.next_power_of_2(max(D, 2))
        table, table_vector = _table(layout, cos)
        tile = _tile(block, 16)
        tiles = triton.cdiv(layout.rows * H, tile)
        chunk = few_rows(layout.groups, tiles, programs=processors(x.device) * 64, most=4)
        chunks = triton.cdiv(tiles, chunk)
        launch(
            heads_forward,
            layout.groups * chunks,
            *(x, gain, cos, sin, out, layout.rows, chunks, chunk),
            *(stride // vector for stride in strides),
            *(stride // table_vector for stride in table),
            eps,
            H=H,
            D=D,
            BLOCK=block,
            TILE=tile,
            VECTOR=vector,
            TABLE_VECTOR=table_vector,
            warps=_WARPS,
        )
        ctx.save_for_backward(x, gain, cos, sin)
        ctx.settings = layout, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, cos, sin = ctx.saved_tensors
        layout, eps = ctx.settings
        d_out, (H, D) = dense(gradients[0]), x.shape[2:]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        strides = [
            *(*layout.strides(x), x.stride(2) if H > 1 else 0),
            *(*layout.strides(d_out), d_out.stride(2) if H > 1 else 0),
            *layout.strides(dx),
        ]
        vector, block = vector_of([D, *strides]), triton.next_power_of_2(max(D, 2))
        table, table_vector = _table(layout, cos)
        tile = _tile(block, 8)
        tiles = triton.cdiv(layout.rows * H, tile)
        chunks = chunks_of(layout.groups, tiles, programs=processors(x.device) * 8)
        partial = torch.empty(1, layout.groups, chunks, D, dtype=torch.float32, device=x.device)
        launch(
            heads_backward,
            layout.groups * chunks,
            *(x, gain, cos, sin, d_out, dx, partial),
            *(layout.rows, chunks, triton.cdiv(tiles, chunks)),
            *(stride // vector for stride in strides),
            *(stride // table_vector for stride in table),
            eps,
            H=H,
            D=D,
            BLOCK=block,
            TILE=tile,
            VECTOR=vector,
            TABLE_VECTOR=table_vector,
            warps=_WARPS,
        )
        (d_gain,) = sums_over_rows(partial, [gain])
        return dx, d_gain, None, None, None


def norm_heads(x: Tensor, gain: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    y: Tensor = HeadNorm.apply(x, gain, cos, sin, eps)
    return y
