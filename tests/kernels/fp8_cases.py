"""Matrices for the casts' golden values: the same numbers on every machine, by whole-number arithmetic alone."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens" / "fp8.json"
SHAPES = [(64, 256), (100, 320), (8, 16)]
KINDS = ("tensor e4m3", "tensor e5m2", "block 1x128", "block 128x128", "mx 1x32")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    kind: str
    dtype: torch.dtype
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.kind}, {str(self.dtype).removeprefix('torch.')}, {self.shape[0]} x {self.shape[1]}"


def cases() -> list[Case]:
    """But what torchao, which cuts no short blocks, has no answer for."""
    return [
        Case(kind=kind, dtype=dtype, shape=shape)
        for kind in KINDS
        for dtype in (torch.float32, torch.bfloat16)
        for shape in SHAPES
        if shape[1] % 32 == 0 or not kind.startswith("mx")
    ]


def matrix(case: Case) -> Tensor:
    """Rows from 2^-30 to 2^30 in size, with zeros, a row of zeros, and one number in a hundred much larger."""
    R, C = case.shape
    i = torch.arange(R * C, dtype=torch.int64)
    mixed = (i * 2654435761 + 12345) % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    x = (mixed.double() / 2**31 - 1) * torch.where(mixed % 100 == 0, 64.0, 1.0)
    x = torch.where(mixed % 7 == 0, 0.0, x).view(R, C)
    size = torch.pow(2.0, (torch.arange(R, dtype=torch.float64) * 37 % 61) - 30)
    x = x * size[:, None]
    x[R // 2] = 0
    return x.to(case.dtype)


def golden(codes: Tensor, scales: Tensor) -> dict[str, Any]:
    """Hashes of all bytes, and a few of them to look at. `scales`: inverse fp32 scales, or E8M0 exponents."""
    codes, scales = codes.contiguous().view(torch.uint8), scales.contiguous().flatten()
    shown = scales[:4].tolist() if scales.dtype == torch.uint8 else [x.hex() for x in scales[:4].tolist()]
    return {"codes": _sha256(codes), "scales": _sha256(scales), "first": [codes.flatten()[:8].tolist(), shown]}


def _sha256(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()
