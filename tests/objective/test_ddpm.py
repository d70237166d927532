"""DDPM: pairs, posterior and loss against diffusers and float64 probability theory; one interface for objectives.

Shapes: 6 images of 3 channels and 4 x 4 pixels, patches of 2: S = 4 tokens, P = 12 features.
"""

import importlib
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from mpdit import objective as objectives
from mpdit.config import Objective
from mpdit.models.layers import patchify, unpatchify
from mpdit.objective import ddpm, draws, flow

DDPM = Objective(kind="ddpm")
CHANNELS, PATCH = 3, 2
BETA = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETA)
keys = st.tuples(st.integers(0, 2**40), st.integers(-1, 1000))


def images(count: int) -> torch.Tensor:
    """8-bit pixels in [-1, 1], black and white among them."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, CHANNELS, 4, 4))
    pixels[:, :, 0, 0], pixels[:, :, 1, 1] = 0, 255
    return torch.from_numpy(pixels / 127.5 - 1).float()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(samples: np.ndarray, seed: int = 5) -> objectives.Noised:
    return ddpm.noised(images(len(samples)), DDPM, seed, samples, np.zeros_like(samples))


def at(timesteps: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Targets [S, B, P] and times [B] at timesteps of one's choice."""
    clean, noise = images(len(timesteps)), randn(len(timesteps), CHANNELS, 4, 4, seed=1)
    alpha_bar = torch.from_numpy(ALPHA_BAR[timesteps])[:, None, None, None]
    noisy = (alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise).float()
    target = {name: patchify(x, PATCH) for name, x in {"clean": clean, "noise": noise, "noisy": noisy}.items()}
    return target, torch.tensor(timesteps) / 1000


def prediction(target: dict[str, torch.Tensor], error: float, variance: torch.Tensor | float) -> torch.Tensor:
    """[S, B, 2P] laid out as the network's: patches of an image of 2C channels, C of noise and C of variance."""
    S, B, P = target["noise"].shape
    guess = target["noise"] + error * randn(S, B, P, seed=2)
    spread = torch.as_tensor(variance).expand(S, B, P)
    return patchify(torch.cat([unpatchify(x, PATCH, 4, 4) for x in (guess, spread)], 1), PATCH)


def loss(predicted: torch.Tensor, target: dict[str, torch.Tensor], time_B: torch.Tensor) -> torch.Tensor:
    return ddpm.loss(predicted, target, time_B, learn_sigma=True, channels=CHANNELS)


# ---- one interface ---------------------------------------------------------------------------------------------------


def test_objectives_are_told_apart_by_name_and_called_alike() -> None:
    assert objectives.of("flow") is flow
    assert objectives.of("ddpm") is ddpm
    for name in ("noised", "loss"):
        signatures = [inspect.signature(getattr(module, name)) for module in (flow, ddpm)]
        assert signatures[0] == signatures[1], name


# ---- the pair --------------------------------------------------------------------------------------------------------


def test_the_pair_is_diffusers_add_noise_at_the_samples_timestep() -> None:
    scheduler = importlib.import_module("diffusers").DDPMScheduler(beta_schedule="linear")
    samples = np.arange(400)
    found, clean = pair(samples), images(400)
    noise = draws.noise(5, samples, np.zeros_like(samples), (CHANNELS, 4, 4))
    t = torch.from_numpy(np.floor(1000 * draws.uniform(5, "time", samples, np.zeros_like(samples)))).long()
    torch.testing.assert_close(found.noisy_BCHW, scheduler.add_noise(clean, noise, t), rtol=0, atol=2e-5)
    assert torch.equal((found.time_B * 1000).round().long(), t)
    assert found.target.keys() == {"noise", "clean", "noisy"}
    assert torch.equal(found.target["noise"], noise)
    assert torch.equal(found.target["clean"], clean)
    assert torch.equal(found.target["noisy"], found.noisy_BCHW)
    for value in (found.noisy_BCHW, found.time_B, *found.target.values()):
        assert value.dtype == torch.float32


def test_timesteps_are_uniform_from_0_to_999() -> None:
    n = 100_000
    t = ddpm.timesteps(3, np.arange(n), np.zeros(n, np.int64))
    assert (t.min(), t.max()) == (0, 999)
    counts = np.bincount(t, minlength=1000)
    assert ((counts - 100) ** 2 / 100).sum() == pytest.approx(999, abs=5 * math.sqrt(2 * 999))  # chi-squared


@settings(deadline=None, max_examples=40)
@given(batch=st.lists(keys, min_size=1, max_size=5), seed=st.integers(0, 2**63), kind=st.sampled_from(["flow", "ddpm"]))
def test_a_samples_pair_is_its_own_whatever_the_batch(batch: list[tuple[int, int]], seed: int, kind: str) -> None:
    module, objective = objectives.of(kind), Objective(kind=kind)  # type: ignore[arg-type]
    samples, visits = (np.array(column) for column in zip(*batch, strict=True))
    clean = images(5)[:1].expand(len(batch), -1, -1, -1)
    whole = module.noised(clean, objective, seed, samples, visits)
    for i in range(len(batch)):
        alone = module.noised(clean[:1], objective, seed, samples[i : i + 1], visits[i : i + 1])
        assert torch.equal(whole.noisy_BCHW[i], alone.noisy_BCHW[0])
        assert torch.equal(whole.time_B[i], alone.time_B[0])
        for name, value in whole.target.items():
            assert torch.equal(value[i], alone.target[name][0]), name


# ---- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_the_posterior_variance_is_diffusers(variance_type: str) -> None:
    scheduler = importlib.import_module("diffusers").DDPMScheduler(beta_schedule="linear", variance_type=variance_type)
    scheduler.alphas_cumprod = torch.from_numpy(ALPHA_BAR)  # its own table, without the rounding to fp32
    full = ddpm.chain(np.arange(1000))
    for t in (1, 2, 10, 500, 999):
        if variance_type == "fixed_small":
            assert full.log_var_small[t] == pytest.approx(math.log(scheduler._get_variance(t)), abs=1e-9)
        else:
            found = [scheduler._get_variance(t, predicted_variance=torch.tensor(v)) for v in (-1.0, 1.0)]
            assert [full.log_var_small[t], full.log_var_large[t]] == pytest.approx([float(x) for x in found], abs=1e-9)
    assert full.log_var_small[0] == full.log_var_small[1]  # as improved DDPM: the first step's own would be log 0
    np.testing.assert_allclose(np.exp(full.log_var_large), BETA, rtol=1e-11)


@pytest.mark.parametrize("visited", [np.arange(1000), np.array([0, 1, 7, 333, 999]), np.array([999])])
def test_the_posterior_is_bayes_rule_over_the_timesteps_visited(visited: np.ndarray) -> None:
    """q(x_before | x_t, x_0) worked out from two Gaussians: precision and precision-weighted mean add up."""
    found = ddpm.chain(visited)
    for i in range(1, len(visited)):
        before, now = ALPHA_BAR[visited[i - 1]], ALPHA_BAR[visited[i]]
        ratio = now / before  # x_t = sqrt(ratio) x_before + sqrt(1 - ratio) noise
        precision = 1 / (1 - before) + ratio / (1 - ratio)
        assert found.log_var_small[i] == pytest.approx(-math.log(precision), abs=1e-9)
        assert found.mean_clean[i] == pytest.approx(math.sqrt(before) / (1 - before) / precision, rel=1e-9)
        assert found.mean_noisy[i] == pytest.approx(math.sqrt(ratio) / (1 - ratio) / precision, rel=1e-9)
    assert (found.mean_clean[0], found.mean_noisy[0], found.alpha_bar_before[0]) == (1.0, 0.0, 1.0)
    assert np.isfinite(found.log_var_small).all()


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_without_a_variance_the_loss_is_the_noises_mean_square_of_each_sample() -> None:
    target, time_B = at([0, 10, 999])
    predicted = randn(4, 3, 12)
    found = ddpm.loss(predicted, target, time_B, learn_sigma=False, channels=CHANNELS)
    expected = ((predicted - target["noise"]).numpy() ** 2).mean((0, 2))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert (ddpm.loss(target["noise"], target, time_B, learn_sigma=False, channels=CHANNELS) == 0).all()


def reference_bits(target: dict[str, torch.Tensor], predicted: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """The bound in float64 [B]: torch's Kullback-Leibler divergence; at timestep 0 a difference of cdfs."""
    S, B, _ = predicted.shape
    eps, v = (x.double() for x in predicted.reshape(S, B, -1, 2 * CHANNELS).split(CHANNELS, -1))
    clean, noisy = (target[name].double().reshape(S, B, -1, CHANNELS) for name in ("clean", "noisy"))
    bits = []
    for b, t in enumerate(timesteps):
        bar, before, beta = ALPHA_BAR[t], ALPHA_BAR[t - 1] if t else 1.0, BETA[t]
        small = (1 - ALPHA_BAR[max(t, 1) - 1]) / (1 - ALPHA_BAR[max(t, 1)]) * BETA[max(t, 1)]
        x, y, f = clean[:, b], noisy[:, b], (v[:, b] + 1) / 2
        guess = (y - math.sqrt(1 - bar) * eps[:, b]) / math.sqrt(bar)

        def mean(x0: torch.Tensor) -> torch.Tensor:
            weights = math.sqrt(before) * beta / (1 - bar), math.sqrt(1 - beta) * (1 - before) / (1 - bar)  # noqa: B023
            return weights[0] * x0 + weights[1] * y  # noqa: B023

        model = Normal(mean(guess), (f * math.log(beta) + (1 - f) * math.log(small)).mul(0.5).exp())
        if t:
            nats = kl_divergence(Normal(mean(x), math.sqrt(small)), model)
        else:
            above = torch.where(x > 0.999, 1.0, model.cdf(x + 1 / 255))
            nats = -(above - torch.where(x < -0.999, 0.0, model.cdf(x - 1 / 255))).log()
        bits.append(nats.mean() / math.log(2))
    return torch.stack(bits)


@pytest.mark.parametrize("error", [0.0, 0.3, 1.0])
def test_the_bound_is_the_divergence_of_the_steps_and_the_pixels_code_length(error: float) -> None:
    timesteps = [0, 1, 2, 50, 251, 999]  # in fp32 0.251 * 1000 is less than 251
    target, time_B = at(timesteps)
    predicted = prediction(target, error, randn(4, 6, 12, seed=3))
    S, B, P = target["noise"].shape
    noise = predicted.reshape(S, B, -1, 2, CHANNELS)[:, :, :, 0].reshape(S, B, P)
    squares = (noise - target["noise"]).square().mean((0, 2))
    found = loss(predicted, target, time_B) - squares
    torch.testing.assert_close(found.double(), reference_bits(target, predicted, timesteps), rtol=2e-5, atol=2e-6)


def test_a_prediction_in_bf16_is_judged_in_fp32() -> None:
    target, time_B = at([0, 1, 500])
    predicted = prediction(target, 0.5, 0.3).bfloat16()
    found = loss(predicted, target, time_B)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(predicted.float(), target, time_B))


def test_the_right_noise_and_the_right_variance_leave_no_bound() -> None:
    """v = -1 is the posterior's own variance; what is left at timestep 0 is the pixel's code length."""
    target, time_B = at([1, 2, 30, 700, 999])
    assert loss(prediction(target, 0.0, -1.0), target, time_B).abs().max() < 1e-6
    assert (loss(prediction(target, 0.0, 0.0), target, time_B)[:3] > 1e-5).all()


def test_the_bound_teaches_the_variance_only() -> None:
    target, time_B = at([0, 1, 50, 999])
    S, B, P = target["noise"].shape
    predicted = prediction(target, 0.5, randn(4, 4, 12, seed=3)).requires_grad_()
    loss(predicted, target, time_B).sum().backward()
    assert predicted.grad is not None
    to_noise, to_variance = predicted.grad.reshape(S, B, -1, 2 * CHANNELS).split(CHANNELS, -1)
    error = predicted.detach().reshape(S, B, -1, 2 * CHANNELS)[..., :CHANNELS].reshape(S, B, P) - target["noise"]
    torch.testing.assert_close(to_noise.reshape(S, B, P), 2 * error / (S * P))  # of the mean square, and no more
    assert (to_variance != 0).all(), "every variance learns, at timestep 0 too"


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_loss_of_the_tokens_of_two_ranks_averages_to_the_whole(learn_sigma: bool) -> None:
    target, time_B = at([0, 1, 50, 999])
    predicted = prediction(target, 0.5, 0.2) if learn_sigma else randn(4, 4, 12)

    def of(tokens: slice) -> torch.Tensor:
        part = {name: value[tokens] for name, value in target.items()}
        return ddpm.loss(predicted[tokens], part, time_B, learn_sigma=learn_sigma, channels=CHANNELS)

    torch.testing.assert_close((of(slice(0, 2)) + of(slice(2, 4))) / 2, of(slice(None)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variance", [-100.0, -3.0, 0.0, 3.0, 100.0])
@pytest.mark.parametrize("error", [0.0, 30.0])
def test_a_prediction_far_off_has_a_finite_loss_and_gradient(error: float, variance: float) -> None:
    target, time_B = at([0, 0, 1, 2, 500, 999])
    predicted = prediction(target, error, variance).requires_grad_()
    found = loss(predicted, target, time_B)
    found.sum().backward()
    assert predicted.grad is not None
    assert torch.isfinite(found).all()
    assert torch.isfinite(predicted.grad).all()


def test_a_pixel_far_from_the_mean_asks_for_a_larger_variance() -> None:
    """Some 35 standard deviations out a difference of fp32 cdfs is 0, and its logarithm would teach nothing."""
    target, time_B = at([0])
    predicted = prediction(target | {"noise": target["noise"] + 30}, 0.0, 0.0).requires_grad_()
    loss(predicted, target, time_B).sum().backward()
    assert predicted.grad is not None
    to_variance = predicted.grad.reshape(4, 1, -1, 2, CHANNELS)[..., 1, :].reshape(4, 1, -1)
    assert (to_variance[target["clean"].abs() < 0.99] < 0).all()
