"""The elementwise halves of an adaLN block. Shapes: x [S, B, D]; shift, scale, gate [1, B, D]."""

from torch import Tensor
from torch.nn import functional as F


def layer_norm_modulate(x_SBD: Tensor, shift_1BD: Tensor, scale_1BD: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift, LN without affine (Peebles & Xie, arXiv 2212.09748, adaLN)."""
    return F.layer_norm(x_SBD, x_SBD.shape[-1:], eps=eps) * (1 + scale_1BD) + shift_1BD


def gated_residual(x_SBD: Tensor, gate_1BD: Tensor, branch_SBD: Tensor, multiplier: float = 1.0) -> Tensor:
    """x + multiplier * gate * branch."""
    return x_SBD + (gate_1BD if multiplier == 1.0 else multiplier * gate_1BD) * branch_SBD
