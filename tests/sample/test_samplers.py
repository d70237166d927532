"""Samplers and guidance against what can be worked out by hand, against diffusers, and on a Gaussian."""

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mpdit.errors import InputError
from mpdit.sample import samplers
from mpdit.sample.samplers import ddim, ddpm, euler, guided, heun

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def noise() -> torch.Tensor:
    return torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 3, 2, 2)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_euler_is_exact_for_a_constant_velocity(steps: int) -> None:
    image = noise().flip(0)
    found = euler(lambda x, t: noise() - image, noise(), steps)  # a flow that has learned one image by heart
    torch.testing.assert_close(found, image, rtol=0, atol=1e-12)


def test_euler_goes_from_one_to_zero_in_equal_steps_and_never_asks_at_zero() -> None:
    asked: list[float] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    euler(velocity, noise(), 4)
    assert asked == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-12)


def test_euler_is_of_first_order() -> None:
    """dx/dt = x back from t = 1 leaves x(1) / e; the error halves with the step."""
    errors = []
    for steps in (20, 40, 80, 160):
        found = euler(lambda x, t: x, noise(), steps)
        torch.testing.assert_close(found, noise() * (1 - 1 / steps) ** steps, rtol=1e-12, atol=0)
        errors.append((found - noise() / math.e).abs().max().item())
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert ratios == pytest.approx([2.0] * 3, rel=0.03)
    assert errors[-1] < 0.01


def test_euler_uses_the_time_that_it_stands_at() -> None:
    """dx/dt = t: the exact change is -1/2, Euler's is -(1 + 1/n) / 2."""
    for steps in (1, 5, 50):
        found = euler(lambda x, t: torch.full_like(x, t), noise(), steps)
        torch.testing.assert_close(found, noise() - (1 + 1 / steps) / 2, rtol=0, atol=1e-12)


def test_euler_leaves_the_noise_as_it_is() -> None:
    given = noise()
    euler(lambda x, t: torch.ones_like(x), given, 3)
    assert torch.equal(given, noise())


# ---- which sampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "kind", "meant"),
    [
        ("auto", "flow", "euler"),
        ("auto", "ddpm", "ddim"),
        ("euler", "flow", "euler"),
        ("heun", "flow", "heun"),
        ("ddim", "ddpm", "ddim"),
        ("ddpm", "ddpm", "ddpm"),
    ],
)
def test_a_sampler_that_fits_is_taken_and_draws_what_it_draws_alone(sampler: str, kind: str, meant: str) -> None:
    assert samplers.check(sampler, kind) == meant
    predict, x = tanh_network(False), noise() / 2
    alone = {
        "euler": lambda: euler(predict, x, 5),
        "heun": lambda: heun(predict, x, 5),
        "ddim": lambda: ddim(predict, x, 5),
        "ddpm": lambda: ddpm(predict, x, 5, False, fresh),
    }
    found = samplers.sample(sampler, kind, predict, x, 5, learn_sigma=False, noise_of_step=fresh)
    assert torch.equal(found, alone[meant]())


@pytest.mark.parametrize(
    ("sampler", "kind", "fitting"),
    [
        ("ddim", "flow", "auto, euler or heun"),
        ("ddpm", "flow", "auto, euler or heun"),
        ("euler", "ddpm", "auto, ddim or ddpm"),
        ("heun", "ddpm", "auto, ddim or ddpm"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused_with_those_that_do(sampler: str, kind: str, fitting: str) -> None:
    for refused in (
        lambda: samplers.check(sampler, kind),
        lambda: samplers.sample(sampler, kind, tanh_network(False), noise(), 5, learn_sigma=False, noise_of_step=fresh),
    ):
        with pytest.raises(InputError, match=rf"sample\.sampler is '{sampler}'.*objective\.kind {kind}.*{fitting}"):
            refused()


@pytest.mark.parametrize("steps", [0, 1001])
def test_ddpm_has_a_thousand_timesteps_and_no_more(steps: int) -> None:
    with pytest.raises(InputError, match=rf"sample\.steps is {steps}.*1 to 1000"):
        samplers.check("ddpm", "ddpm", steps)
    assert samplers.check("heun", "flow", 1001) == "heun"


# ---- Heun ------------------------------------------------------------------------------------------------------------


def test_heun_is_of_second_order_though_its_last_step_is_eulers() -> None:
    errors = []
    for steps in (20, 40, 80, 160):
        found = heun(lambda x, t: x, noise(), steps)
        expected = noise() * (1 - 1 / steps + 0.5 / steps**2) ** (steps - 1) * (1 - 1 / steps)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        errors.append((found - noise() / math.e).abs().max().item())
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert ratios == pytest.approx([4.0] * 3, rel=0.05)


def test_heun_asks_at_both_ends_of_a_step_and_never_at_zero() -> None:
    asked: list[float] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        asked.append(t)
        return torch.full_like(x, t)

    found = heun(velocity, noise(), 4)
    assert asked == pytest.approx([1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25], abs=1e-12)
    torch.testing.assert_close(found, noise() - (1 - 0.25**2) / 2 - 0.25**2, rtol=0, atol=1e-12)  # trapezia, a box


# ---- DDPM against diffusers ------------------------------------------------------------------------------------------


def fresh(step: int) -> torch.Tensor:
    return torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def tanh_network(learn_sigma: bool) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """Some smooth function of image and time, with a variance between the bounds."""

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        eps = torch.tanh(1.3 * x + t) + 0.1 * x.roll(1, 1)
        return torch.cat([eps, torch.tanh(x.flip(1) - 3 * t)], 1) if learn_sigma else eps

    return predict


def diffusers_sampler(name: str, timesteps: list[int], **settings: Any) -> Any:
    scheduler = getattr(importlib.import_module("diffusers"), name)(beta_schedule="linear", **settings)
    scheduler.alphas_cumprod = ALPHA_BAR.clone()  # its own table, without the rounding to fp32
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == timesteps[::-1]
    return scheduler


def diffusers_draws(
    scheduler: Any, predict: Callable[[torch.Tensor, float], torch.Tensor], **step: Any
) -> torch.Tensor:
    x = noise()
    for number, t in enumerate(scheduler.timesteps.tolist()):
        generator = torch.Generator().manual_seed(number)
        x = scheduler.step(predict(x, t / 1000), t, x, generator=generator, **step).prev_sample
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("steps", [2, 10, 30, 1000])
def test_ddpm_is_diffusers_ancestral_sampling(steps: int, learn_sigma: bool, clip: bool) -> None:
    """Respaced too: diffusers' "linspace" visits the same timesteps."""
    visited = samplers.timesteps(steps).tolist()
    variance = "learned_range" if learn_sigma else "fixed_small"
    scheduler = diffusers_sampler(
        "DDPMScheduler", visited, variance_type=variance, clip_sample=clip, timestep_spacing="linspace"
    )
    found = ddpm(tanh_network(learn_sigma), noise(), steps, learn_sigma, fresh, clip=clip)
    torch.testing.assert_close(found, diffusers_draws(scheduler, tanh_network(learn_sigma)), rtol=1e-8, atol=1e-8)
    assert clip is False or found.abs().max() <= 1


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(1000, "linspace"), (10, "leading"), (10, "trailing"), (40, "trailing")]
)
def test_ddim_is_diffusers_ddim(
    steps: int, spacing: str, eta: float, clip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps are fewer, at the timesteps of one of diffusers' spacings: its DDIM takes them to be equal."""
    visited = {
        "linspace": np.arange(1000),
        "leading": np.arange(0, 1000, 1000 // steps),
        "trailing": np.arange(1000 // steps, 1001, 1000 // steps) - 1,
    }[spacing]
    scheduler = diffusers_sampler("DDIMScheduler", visited.tolist(), clip_sample=clip, timestep_spacing=spacing)
    monkeypatch.setattr(samplers, "timesteps", lambda steps: visited)
    found = ddim(tanh_network(False), noise(), steps, eta, fresh, clip=clip)
    expected = diffusers_draws(scheduler, tanh_network(False), eta=eta, use_clipped_model_output=clip)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_ddim_takes_the_noise_half_of_a_prediction_with_a_variance() -> None:
    assert torch.equal(ddim(tanh_network(True), noise(), 5), ddim(tanh_network(False), noise(), 5))


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 250, 999, 1000])
def test_timesteps_are_evenly_spaced_and_start_from_pure_noise(steps: int) -> None:
    visited = samplers.timesteps(steps)
    assert len(visited) == steps
    assert visited[-1] == 999
    if steps > 1:
        gaps = np.diff(visited)
        assert visited[0] == 0
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1
    if steps == 1000:
        assert visited.tolist() == list(range(1000))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim at eta 1"])
def test_fresh_noise_is_asked_for_once_a_step_from_0_and_not_for_the_last(sampler: str) -> None:
    steps: list[int] = []
    times: list[float] = []

    def counted(step: int) -> torch.Tensor:
        steps.append(step)
        return fresh(step)

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        return tanh_network(False)(x, t)

    start = noise()
    if sampler == "ddpm":
        ddpm(predict, start, 4, False, counted)
    else:
        ddim(predict, start, 4, 1.0, counted)
    assert steps == [0, 1, 2]
    assert times == [0.999, 0.666, 0.333, 0.0]
    assert torch.equal(start, noise()), "the noise is left as it was"


def test_ddim_at_eta_zero_needs_no_fresh_noise_and_says_so_above() -> None:
    ddim(tanh_network(False), noise(), 3)
    with pytest.raises(ValueError, match="noise_of_step"):
        ddim(tanh_network(False), noise(), 3, 0.5)


# ---- a Gaussian, whose best prediction is known ----------------------------------------------------------------------

MEAN, STD = 0.3, 0.5


def quantiles() -> torch.Tensor:
    """4000 values, [1, 1, 40, 100], whose mean is 0 and whose standard deviation is 1, as a normal's are."""
    x = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    return (x / x.std(correction=0)).reshape(1, 1, 40, 100)


def best_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[noise - x_0 | x_t] where x_0 is normal and x_t = (1 - t) x_0 + t noise."""
    deviation = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
    return t * deviation - (MEAN + (1 - t) * STD**2 * deviation)


def best_noise(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[noise | x_t] where x_0 is normal."""
    bar = float(ALPHA_BAR[round(1000 * t)])
    return math.sqrt(1 - bar) * (x - math.sqrt(bar) * MEAN) / (bar * STD**2 + 1 - bar)


def best_noise_and_variance(steps: int) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """With the variance of q(x_before | x_t), by Bayes' rule, as a fraction between the taken steps' bounds."""
    visited = np.linspace(0, 999, steps).round().astype(int)

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        i = int(np.flatnonzero(visited == round(1000 * t))[0])
        now, before = float(ALPHA_BAR[visited[i]]), float(ALPHA_BAR[visited[i - 1]]) if i else 1.0
        ratio = now / before
        prior = before * STD**2 + 1 - before  # of x_before
        variance = 1 / (1 / prior + ratio / (1 - ratio))
        small = (1 - ratio) * (1 - before) / (1 - now)
        fraction = math.log(variance / small) / math.log((1 - ratio) / small) if i else 0.0
        return torch.cat([best_noise(x, t), torch.full_like(x, 2 * fraction - 1)], 1)

    return predict


def moments(x: torch.Tensor) -> tuple[float, float]:
    return x.mean().item(), x.std(correction=0).item()


def independent(seed: int) -> Callable[[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(1, 1, 100, 400, generator=generator, dtype=torch.float64)


def test_heun_reproduces_a_gaussian_and_better_than_euler_at_equal_steps_and_at_equal_cost() -> None:
    def error(found: torch.Tensor) -> float:
        mean, std = moments(found)
        return abs(mean - MEAN) + abs(std - STD)

    for steps in (8, 20, 60):
        second = error(heun(best_velocity, quantiles(), steps))
        assert second < error(euler(best_velocity, quantiles(), steps)) / 3
        assert second < error(euler(best_velocity, quantiles(), 2 * steps)) / 2
    assert error(euler(best_velocity, quantiles(), 400)) < 5e-3
    assert error(heun(best_velocity, quantiles(), 60)) < 5e-4


def test_ddim_reproduces_a_gaussian() -> None:
    """Deterministic, so the normal's shape survives too: noise is mapped to the image by one straight line."""
    found = ddim(best_noise, quantiles(), 1000, clip=False)
    assert moments(found) == pytest.approx((MEAN, STD), abs=4e-3)
    torch.testing.assert_close(found, MEAN + STD * quantiles(), rtol=0, atol=2e-2)
    assert moments(ddim(best_noise, quantiles(), 50, clip=False)) == pytest.approx((MEAN, STD), abs=4e-2)


def test_ancestral_sampling_reproduces_a_gaussian() -> None:
    start = independent(0)(0)
    found = ddpm(best_noise, start, 1000, False, independent(1), clip=False)
    assert moments(found) == pytest.approx((MEAN, STD), abs=1e-2)


@pytest.mark.parametrize("steps", [5, 20, 200])
def test_the_right_variance_makes_few_steps_as_good_as_many(steps: int) -> None:
    """Interpolated between the bounds of the steps really taken, it makes a Gaussian exact at any number."""
    start = independent(0)(0)
    found = ddpm(best_noise_and_variance(steps), start, steps, True, independent(1), clip=False)
    assert moments(found) == pytest.approx((MEAN, STD), abs=1e-2)
    fixed = ddpm(best_noise, start, steps, False, independent(1), clip=False)
    assert abs(moments(fixed)[1] - STD) > (0.02 if steps < 100 else 0), "what the learned one is for"


# ---- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_of_one_changes_nothing() -> None:
    conditional, unconditional = noise(), noise().flip(0) * 3
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional, rtol=0, atol=1e-12)


def test_guidance_goes_away_from_the_unconditional_prediction() -> None:
    conditional, unconditional = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guided(conditional, unconditional, 0.0).tolist() == [1.0, 1.0]
    assert guided(conditional, unconditional, 0.5).tolist() == [1.5, 0.0]
    assert guided(conditional, unconditional, 3.0).tolist() == [4.0, -5.0]
    assert guided(conditional, conditional, 7.0).tolist() == [2.0, -1.0]


def test_guidance_of_a_prediction_with_a_variance_moves_the_noise_alone() -> None:
    conditional, unconditional = (torch.stack([noise(), noise() + 5], 1).reshape(2, 6, 2, 2) * s for s in (1.0, -0.5))
    found = samplers.guided_prediction(conditional, unconditional, 3.0, learn_sigma=True)
    assert torch.equal(found[:, :3], guided(conditional[:, :3], unconditional[:, :3], 3.0))
    assert torch.equal(found[:, 3:], conditional[:, 3:])
    plain = samplers.guided_prediction(conditional, unconditional, 3.0, learn_sigma=False)
    assert torch.equal(plain, guided(conditional, unconditional, 3.0))
