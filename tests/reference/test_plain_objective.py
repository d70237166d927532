"""The reference of DDPM's loss against what its papers' equations say of it, and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from reference import plain_common, plain_objective
from reference.plain_objective import ALPHA_BAR_T, BEFORE_T, BETA_T, CLEAN_T, NOISY_T, TIMESTEPS, VARIANCE_T

SHAPE = plain_common.Shape(width=8, depth=1, patch=2, channels=3, learn_sigma=True)


def batch(timesteps: list[int]) -> plain_objective.Diffusion:
    g = torch.Generator().manual_seed(0)
    size = (len(timesteps), 3, 6, 4)
    return plain_objective.diffusion(
        torch.randint(0, 256, size, generator=g) / 127.5 - 1,
        torch.randn(size, generator=g),
        (torch.tensor(timesteps) + 0.5) / TIMESTEPS,
        torch.zeros(len(timesteps), 1, dtype=torch.long),
    )


def tokens(noise_BCYX: torch.Tensor, variance_BCYX: torch.Tensor) -> torch.Tensor:
    return plain_common.patchify(torch.cat([noise_BCYX, variance_BCYX], 1), SHAPE.patch)


def test_the_posterior_is_bayes_rule() -> None:
    """q(x_before | x_t, x_0) is q(x_t | x_before) q(x_before | x_0), whose precisions add."""
    likelihood, prior = (1 - BETA_T[1:]) / BETA_T[1:], 1 / (1 - BEFORE_T[1:])
    torch.testing.assert_close(VARIANCE_T[1:], 1 / (likelihood + prior))
    torch.testing.assert_close(CLEAN_T[1:], VARIANCE_T[1:] * prior * BEFORE_T[1:].sqrt())
    torch.testing.assert_close(NOISY_T[1:], VARIANCE_T[1:] * likelihood / (1 - BETA_T[1:]).sqrt())
    assert ALPHA_BAR_T[-1].item() == pytest.approx(4.04e-5, rel=1e-2)


def test_of_the_true_noise_and_variance_only_the_pixels_code_is_left() -> None:
    b = batch([1, 500, 999])
    smallest = tokens(b.noise_BCYX, torch.full_like(b.noise_BCYX, -1.0))
    assert plain_objective.loss(smallest, SHAPE, b).item() == pytest.approx(0, abs=1e-6)
    largest = tokens(b.noise_BCYX, torch.full_like(b.noise_BCYX, 1.0))
    ratio = VARIANCE_T[b.timestep_B] / BETA_T[b.timestep_B]
    bits = (ratio - 1 - ratio.log()).mean() / 2 / math.log(2)
    assert plain_objective.loss(largest, SHAPE, b).item() == pytest.approx(bits.item(), abs=1e-6)


def test_the_divergence_is_that_of_torch() -> None:
    g = torch.Generator().manual_seed(1)
    mean_p, log_p, mean_q, log_q = torch.randn(4, 50, generator=g, dtype=torch.float64)
    wanted = kl_divergence(Normal(mean_p, (log_p / 2).exp()), Normal(mean_q, (log_q / 2).exp()))
    torch.testing.assert_close(plain_objective.gaussian_divergence(mean_p, log_p, mean_q, log_q), wanted)


@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.0, 0.999, 3.0])
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.5])
def test_the_masses_of_all_pixels_are_one(mean: float, std: float) -> None:
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    masses = plain_objective.pixel_mass(pixels, torch.tensor(mean), torch.tensor(std))
    assert masses.min() >= 0
    assert masses.sum().item() == pytest.approx(1, abs=1e-12)


def test_the_bound_teaches_the_variance_alone() -> None:
    b = batch([0, 0, 300])
    g = torch.Generator().manual_seed(2)
    noise, variance = (torch.randn(b.noise_BCYX.shape, generator=g).requires_grad_() for _ in range(2))
    plain_objective.loss(tokens(noise, variance), SHAPE, b).backward()
    torch.testing.assert_close(noise.grad, 2 * (noise - b.noise_BCYX).detach() / noise.numel())
    assert variance.grad is not None
    assert variance.grad.isfinite().all()
    assert (variance.grad != 0).all()
