"""A linear layer whose fp32 products run on oneDNN on the CPU.

torch's own fp32 products on the CPU are MKL's, which on AMD processors uses half of the vector width that is there;
oneDNN, which torch carries for other types, uses all of it on every processor, and is as fast as MKL on Intel's.

Shapes: x [..., K], w [N, K], b [N], y [..., N]; M rows of x, all leading dimensions together.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w' + b: ``torch.nn.functional.linear``, to a rounding of fp32."""
    if _onednn is None or not (x.is_cpu and x.dtype is w.dtype is torch.float32) or not x.numel():
        return F.linear(x, w, b)
    y: Tensor = _Linear.apply(x, w, b)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _product(x.reshape(-1, x.shape[-1]), w, b).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        wants_x, wants_w, wants_b = ctx.needs_input_grad
        dy_MN = grads[0].reshape(-1, w.shape[0])
        dx = _product(dy_MN, w.T).view(x.shape) if wants_x else None
        dw = _product(dy_MN.T, x.reshape(-1, x.shape[-1]).T) if wants_w else None
        return dx, dw, dy_MN.sum(0) if wants_b else None


# An operator of our own around torch's: torch.compile takes that one for weights that never change.
_library = torch.library.Library("mpdit", "DEF")
_library.define("product(Tensor x, Tensor w, Tensor? b=None) -> Tensor")
_product = torch.ops.mpdit.product


@torch.library.impl(_library, "product", "CPU")
def _on_cpu(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    assert _onednn is not None
    y_MN: Tensor = _onednn(x_MK, w_NK, b_N, "none", [], "")
    return y_MN


@torch.library.register_fake("mpdit::product", lib=_library)
def _on_fake(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], w_NK.shape[0])


@register_flop_formula(_product)
def _flops(x_shape: tuple[int, ...], w_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * w_shape[0]
