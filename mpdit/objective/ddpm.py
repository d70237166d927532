"""DDPM: the network predicts the noise and, with `learn_sigma`, the variance of the step back; as DiT trains.

Ho et al., arXiv 2006.11239 (sections 2 and 3.4); Nichol & Dhariwal, arXiv 2102.09672 (sections 2 and 3.1); Peebles
& Xie, arXiv 2212.09748 (section 3.1). x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise; timesteps are
0 .. 999 here and 1 .. 1000 in the papers.
Shapes: B samples, C channels, H x W pixels, S tokens, P features of a token's target, K of its prediction (P or
2P), T timesteps of a chain; a name in B1 has one number a sample.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from mpdit.config import Objective
from mpdit.objective import draws
from mpdit.objective.noising import Noised

TIMESTEPS = 1000
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, TIMESTEPS))  # linear betas; fp64
_HALF_BIN = 1 / 255  # 8-bit pixels scaled to [-1, 1] lie 2/255 apart


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chain:
    """The process that visits some of the timesteps only, in rising order; every field [T], fp64.

    Its true step back is q(x_before | x_t, x_0) = N(mean_clean x_0 + mean_noisy x_t, exp(log_var_small)), as in
    equations 6 and 7 of 2006.11239, with the chain's own betas in place of the full one's (section 4 of 2102.09672).
    """

    timestep: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_before: np.ndarray  # at the timestep visited before; 1, no noise at all, before the first
    mean_clean: np.ndarray
    mean_noisy: np.ndarray
    log_var_small: np.ndarray  # the posterior's; of the first, whose variance is 0, that of the second
    log_var_large: np.ndarray  # beta: the step back's variance if the data were white noise


def chain(timesteps: np.ndarray) -> Chain:
    """The chain over `timesteps`: rising whole numbers from 0 to 999."""
    alpha_bar = ALPHA_BAR[timesteps]
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    variance[0] = variance[1] if len(variance) > 1 else beta[0]
    return Chain(
        timestep=timesteps,
        alpha_bar=alpha_bar,
        alpha_bar_before=before,
        mean_clean=beta * np.sqrt(before) / (1 - alpha_bar),
        mean_noisy=(1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar),
        log_var_small=np.log(variance),
        log_var_large=np.log(beta),
    )


_FULL = chain(np.arange(TIMESTEPS))
_COEFFICIENTS = np.stack(
    [np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR), _FULL.mean_clean, _FULL.log_var_small, _FULL.log_var_large]
)


def timesteps(seed: int, sample_ids: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Uniform whole numbers from 0 to 999, [B]."""
    return (TIMESTEPS * draws.uniform(seed, "time", sample_ids, visits)).astype(np.int64)


def noised(images_BCHW: Tensor, objective: Objective, seed: int, sample_ids: np.ndarray, visits: np.ndarray) -> Noised:
    """Training pairs for fp32 images in [-1, 1] (equation 4 of 2006.11239).

    Noise and timestep are functions of (seed, sample id, visit) alone; no setting of `objective` changes them.
    """
    device = images_BCHW.device
    noise_BCHW = draws.noise(seed, sample_ids, visits, tuple(images_BCHW.shape[1:])).to(device)
    t = timesteps(seed, sample_ids, visits)
    signal, spread = torch.from_numpy(_COEFFICIENTS[:2, t, None, None, None]).float().to(device)
    noisy_BCHW = signal * images_BCHW + spread * noise_BCHW
    return Noised(
        noisy_BCHW=noisy_BCHW,
        time_B=torch.from_numpy(t / TIMESTEPS).float().to(device),
        target={"noise": noise_BCHW, "clean": images_BCHW, "noisy": noisy_BCHW},
    )


def loss(
    prediction_SBK: Tensor, target_SBP: dict[str, Tensor], time_B: Tensor, *, learn_sigma: bool, channels: int
) -> Tensor:
    """Mean squared error of the noise, [B], fp32: the mean over the tokens that are given and their features.

    With `learn_sigma` the variational bound is added, in bits a dimension, and teaches the variance only (section
    3.1 of 2102.09672; the weight 0.001 there is of the sum over timesteps: of one drawn out of 1000 it is 1).
    A prediction is then a patch of 2 * `channels` channels: first the noise's, then the variance's.
    """
    noise_SBP, variance_SBP = prediction_SBK.float(), None
    if learn_sigma:
        halves = noise_SBP.unflatten(-1, (-1, 2, channels))
        noise_SBP, variance_SBP = (half.flatten(-2) for half in halves.unbind(-2))
    loss_SBP = (noise_SBP - target_SBP["noise"]).square()
    if variance_SBP is not None:
        loss_SBP = loss_SBP + bound(noise_SBP.detach(), variance_SBP, target_SBP, time_B)
    return loss_SBP.mean((0, 2))


def bound(noise_SBP: Tensor, variance_SBP: Tensor, target_SBP: dict[str, Tensor], time_B: Tensor) -> Tensor:
    """The variational bound's term at each sample's timestep, in bits, [S, B, P]; equations 4 to 6 of 2102.09672.

    The divergence of the model's step back from the true one or, at timestep 0, the code length of an 8-bit pixel.
    Variances are exp(f log beta + (1 - f) log posterior), f = (variance + 1) / 2 (equation 15, its v being f).
    """
    t_B = (time_B * TIMESTEPS).round().long()
    # So small a copy does not make the host wait for the device.
    table = torch.from_numpy(_COEFFICIENTS).float().to(time_B.device, non_blocking=True)
    signal_B1, spread_B1, mean_clean_B1, small_B1, large_B1 = table[:, t_B, None]
    clean_SBP = (target_SBP["noisy"] - spread_B1 * noise_SBP) / signal_B1
    # Both means hold the same multiple of x_t: it leaves their difference. At timestep 0 the mean is clean_SBP itself.
    offset_SBP = mean_clean_B1 * (target_SBP["clean"] - clean_SBP)
    log_var_SBP = small_B1 + (variance_SBP + 1) / 2 * (large_B1 - small_B1)
    log_ratio_SBP = small_B1 - log_var_SBP
    divergence_SBP = (log_ratio_SBP.expm1() - log_ratio_SBP + offset_SBP.square() * (-log_var_SBP).exp()) / 2
    length_SBP = -_log_bin_mass(target_SBP["clean"], offset_SBP, log_var_SBP / 2)
    return torch.where(t_B[:, None] == 0, length_SBP, divergence_SBP) / math.log(2)


def _log_bin_mass(pixel: Tensor, offset: Tensor, log_std: Tensor) -> Tensor:
    """Log of what a Gaussian puts on the bin of an 8-bit pixel in [-1, 1] that lies `offset` beyond its mean.

    Equation 13 of 2006.11239: the bins of -1 and 1 reach to infinity. In logarithms, so that a pixel far from the
    mean still says in which direction the variance should go.
    """
    per_std = (-log_std).exp()

    def log_below(x: Tensor) -> Tensor:
        # Further out, torch's gradient of log_ndtr is the exponential of what fp32 leaves of a difference.
        return torch.special.log_ndtr((x * per_std).clamp(-100, 100))

    # The Gaussian is symmetric: seen from below, the difference of two tails keeps its digits.
    upper, lower = log_below(_HALF_BIN - offset.abs()), log_below(-_HALF_BIN - offset.abs())
    gap = (upper - lower).clamp_min(torch.finfo(upper.dtype).eps)  # a diverged variance makes both tails the same
    inside = upper + (-(-gap).expm1()).log()
    outermost = log_below(_HALF_BIN - pixel.sign() * offset)
    return torch.where(pixel.abs() > 0.999, outermost, inside)
