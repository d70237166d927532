"""Pieces that several networks share: patches, fixed positions, timestep features, the timestep MLP.

Shapes: B samples, C channels, H x W pixels, p patch side, S tokens, D width, P = p * p * C.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.mup.roles import Role
from mpdit.parallel.context import Context
from mpdit.parallel.linears import ReplicatedLinear

TIME_FEATURES = 256  # of the sinusoidal timestep embedding, as in DiT and SD3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a network is asked: noisy images [B, C, H, W], times in [0, 1] [B], token ids [B, L] (0 is padding)."""

    image_BCHW: Tensor
    time_B: Tensor
    text_BL: Tensor


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [S, B, p * p * C], patches row by row, each flattened as (row, column, channel)."""
    B, C, H, W = image_BCHW.shape
    grid = image_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return grid.permute(2, 4, 0, 3, 5, 1).reshape(H // patch * (W // patch), B, patch * patch * C)


def unpatchify(tokens_SBP: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patchify` for images of height x width pixels."""
    rows, columns = height // patch, width // patch
    grid = tokens_SBP.reshape(rows, columns, tokens_SBP.shape[1], patch, patch, -1)
    return grid.permute(2, 5, 0, 3, 1, 4).reshape(tokens_SBP.shape[1], -1, height, width)


def _sin_cos(position_S: Tensor, features: int) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(features // 2, dtype=torch.float64) / (features // 2))
    angle = position_S.to(torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def positions_1d(tokens: int, width: int) -> Tensor:
    """Fixed sin-cos positions [tokens, width], fp32."""
    return _sin_cos(torch.arange(tokens), width).float()


def positions_2d(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2-D sin-cos positions [rows * columns, width], fp32: first half x, second half y (as in DiT and MAE)."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([_sin_cos(x.flatten(), width // 2), _sin_cos(y.flatten(), width // 2)], -1).float()


def time_features(time_B: Tensor) -> Tensor:
    """Sinusoidal features [B, 256] of times in [0, 1], scaled to DDPM's 1000 steps; fp32."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=time_B.device) / half)
    angle = 1000.0 * time_B.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class ConditionMLP(nn.Module):
    """Linear, SiLU, linear: [B, fan_in] -> [B, D]. The first layer's role says if its fan-in grows with the width."""

    def __init__(self, ctx: Context, fan_in: int, role: Role) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(ctx, fan_in, ctx.width, role)
        self.linear_2 = ReplicatedLinear(ctx, ctx.width, ctx.width, Role.HIDDEN)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x_BF)))
