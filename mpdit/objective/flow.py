"""Rectified flow with logit-normal times (Esser et al., arXiv 2403.03206, sections 2-3).

x_t = (1 - t) x_0 + t noise; the network predicts the velocity dx_t/dt = noise - x_0.
Shapes: B samples, C channels, H x W pixels, S tokens, P features of a token's target, K = P of its prediction.
"""

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from mpdit.config import Objective
from mpdit.errors import InputError
from mpdit.objective import draws
from mpdit.objective.noising import Noised


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
    noisy_BCHW = (1 - t) * images_BCHW + t * noise_BCHW
    return Noised(noisy_BCHW=noisy_BCHW, time_B=time_B, target={"velocity": noise_BCHW - images_BCHW})


def loss(
    prediction_SBK: Tensor, target_SBP: dict[str, Tensor], time_B: Tensor, *, learn_sigma: bool, channels: int
) -> Tensor:
    """Mean squared error of the velocity, [B], fp32: the mean over the tokens that are given and their features.

    `time_B` and `channels` are what other objectives need. Raises InputError for `learn_sigma`: a flow has none.
    """
    if learn_sigma:
        raise InputError("model.learn_sigma is true, but objective.kind flow has no variance to learn; ddpm has one.")
    return (prediction_SBK.float() - target_SBP["velocity"]).square().mean((0, 2))
