"""Rectified flow with logit-normal times (Esser et al., arXiv 2403.03206, sections 2-3).

x_t = (1 - t) x_0 + t noise; the network predicts the velocity dx_t/dt = noise - x_0.
"""

import dataclasses
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from mpdit.config import Objective
from mpdit.objective import draws


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Noised:
    """noisy and target [B, C, H, W], time [B]; all fp32."""

    noisy_BCHW: Tensor
    target_BCHW: Tensor
    time_B: Tensor


def times(objective: Objective, seed: int, sample_ids: np.ndarray, visits: np.ndarray) -> Tensor:
    """Times in (0, 1), [B], fp32: sigmoid(mean + std * normal) (equation 19 there), or uniform."""
    u = draws.uniform(seed, "time", sample_ids, visits)
    if objective.timesteps == "logit_normal":
        normal = np.array([NormalDist().inv_cdf(x) for x in u])
        u = 1 / (1 + np.exp(-(objective.logit_mean + objective.logit_std * normal)))
    return torch.from_numpy(u).float()


def noised(images_BCHW: Tensor, objective: Objective, seed: int, sample_ids: np.ndarray, visits: np.ndarray) -> Noised:
    """Training pairs for images in [-1, 1]; noise and time are functions of (seed, sample id, visit) alone."""
    noise_BCHW = draws.noise(seed, sample_ids, visits, tuple(images_BCHW.shape[1:])).to(images_BCHW.device)
    time_B = times(objective, seed, sample_ids, visits).to(images_BCHW.device)
    t = time_B[:, None, None, None]
    return Noised(
        noisy_BCHW=(1 - t) * images_BCHW + t * noise_BCHW, target_BCHW=noise_BCHW - images_BCHW, time_B=time_B
    )
