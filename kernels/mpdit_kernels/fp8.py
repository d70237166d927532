"""FP8 casts to the bit as Transformer Engine 2.20 makes them, in plain PyTorch on any device.

A quantised tensor is codes, E4M3 or E5M2, and inverse scales: x is about code * inverse. Tensors are matrices [R, C]
whose rows a GEMM sums along, so that scales of blocks lie along C; for the GEMM that sums along R the transpose is
quantised. H steps of history, N tensors. Scales and amaxes are fp32, or E8M0 exponents (uint8) in MXFP8.

Sources: TE's common/recipe/recipe_common.cuh, current_scaling.cu, delayed_scaling.cu, common/util/ptx.cuh; codes and
scales are those of TE's Python references (tests/te/test_fp8_reference.py).
"""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = 128  # side of the blocks of blockwise scaling
MX_BLOCK = 32

_FP32_MAX = torch.finfo(torch.float32).max
_EXPONENT_BITS = -0x800000  # sign and exponent of an fp32, as a signed int32
_MANTISSA_BITS = 23
_SUBNORMAL = 0x400000  # 2^-127, which has no exponent field


def largest(format: torch.dtype) -> float:
    """448 for E4M3, 57344 for E5M2."""
    return torch.finfo(format).max


def saturated(scaled: Tensor, format: torch.dtype) -> Tensor:
    """`scaled`, which is overwritten, as codes: to the nearest, ties to even; what is larger than the largest, as
    infinity, to the largest; nan stays nan."""
    # What torch's own cast makes of an overflow is nan before 2.13, the largest value since, infinity in E5M2.
    return scaled.clamp_(-largest(format), largest(format)).to(format)


def amax(x: Tensor) -> Tensor:
    """The largest magnitude, fp32 []; 0 of an empty tensor. Nan if there is one, where TE's kernels pass over it: its
    products are nan in either case."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).float()


def _block_amax(tiles: Tensor) -> Tensor:
    """:func:`amax` of each block: [R / r, r, C / c, c] -> [R / r, C / c]."""
    low, high = torch.aminmax(tiles.detach(), dim=-1)
    return torch.maximum(-low, high).amax(1).float()


def _quotient(number: float, x: Tensor) -> Tensor:
    # number / x is number * (1 / x) in torch, rounded twice.
    return torch.full_like(x, number) / x


def scale_of(amax: Tensor, format: torch.dtype, *, power_of_two: bool = False, highest: float = _FP32_MAX) -> Tensor:
    """What takes `amax` to the format's largest value, or at most a factor of two below it (`power_of_two`).

    1 for an amax of 0, infinity or nan; `highest` where the quotient is too large for fp32.
    """
    scale = _quotient(largest(format), amax).clamp(max=highest)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """Codes [R, C] and their inverse scales: one for all, fp32 []; one a block of r x c, fp32 [R / r, C / c]; or in
    MXFP8 exponents of 2^(e - 127), uint8 [R, C / 32]. The last block of a row or column may be short."""

    codes: Tensor
    inverse: Tensor
    block: tuple[int, int] | None = None

    def dequantized(self) -> Tensor:
        """[R, C], fp32."""
        inverse = power_of_two(self.inverse) if self.inverse.dtype == torch.uint8 else self.inverse
        if self.block is None:
            return self.codes.float().mul_(inverse)
        # Padding is fp32's: torch has no padding of codes.
        return _untiled(_tiled(self.codes.float(), self.block).mul_(inverse[:, None, :, None]), self.codes)

    def transposed(self) -> "Quantized":
        """[C, R], the same numbers: for one scale, or square blocks."""
        if self.block is None:
            return Quantized(codes=self.codes.t(), inverse=self.inverse)
        assert self.block[0] == self.block[1]
        return Quantized(codes=self.codes.t(), inverse=self.inverse.t(), block=self.block)


def _tiled(x_RC: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] -> [R / r, r, C / c, c], padded with zeros."""
    (R, C), (r, c) = x_RC.shape, block
    if R % r or C % c:
        x_RC = F.pad(x_RC, (0, -C % c, 0, -R % r))
    return x_RC.reshape(-(-R // r), r, -(-C // c), c)


def _untiled(tiles: Tensor, like_RC: Tensor) -> Tensor:
    R, C = like_RC.shape
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)[:R, :C]


def _copied(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32, copy=True)


def quantize_tensor(x: Tensor, format: torch.dtype, scale: Tensor) -> Quantized:
    """One scale for all of `x`: current scaling (:func:`scale_of` its amax), or delayed scaling (of amaxes before)."""
    return Quantized(codes=saturated(_copied(x).mul_(scale), format), inverse=1 / scale)


def quantize_blocks(x_RC: Tensor, format: torch.dtype = E4M3, block: tuple[int, int] = (1, TILE)) -> Quantized:
    """A power-of-two scale for each block of r x c: (1, 128) for activations and gradients, (128, 128) for weights."""
    tiles = _tiled(x_RC, block)
    scale = scale_of(_block_amax(tiles), format, power_of_two=True, highest=torch.finfo(x_RC.dtype).max)
    codes = saturated(_copied(tiles).mul_(scale[:, None, :, None]), format)
    return Quantized(codes=_untiled(codes, x_RC), inverse=1 / scale, block=block)


def quantize_mx(x_RC: Tensor, format: torch.dtype = E4M3) -> Quantized:
    """MXFP8 (OCP Microscaling Formats 1.0): blocks of 1 x 32, each with the exponent that keeps its amax in range."""
    block = (1, MX_BLOCK)
    tiles = _tiled(x_RC, block)
    exponent = exponent_of(_block_amax(tiles) * (1 / largest(format)))
    codes = saturated(_copied(tiles).mul_(_reciprocal(exponent)[:, None, :, None]), format)
    return Quantized(codes=_untiled(codes, x_RC), inverse=exponent, block=block)


def exponent_of(value: Tensor) -> Tensor:
    """E8M0 (uint8): e of the smallest 2^(e - 127) that is not below an fp32; 0 for 0, 254 for infinity, 255 for nan."""
    bits = value.view(torch.int32)
    exponent, mantissa = bits >> _MANTISSA_BITS, bits & ~_EXPONENT_BITS
    up = (mantissa > 0) & ((exponent > 0) | (mantissa > _SUBNORMAL))
    exponent = (exponent + up).clamp(max=254)
    return torch.where(value.isnan(), 255, exponent).to(torch.uint8)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^(e - 127) of E8M0 exponents, fp32; nan for 255."""
    wide = exponent.to(torch.int32)
    bits = torch.where(wide == 0, _SUBNORMAL, wide << _MANTISSA_BITS)
    return torch.where(wide == 255, math.nan, bits.view(torch.float32))


def _reciprocal(exponent: Tensor) -> Tensor:
    return torch.where(exponent == 255, math.nan, power_of_two(254 - exponent.to(torch.int32)))


def next_scales(
    history_HN: Tensor, scale_N: Tensor, format: torch.dtype, *, margin: int = 0, most_recent: bool = False
) -> tuple[Tensor, Tensor]:
    """Delayed scaling: (history, scales) for the next step, after one whose amaxes stand in ``history[0]``.

    The history moves on by one, its first row free for the next step; the scale takes the largest amax in it
    (`most_recent`: the last) to the format's largest value / 2^margin. Where the amax is 0 or nan, history and scale
    stay; an infinite one stays in the history and keeps the scale for as long.
    """
    last_N = history_HN[0]
    met_N = (last_N != 0) & ~last_N.isnan()
    rolled_HN = history_HN.roll(-1, 0)
    amax_N = torch.where(met_N, last_N if most_recent else rolled_HN.amax(0), 0.0)
    scale = _quotient(largest(format) * 2.0**-margin, amax_N).clamp(max=_FP32_MAX)
    rolled_HN[0] = 0
    free_HN = torch.where(torch.arange(len(history_HN), device=last_N.device)[:, None] > 0, history_HN, 0.0)
    return (
        torch.where(met_N, rolled_HN, free_HN),
        torch.where(amax_N.isfinite() & (amax_N > 0), scale, scale_N),
    )
