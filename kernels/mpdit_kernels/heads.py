"""RMSNorm of queries and keys over each head, and rotary positions.

S tokens, B samples, H heads, d head_dim. x is [S, B, H, d] or [B, S, H, d], most often a view of queries, keys and
values in one tensor [S, B, H, 3, d]; the result is contiguous. Types and errors as in modulate.py.
"""

from torch import Tensor

from mpdit_kernels import reference, switch
from mpdit_kernels.shapes import check_heads, check_vector


def head_norm(
    x_SBHd: Tensor, gain_d: Tensor, eps: float = 1e-6, cos_SBe: Tensor | None = None, sin_SBe: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over d (Dehghani et al., arXiv 2302.05442, with RMSNorm), then a rotation.

    The rotation turns each pair of neighbours (2e, 2e + 1) of a head by an angle (Su et al., arXiv 2104.09864, equation
    34) of which cos and sin [S, 1, d / 2] are tables ([1, S, d / 2] for x [B, S, H, d], [S, B, d / 2] if samples have
    their own). They say what the axes are: for two dimensions half of the pairs turn by the row, half by the column.
    Tables are constants: no gradient.
    """
    check_heads(x_SBHd, cos_SBe, sin_SBe)
    check_vector("gain", gain_d, x_SBHd)
    if switch.takes(x_SBHd):
        from mpdit_kernels.fused.heads import norm_heads

        return norm_heads(x_SBHd, gain_d, cos_SBe, sin_SBe, eps)
    y_SBHd = reference.head_norm(x_SBHd, gain_d, eps)
    if cos_SBe is None or sin_SBe is None:
        return y_SBHd
    return reference.rotate(y_SBHd, cos_SBe, sin_SBe)
