"""How tensors lie for the kernels, how many programs work on them, and the launch.

A kernel sees `groups` of `rows`: the rows of one group share their modulation. Of x [S, B, D] with modulation [1, B, D]
a group is a sample and lies strided by B * D; of x [B, N, D] with [B, 1, D] it is a sample too. Offsets are 64 bits.
Strides and D reach the kernel as multiples of `VECTOR` numbers where all of them are: then the compiler may load 16
bytes at once, also where a row is, like head_dim 72, no multiple of the 16 numbers that Triton looks for by itself.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mpdit_kernels import switch
from mpdit_kernels.fused.jit.sums import add_chunks

VECTOR = 8  # numbers; 16 bytes of bf16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """x [P, Q, ...] as groups x rows."""

    groups: int
    rows: int
    group_dim: int  # of x, 0 or 1

    @classmethod
    def of(cls, x: Tensor, modulations: Sequence[Tensor] = ()) -> "Rows":
        """`modulations` [1 or P, 1 or Q, D] vary over one of the two, or over none: then the longer one is the rows."""
        varying = [dim for dim in (0, 1) if any(m.shape[dim] > 1 for m in modulations)]
        group_dim = varying[0] if varying else int(x.shape[0] >= x.shape[1])
        return cls(groups=x.shape[group_dim], rows=x.shape[1 - group_dim], group_dim=group_dim)

    def strides(self, x: Tensor) -> tuple[int, int]:
        """From group to group and from row to row, in numbers; 0 along what is not longer than 1."""
        group, row = (x.stride(dim) if x.shape[dim] > 1 else 0 for dim in (self.group_dim, 1 - self.group_dim))
        return group, row


def dense(x: Tensor) -> Tensor:
    """`x`, its last dimension without gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def vector_of(numbers: Sequence[int], vector: int = VECTOR) -> int:
    """`vector` if it divides them all, else 1."""
    return vector if all(number % vector == 0 for number in numbers) else 1


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The type that PyTorch gives a sum of these."""
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors if x is not None])


def require_known(name: str, x: Tensor) -> None:
    if not switch.known(x):
        said = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name} is {said}, but Triton's kernels take float32, bfloat16 or float16.")


# ---- how many programs -----------------------------------------------------------------------------------------------


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 of what is no GPU, an H100's 132 where the tensors are imagined."""
    if device.type == "meta":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def few_rows(groups: int, rows: int, *, programs: int, most: int) -> int:
    """Rows of a program, for kernels that leave nothing behind: so many that there are still `programs` or more."""
    return max(1, min(most, groups * rows // max(1, programs)))


@functools.cache
def chunks_of(groups: int, rows: int, *, programs: int) -> int:
    """Into how many chunks to cut a group's rows, for kernels whose programs leave a sum each.

    `programs` run at once. The time of as many rows as one program takes in all rounds, and of what it costs besides,
    is least; a last round of few programs takes as long as a full one.
    """
    most = max(1, min(triton.cdiv(rows, _LEAST_ROWS), triton.cdiv(4 * programs, max(1, groups))))

    def cost(chunks: int) -> int:
        return triton.cdiv(groups * chunks, programs) * (triton.cdiv(rows, chunks) + _ROWS_A_SUM_COSTS)

    return min(range(1, most + 1), key=cost)


_LEAST_ROWS = 8
_ROWS_A_SUM_COSTS = 8  # assumed: writing and reading a sum, and a program's start, in times of a row


# ---- the launch ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch that did not happen, of tensors on the meta device."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches on meta tensors are written down (what mpdit_kernels.aot compiles)."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(kernel: Any, programs: int, *arguments: Any, warps: int, **constants: Any) -> None:
    """Run `kernel` as `programs` programs; `arguments[0]` is a tensor and says where. Nothing to do for none."""
    if programs == 0:
        return
    device = arguments[0].device
    if device.type == "meta":
        if _recorded is not None:
            _recorded.append(Launch(kernel=kernel, arguments=arguments, constants=constants, warps=warps))
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True, **constants)


# ---- the second stage of sums over rows ------------------------------------------------------------------------------


def sums_over_rows(partial: Tensor, modulations: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of `modulations`, each in its shape and type.

    partial [modulations that are not None, groups, chunks, D], fp32, contiguous.
    """
    there = [m for m in modulations if m is not None]
    if all(m.shape == there[0].shape and m.dtype is there[0].dtype for m in there):
        sums = iter(_added(partial, len(there), there[0]).unbind())
    else:
        sums = iter([_added(part, 1, m)[0] for part, m in zip(partial, there, strict=True)])
    return [None if m is None else next(sums) for m in modulations]


def _added(partial: Tensor, count: int, like: Tensor) -> Tensor:
    """[count, *like.shape]: partial [..., D] summed over its chunks, and over groups where `like` is one for all."""
    D = like.shape[-1]
    out = torch.empty(count, *like.shape, dtype=like.dtype, device=partial.device)
    sums = out.numel() // D
    chunks = partial.numel() // D // max(1, sums)
    columns = min(64, max(16, triton.next_power_of_2(D)))
    programs = sums * triton.cdiv(D, columns)
    launch(add_chunks, programs, partial, out, chunks, D=D, CHUNKS=64, COLUMNS=columns, warps=4)
    return out
