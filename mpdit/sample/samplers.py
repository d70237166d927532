"""ODE solvers for rectified flow: from noise at t = 1 to an image at t = 0 along the predicted velocity."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, noise_BCHW: Tensor, steps: int) -> Tensor:
    """`steps` equal Euler steps of dx/dt = velocity(x, t), t from 1 to 0; [B, C, H, W] in and out."""
    x = noise_BCHW
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    for t, after in itertools.pairwise(times):
        x = x + (after - t) * velocity(x, t)
    return x


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598); 1 is the plain conditional prediction."""
    return unconditional + scale * (conditional - unconditional)
