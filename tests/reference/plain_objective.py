"""The reference of DDPM's training with a learned variance in plain PyTorch, nothing of mpdit imported.

Noise and its prediction: Ho et al. (arXiv 2006.11239); the variance and its loss: Nichol & Dhariwal (2102.09672), whose
variational bound is taken at one timestep drawn uniformly and, by their stop-gradient, teaches the variance alone.
In float64: written as in the papers, the divergence is a difference of nearly equal numbers. Letters in a name's
suffix are its dimensions, as in plain_common.py; timesteps are 0 .. 999, one less than in the papers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.plain_common import Batch, Shape
from reference.plain_layers import patchify

TIMESTEPS = 1000
BETA_T = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
ALPHA_BAR_T = (1 - BETA_T).cumprod(0)
BEFORE_T = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BAR_T[:-1]])
# Posterior q(x_{t-1} | x_t, x_0): equation 7 of 2006.11239.
CLEAN_T = BEFORE_T.sqrt() * BETA_T / (1 - ALPHA_BAR_T)
NOISY_T = (1 - BETA_T).sqrt() * (1 - BEFORE_T) / (1 - ALPHA_BAR_T)
VARIANCE_T = BETA_T * (1 - BEFORE_T) / (1 - ALPHA_BAR_T)  # of the first it is 0, in whose place the second's stands
LOG_VARIANCE_T = torch.cat([VARIANCE_T[1:2], VARIANCE_T[1:]]).log()


@dataclass(frozen=True, kw_only=True, slots=True)
class Diffusion(Batch):
    """x_t = sqrt(alpha_bar_t) image + sqrt(1 - alpha_bar_t) noise; the noise is to be predicted."""

    timestep_B: Tensor  # long

    def noisy_BCYX(self) -> Tensor:
        alpha_bar_B111 = ALPHA_BAR_T[self.timestep_B, None, None, None]
        noisy_BCYX = alpha_bar_B111.sqrt() * self.image_BCYX + (1 - alpha_bar_B111).sqrt() * self.noise_BCYX
        return noisy_BCYX.to(self.image_BCYX.dtype)

    def target_BCYX(self) -> Tensor:
        return self.noise_BCYX


def diffusion(image_BCYX: Tensor, noise_BCYX: Tensor, uniform_B: Tensor, ids_BL: Tensor) -> Diffusion:
    """The batch at timesteps floor(1000 u); the network is told t / 1000."""
    timestep_B = (TIMESTEPS * uniform_B).floor().long()
    return Diffusion(
        image_BCYX=image_BCYX,
        noise_BCYX=noise_BCYX,
        t_B=(timestep_B / TIMESTEPS).to(image_BCYX.dtype),
        ids_BL=ids_BL,
        timestep_B=timestep_B,
    )


def loss(prediction_SBF: Tensor, s: Shape, batch: Diffusion) -> Tensor:
    """Mean squared error of the noise and, with learn_sigma, the bound in bits a dimension (L_hybrid). -> ()

    Each pixel of the prediction holds the noise of all channels, then the variances of all.
    """
    predicted_SBpC = prediction_SBF.double().unflatten(-1, (-1, s.output_channels))
    noise_SBF = predicted_SBpC[..., : s.channels].flatten(-2)
    error = (noise_SBF - patchify(batch.noise_BCYX.double(), s.patch)).pow(2).mean()
    if not s.learn_sigma:
        return error
    variance_SBF = predicted_SBpC[..., s.channels :].flatten(-2)
    clean_SBF, noisy_SBF = (patchify(x.double(), s.patch) for x in (batch.image_BCYX, batch.noisy_BCYX()))
    return error + bound(noise_SBF.detach(), variance_SBF, clean_SBF, noisy_SBF, batch.timestep_B).mean() / math.log(2)


def bound(noise_SBF: Tensor, variance_SBF: Tensor, clean_SBF: Tensor, noisy_SBF: Tensor, timestep_B: Tensor) -> Tensor:
    """L_{t-1} of each number, in nats; at timestep 0 the code length of its 8-bit pixel, L_0. -> (S,B,F)"""
    alpha_bar_B1, clean_weight_B1, noisy_weight_B1, log_beta_B1, log_variance_B1 = (
        table_T[timestep_B][:, None] for table_T in (ALPHA_BAR_T, CLEAN_T, NOISY_T, BETA_T.log(), LOG_VARIANCE_T)
    )
    predicted_SBF = (noisy_SBF - (1 - alpha_bar_B1).sqrt() * noise_SBF) / alpha_bar_B1.sqrt()
    mean_SBF = clean_weight_B1 * predicted_SBF + noisy_weight_B1 * noisy_SBF
    fraction_SBF = (variance_SBF + 1) / 2  # from the output's [-1, 1] to the v of equation 15 of 2102.09672
    log_SBF = fraction_SBF * log_beta_B1 + (1 - fraction_SBF) * log_variance_B1
    true_mean_SBF = clean_weight_B1 * clean_SBF + noisy_weight_B1 * noisy_SBF
    bound_SBF = gaussian_divergence(true_mean_SBF, log_variance_B1, mean_SBF, log_SBF)
    first_B = timestep_B == 0
    mass_SBF = pixel_mass(clean_SBF[:, first_B], mean_SBF[:, first_B], (log_SBF[:, first_B] / 2).exp())
    return bound_SBF.index_copy(1, first_B.nonzero().flatten(), -mass_SBF.log())


def gaussian_divergence(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(p || q) of two Gaussians, in nats."""
    ratio = (log_var_p - log_var_q).exp()
    return 0.5 * (ratio - 1 + log_var_q - log_var_p + (mean_p - mean_q).pow(2) / log_var_q.exp())


def pixel_mass(pixel: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What a Gaussian puts on the bin of an 8-bit pixel scaled to [-1, 1]: equation 13 of 2006.11239."""
    below, above = (pixel - 1 / 255 - mean) / std, (pixel + 1 / 255 - mean) / std
    below = torch.where(pixel < -0.999, -torch.inf, below)
    above = torch.where(pixel > 0.999, torch.inf, above)
    mirrored = below + above > 0  # to the lower tail, where small masses keep their digits
    below, above = torch.where(mirrored, -above, below), torch.where(mirrored, -below, above)
    return torch.special.ndtr(above) - torch.special.ndtr(below)
