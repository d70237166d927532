"""What each operation means, in plain PyTorch: what a CPU runs and what the fused ones are compared with.

Shapes: as in modulate.py and heads.py, which check them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm_modulate(x_SBD: Tensor, shift_1BD: Tensor, scale_1BD: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_SBD, x_SBD.shape[-1:], eps=eps) * (1 + scale_1BD) + shift_1BD


def gated_residual(x_SBD: Tensor, gate_1BD: Tensor | None, branch_SBD: Tensor, multiplier: float) -> Tensor:
    if gate_1BD is None:
        return x_SBD + multiplier * branch_SBD
    return x_SBD + (gate_1BD if multiplier == 1.0 else multiplier * gate_1BD) * branch_SBD


def gated_residual_modulate(
    x_SBD: Tensor,
    gate_1BD: Tensor | None,
    branch_SBD: Tensor,
    shift_1BD: Tensor,
    scale_1BD: Tensor,
    multiplier: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    sum_SBD = gated_residual(x_SBD, gate_1BD, branch_SBD, multiplier)
    return sum_SBD, layer_norm_modulate(sum_SBD, shift_1BD, scale_1BD, eps)


def layer_norm(x_SBD: Tensor, gain_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_SBD, gain_D.shape, gain_D, bias_D, eps)


def residual_layer_norm(
    x_SBD: Tensor, branch_SBD: Tensor, gain_D: Tensor, bias_D: Tensor, multiplier: float, eps: float
) -> tuple[Tensor, Tensor]:
    sum_SBD = gated_residual(x_SBD, None, branch_SBD, multiplier)
    return sum_SBD, layer_norm(sum_SBD, gain_D, bias_D, eps)


def head_norm(x_SBHd: Tensor, gain_d: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_SBHd, gain_d.shape, gain_d, eps)


def rotate(x_SBHd: Tensor, cos_SBe: Tensor, sin_SBe: Tensor) -> Tensor:
    """Each pair of neighbours (2e, 2e + 1) of a head turned by its angle (RoFormer, arXiv 2104.09864, equation 34)."""
    even, odd = x_SBHd.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_SBe[:, :, None].to(x_SBHd.dtype), sin_SBe[:, :, None].to(x_SBHd.dtype)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
