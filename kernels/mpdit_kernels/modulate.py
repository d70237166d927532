"""The elementwise halves of a transformer block: layer norm, modulation (adaLN), gate and residual.

S tokens, B samples, D width. x is [S, B, D], or [B, S, D]: what comes last is contiguous or is made so, other strides
are free. A modulation (shift, scale, gate) is [1, B, D] for the first, [B, 1, D] for the second, or [1, 1, D] for all
samples alike; it may be a view, such as a chunk of one wider tensor. Within an operation they vary over the same
dimension, or not at all. Any width, any number of tokens or samples, none included.

Results have the type that PyTorch gives their sum, gradients that of their input; in Triton all arithmetic is fp32.
Shapes that don't fit raise ValueError, types that Triton does not know TypeError where it was asked for by name.
"""

from torch import Tensor

from mpdit_kernels import reference, switch
from mpdit_kernels.shapes import check_rows, check_vector


def layer_norm_modulate(x_SBD: Tensor, shift_1BD: Tensor, scale_1BD: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift, LN without affine (Peebles & Xie, arXiv 2212.09748, adaLN)."""
    check_rows(x_SBD, {}, {"shift": shift_1BD, "scale": scale_1BD})
    if switch.takes(x_SBD):
        from mpdit_kernels.fused.norm import norm_modulate

        return norm_modulate(x_SBD, shift_1BD, scale_1BD, eps)
    return reference.layer_norm_modulate(x_SBD, shift_1BD, scale_1BD, eps)


def gated_residual(x_SBD: Tensor, gate_1BD: Tensor | None, branch_SBD: Tensor, multiplier: float = 1.0) -> Tensor:
    """x + multiplier * gate * branch; no gate counts as 1."""
    check_rows(x_SBD, {"branch": branch_SBD}, {"gate": gate_1BD})
    if switch.takes(x_SBD):
        from mpdit_kernels.fused.residual import residual

        return residual(x_SBD, gate_1BD, branch_SBD, multiplier)
    return reference.gated_residual(x_SBD, gate_1BD, branch_SBD, multiplier)


def gated_residual_modulate(
    x_SBD: Tensor,
    gate_1BD: Tensor | None,
    branch_SBD: Tensor,
    shift_1BD: Tensor,
    scale_1BD: Tensor,
    multiplier: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(r, y): r = :func:`gated_residual` and y = :func:`layer_norm_modulate` of r, which is read once for both."""
    check_rows(x_SBD, {"branch": branch_SBD}, {"gate": gate_1BD, "shift": shift_1BD, "scale": scale_1BD})
    if switch.takes(x_SBD):
        from mpdit_kernels.fused.norm import sum_norm_modulate

        return sum_norm_modulate(x_SBD, gate_1BD, branch_SBD, shift_1BD, scale_1BD, multiplier, eps)
    return reference.gated_residual_modulate(x_SBD, gate_1BD, branch_SBD, shift_1BD, scale_1BD, multiplier, eps)


def layer_norm(x_SBD: Tensor, gain_D: Tensor, bias_D: Tensor, eps: float = 1e-5) -> Tensor:
    """LN(x) * gain + bias: a LayerNorm's own, the same for every sample."""
    check_rows(x_SBD, {}, {})
    check_vector("gain", gain_D, x_SBD)
    check_vector("bias", bias_D, x_SBD)
    if switch.takes(x_SBD):
        from mpdit_kernels.fused.norm import norm_affine

        return norm_affine(x_SBD, gain_D, bias_D, eps)
    return reference.layer_norm(x_SBD, gain_D, bias_D, eps)


def residual_layer_norm(
    x_SBD: Tensor, branch_SBD: Tensor, gain_D: Tensor, bias_D: Tensor, multiplier: float = 1.0, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(r, y): r = x + multiplier * branch and y = :func:`layer_norm` of r."""
    check_rows(x_SBD, {"branch": branch_SBD}, {})
    check_vector("gain", gain_D, x_SBD)
    check_vector("bias", bias_D, x_SBD)
    if switch.takes(x_SBD):
        from mpdit_kernels.fused.norm import sum_norm_affine

        return sum_norm_affine(x_SBD, branch_SBD, gain_D, bias_D, multiplier, eps)
    return reference.residual_layer_norm(x_SBD, branch_SBD, gain_D, bias_D, multiplier, eps)
