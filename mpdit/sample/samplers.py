"""From noise to images: ODE solvers for rectified flow, DDIM and ancestral sampling for DDPM, and guidance.

Pure functions on [B, C, H, W]. Every sampler starts from the noise it is given and leaves it as it is.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mpdit.errors import InputError
from mpdit.objective.ddpm import TIMESTEPS, Chain, chain

Predict = Callable[[Tensor, float], Tensor]  # images, time in [0, 1] -> C channels, or 2C with variances
NoiseOfStep = Callable[[int], Tensor]  # step, counted from 0 at the noisy end -> fresh standard normal [B, C, H, W]

FITTING = {"flow": ("euler", "heun"), "ddpm": ("ddim", "ddpm")}  # by objective.kind; the first is "auto"


def check(sampler: str, kind: str, steps: int = 1) -> str:
    """The sampler that ``sample.sampler`` means under ``objective.kind``; "auto" is the deterministic first one.

    Raises InputError if it does not fit the objective, or has more steps than the objective has timesteps.
    """
    fitting = FITTING[kind]
    if sampler not in ("auto", *fitting):
        raise InputError(
            f"sample.sampler is {sampler!r}, but objective.kind {kind} needs auto, {' or '.join(fitting)}."
        )
    if kind == "ddpm":
        timesteps(steps)
    return fitting[0] if sampler == "auto" else sampler


def sample(
    sampler: str,
    kind: str,
    predict: Predict,
    noise: Tensor,
    steps: int,
    *,
    learn_sigma: bool,
    noise_of_step: NoiseOfStep,
    clip: bool = True,
) -> Tensor:
    """Images out of `noise` by the sampler of a config; raises InputError as :func:`check` does.

    Only ddpm asks for further noise. `clip` is for ddim and ddpm, and for data in [-1, 1].
    """
    match check(sampler, kind, steps):
        case "euler":
            return euler(predict, noise, steps)
        case "heun":
            return heun(predict, noise, steps)
        case "ddim":
            return ddim(predict, noise, steps, clip=clip)
        case _:
            return ddpm(predict, noise, steps, learn_sigma, noise_of_step, clip=clip)


# ---- rectified flow: from t = 1 to t = 0 along the velocity ----------------------------------------------------------


def euler(velocity: Predict, noise_BCHW: Tensor, steps: int) -> Tensor:
    """`steps` equal Euler steps of dx/dt = velocity(x, t), t from 1 to 0; [B, C, H, W] in and out."""
    x = noise_BCHW
    for t, after in _intervals(steps):
        x = x + (after - t) * velocity(x, t)
    return x


def heun(velocity: Predict, noise_BCHW: Tensor, steps: int) -> Tensor:
    """`steps` equal steps of Heun's second-order method, 2 * `steps` - 1 evaluations; [B, C, H, W] in and out.

    The last step is Euler's: it lands on t = 0, where nothing is asked any more, and one first-order step out of n
    leaves the whole of second order (as algorithm 1 of Karras et al., arXiv 2206.00364).
    """
    x = noise_BCHW
    for t, after in _intervals(steps):
        slope = velocity(x, t)
        if after > 0:
            slope = (slope + velocity(x + (after - t) * slope, after)) / 2
        x = x + (after - t) * slope
    return x


def _intervals(steps: int) -> Iterator[tuple[float, float]]:
    return itertools.pairwise(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist())


# ---- DDPM: from timestep 999 to 0, and to the image ------------------------------------------------------------------


def timesteps(steps: int) -> np.ndarray:
    """The timesteps that `steps` steps visit, rising: evenly spaced from 0 to 999, both included, and rounded.

    As in section 4 of arXiv 2102.09672. A single step is taken from 999, where the image is pure noise.
    Raises InputError for more steps than there are timesteps.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise InputError(
            f"sample.steps is {steps}, but objective.kind ddpm has {TIMESTEPS} timesteps: 1 to {TIMESTEPS}."
        )
    return np.linspace(TIMESTEPS - 1, 0, steps).round().astype(np.int64)[::-1]


def ddim(
    predict: Predict,
    noise_BCHW: Tensor,
    steps: int,
    eta: float = 0.0,
    noise_of_step: NoiseOfStep | None = None,
    *,
    clip: bool = True,
) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502, equations 12 and 16); deterministic at eta 0, as noisy as DDPM at 1.

    `clip` keeps the predicted image in [-1, 1], and the step takes the noise that agrees with the clipped one. A
    predicted variance is ignored. `noise_of_step` is asked only if eta is above 0, and not for the last step.
    """
    x, way = noise_BCHW, chain(timesteps(steps))
    for step, i in enumerate(reversed(range(steps))):
        alpha_bar, before = float(way.alpha_bar[i]), float(way.alpha_bar_before[i])
        clean = _clean(x, predict(x, int(way.timestep[i]) / TIMESTEPS), way, i, clip)
        noise = (x - math.sqrt(alpha_bar) * clean) / math.sqrt(1 - alpha_bar)
        sigma = eta * math.sqrt((1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before))
        x = math.sqrt(before) * clean + math.sqrt(1 - before - sigma**2) * noise
        if sigma > 0:
            if noise_of_step is None:
                raise ValueError("ddim with eta above 0 needs noise_of_step")
            x = x + sigma * noise_of_step(step)
    return x


def ddpm(
    predict: Predict,
    noise_BCHW: Tensor,
    steps: int,
    learn_sigma: bool,
    noise_of_step: NoiseOfStep,
    *,
    clip: bool = True,
) -> Tensor:
    """Ancestral sampling (algorithm 2 of arXiv 2006.11239) over the chain of the timesteps visited.

    The variance is the true posterior's or, with `learn_sigma`, what the second half of the prediction's channels
    says (equation 15 of arXiv 2102.09672); the last step adds no noise. `clip` keeps the predicted image in [-1, 1].
    """
    x, way, channels = noise_BCHW, chain(timesteps(steps)), noise_BCHW.shape[1]
    for step, i in enumerate(reversed(range(steps))):
        predicted = predict(x, int(way.timestep[i]) / TIMESTEPS)
        clean = _clean(x, predicted, way, i, clip)
        x = float(way.mean_clean[i]) * clean + float(way.mean_noisy[i]) * x
        if i == 0:
            break
        fraction = (predicted[:, channels:] + 1) / 2 if learn_sigma else torch.zeros_like(x)
        small, large = float(way.log_var_small[i]), float(way.log_var_large[i])
        x = x + ((small + fraction * (large - small)) / 2).exp() * noise_of_step(step)
    return x


def _clean(x: Tensor, predicted: Tensor, way: Chain, i: int, clip: bool) -> Tensor:
    """The image that the noisy one and the noise predicted in it amount to."""
    alpha_bar = float(way.alpha_bar[i])
    clean = (x - math.sqrt(1 - alpha_bar) * predicted[:, : x.shape[1]]) / math.sqrt(alpha_bar)
    return clean.clamp(-1, 1) if clip else clean


# ---- guidance --------------------------------------------------------------------------------------------------------


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598); 1 is the plain conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


def guided_prediction(conditional: Tensor, unconditional: Tensor, scale: float, learn_sigma: bool) -> Tensor:
    """:func:`guided` for what a network predicts, [B, C, H, W], or [B, 2C, H, W] with `learn_sigma`.

    A learned variance is the conditional prediction's: extrapolated, it would leave the range it was trained in.
    """
    if not learn_sigma:
        return guided(conditional, unconditional, scale)
    (noise, variance), (unconditional_noise, _) = conditional.chunk(2, 1), unconditional.chunk(2, 1)
    return torch.cat([guided(noise, unconditional_noise, scale), variance], 1)
