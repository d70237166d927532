"""The layers that more than one of the references has, as functions of the dict of weights and a name in it.

2-D positions and time features: Peebles & Xie (arXiv 2212.09748). QK-norm: Dehghani et al. (2302.05442).
Letters in a name's suffix are its dimensions, as in plain_common.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TIME_FEATURES = 256

Weights = dict[str, Tensor]


def patchify(x_BCYX: Tensor, patch: int) -> Tensor:
    """Image to tokens: patches in raster order, each flattened as (row, column, channel). (B,C,Y,X) -> (S,B,F)"""
    b, c, y, x = x_BCYX.shape
    x_BCipjq = x_BCYX.reshape(b, c, y // patch, patch, x // patch, patch)
    return x_BCipjq.permute(2, 4, 0, 3, 5, 1).reshape((y // patch) * (x // patch), b, patch * patch * c)


def unpatchify(x_SBF: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of patchify, for a grid of (rows, columns) patches. (S,B,F) -> (B,C,Y,X)"""
    (rows, columns), (_, b, f) = grid, x_SBF.shape
    x_ijBpqC = x_SBF.reshape(rows, columns, b, patch, patch, f // patch**2)
    return x_ijBpqC.permute(2, 5, 0, 3, 1, 4).reshape(b, f // patch**2, rows * patch, columns * patch)


def positions_1d(coordinates_S: Tensor, dim: int) -> Tensor:
    """concat(sin, cos) of coordinate x 10000^(-k / (dim/2)). (S,) -> (S, dim), in float64"""
    omega_k = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle_Sk = coordinates_S.double()[:, None] * omega_k
    return torch.cat([angle_Sk.sin(), angle_Sk.cos()], dim=-1)


def positions_2d(grid: tuple[int, int], dim: int, side: int | None = None) -> Tensor:
    """First half of the width from the column, second from the row, as in MAE, DiT. -> (rows * columns, dim)

    Patches are 1 apart, and the middle of the grid is where that of a square of `side` patches is whose first patch is
    at 0, as SD3 has it (Esser et al. 2403.03206, section 5.3.2); without a side the grid's own first patch is at 0.
    """
    rows, columns = grid

    def coordinates(count: int) -> Tensor:
        half = (count - 1) / 2
        return torch.linspace(-half, half, count, dtype=torch.float64) + ((side or count) - 1) / 2

    y_S, x_S = coordinates(rows).repeat_interleave(columns), coordinates(columns).repeat(rows)
    return torch.cat([positions_1d(x_S, dim // 2), positions_1d(y_S, dim // 2)], dim=-1)


def time_features(t_B: Tensor, dim: int = TIME_FEATURES) -> Tensor:
    """concat(cos, sin) of 1000 t x 10000^(-k / (dim/2)), k = 0..dim/2 - 1. (B,) -> (B, dim), in float32"""
    half = dim // 2
    f_k = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angle_Bk = (1000 * t_B.float())[:, None] * f_k
    return torch.cat([angle_Bk.cos(), angle_Bk.sin()], dim=-1)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """With a bias where the weights have one."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def modulate(x_SBD: Tensor, shift_1BD: Tensor, scale_1BD: Tensor) -> Tensor:
    return F.layer_norm(x_SBD, x_SBD.shape[-1:], eps=1e-6) * (1 + scale_1BD) + shift_1BD


def rms_norm(x_SBHK: Tensor, gain_K: Tensor) -> Tensor:
    x = at_least_fp32(x_SBHK)
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain_K).to(x_SBHK.dtype)


def queries_keys_values(w: Weights, prefix: str, x_SBD: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the qkv weight: (head, q | k | v, head_dim); QK-norm if the weights have it. -> three (S,B,H,K)"""
    qkv_SBH3K = linear(w, f"{prefix}.qkv", x_SBD).unflatten(-1, (-1, 3, head_dim))
    q_SBHK, k_SBHK, v_SBHK = qkv_SBH3K.unbind(-2)
    if f"{prefix}.q_norm.weight" in w:
        q_SBHK = rms_norm(q_SBHK, w[f"{prefix}.q_norm.weight"])
        k_SBHK = rms_norm(k_SBHK, w[f"{prefix}.k_norm.weight"])
    return q_SBHK, k_SBHK, v_SBHK


def attend(q_SBHK: Tensor, k_SBHK: Tensor, v_SBHK: Tensor, scale: float | None) -> Tensor:
    """Every query looks at every key. (S,B,H,K) and twice (L,B,H,K) -> (S,B,D)"""
    o_BHSK = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBHK, v_SBHK)), scale=scale)
    return o_BHSK.permute(2, 0, 1, 3).flatten(2)


def self_attention(w: Weights, prefix: str, x_SBD: Tensor, head_dim: int, scale: float | None) -> Tensor:
    return linear(w, f"{prefix}.proj", attend(*queries_keys_values(w, prefix, x_SBD, head_dim), scale))


def mlp(w: Weights, prefix: str, x_SBD: Tensor) -> Tensor:
    return linear(w, f"{prefix}.fc2", F.gelu(linear(w, f"{prefix}.fc1", x_SBD), approximate="tanh"))


def embed_image(w: Weights, x_BCYX: Tensor, patch: int, side: int | None) -> Tensor:
    """Tokens of the patches, with fixed 2-D positions. (B,C,Y,X) -> (S,B,D)"""
    grid = x_BCYX.shape[2] // patch, x_BCYX.shape[3] // patch
    x_SBD = linear(w, "embed.patch", patchify(x_BCYX, patch))
    return x_SBD + positions_2d(grid, x_SBD.shape[-1], side).to(x_SBD.dtype)[:, None]


def embed_time(w: Weights, t_B: Tensor) -> Tensor:
    """(B,) -> (B,D)"""
    features = time_features(t_B).to(w["embed.time.in.weight"].dtype)
    return linear(w, "embed.time.mid", F.silu(linear(w, "embed.time.in", features)))
