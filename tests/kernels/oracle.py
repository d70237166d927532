"""The fused operations written out in float64, and how far from them an implementation is, forward and backward.

The formulas are the papers', not the package's: nothing here calls mpdit_kernels or torch's own norms.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Leaves = Mapping[str, Tensor]
Arguments = Callable[[Leaves], tuple[Any, ...]]


def normed(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return normed(x, eps) * (1 + scale) + shift


def gated_residual(x: Tensor, gate: Tensor | None, branch: Tensor, multiplier: float = 1.0) -> Tensor:
    return x + multiplier * (branch if gate is None else gate * branch)


def gated_residual_modulate(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    multiplier: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    r = gated_residual(x, gate, branch, multiplier)
    return r, layer_norm_modulate(r, shift, scale, eps)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return normed(x, eps) * gain + bias


def residual_layer_norm(
    x: Tensor, branch: Tensor, gain: Tensor, bias: Tensor, multiplier: float = 1.0, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    r = x + multiplier * branch
    return r, layer_norm(r, gain, bias, eps)


def head_norm(x: Tensor, gain: Tensor, eps: float = 1e-6, cos: Any = None, sin: Any = None) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain
    if cos is None:
        return y
    turned = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)[:, :, None]
    return torch.view_as_real(turned).flatten(-2)


def errors(
    operation: Callable[..., Any], oracle: Callable[..., Any], leaves: Leaves, arguments: Arguments, *constants: Any
) -> dict[str, float]:
    """The largest error of each output (y0, y1) and of each leaf's gradient, relative to its largest value.

    `arguments` makes the operation's out of the leaves, as views or otherwise; `constants` follow them. Tables of
    angles are arguments made of leaves without gradients, by names that begin with "_". Raises AssertionError where a
    gradient has another type, or on a GPU a second run gives other bits.
    """
    given = {name: x.detach().requires_grad_(not name.startswith("_")) for name, x in leaves.items()}
    exact = {name: x.detach().double().requires_grad_(not name.startswith("_")) for name, x in leaves.items()}
    outputs, gradients = _run(operation, given, arguments, constants)
    wanted, wanted_gradients = _run(oracle, exact, arguments, constants)
    found = {f"y{i}": (y, exact_y) for i, (y, exact_y) in enumerate(zip(outputs, wanted, strict=True))}
    found |= {name: (gradients[name], wanted_gradients[name]) for name in gradients}
    if outputs[0].is_cuda:  # elsewhere nothing is concurrent
        again, gradients_again = _run(operation, given, arguments, constants)
        assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
        assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    assert all(gradients[name].dtype is given[name].dtype for name in gradients)
    return {name: _relative(ours, theirs) for name, (ours, theirs) in found.items()}


def _run(
    operation: Callable[..., Any], leaves: Leaves, arguments: Arguments, constants: tuple[Any, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs = operation(*arguments(leaves), *constants)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    cotangents = [_cotangent(y, index) for index, y in enumerate(outputs)]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(outputs, list(wanted.values()), cotangents)
    return [y.detach() for y in outputs], dict(zip(wanted, found, strict=True))


def _cotangent(y: Tensor, index: int) -> Tensor:
    """Numbers that every type holds; each output's with strides of its own, as backward passes of others leave them."""
    wide = random(*y.shape[:-1], 2 * y.shape[-1], seed=7 + index).half().to(y.device, y.dtype)
    return wide[..., ::2] if index else wide[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)


def _relative(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    if not exact.numel():
        return 0.0
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-6))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
