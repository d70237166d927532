"""Rectified flow: the training pair lies on the straight line between image and noise, at times as configured."""

import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ranks
from mpdit.config import Config, Objective
from mpdit.errors import InputError
from mpdit.objective import Noised, draws, flow

UNIFORM = Objective(timesteps="uniform")


def images(count: int) -> torch.Tensor:
    values = np.random.default_rng(0).uniform(-1, 1, (count, 3, 4, 4))
    return torch.from_numpy(values).float()


def pair(objective: Objective, samples: np.ndarray, seed: int = 5, visit: int = 0) -> tuple[torch.Tensor, Noised]:
    clean = images(len(samples))
    return clean, flow.noised(clean, objective, seed, samples, np.full_like(samples, visit))


def tensors(found: Noised) -> dict[str, torch.Tensor]:
    return {"noisy": found.noisy_BCHW, "time": found.time_B, **found.target}


@pytest.mark.parametrize("objective", [Objective(), UNIFORM, Objective(logit_mean=-2.0, logit_std=3.0)])
def test_the_pair_lies_on_the_line_from_image_to_noise(objective: Objective) -> None:
    samples = np.arange(40)
    clean, found = pair(objective, samples)
    noise = draws.noise(5, samples, np.zeros_like(samples), (3, 4, 4))
    t = found.time_B[:, None, None, None]
    torch.testing.assert_close(found.noisy_BCHW + (1 - t) * found.target["velocity"], noise, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.noisy_BCHW - t * found.target["velocity"], clean, rtol=0, atol=2e-6)
    assert torch.equal(found.target["velocity"], noise - clean)
    assert found.target.keys() == {"velocity"}
    for value in (found.noisy_BCHW, found.target["velocity"], found.time_B):
        assert value.dtype == torch.float32


def test_the_target_is_how_the_noisy_image_moves_with_time() -> None:
    """The finite difference of x_t is the target, in direction and in sign: dx_t/dt = noise - x_0."""
    samples = np.array([3, 3])
    clean = images(1).expand(2, -1, -1, -1)
    early, late = (Objective(logit_mean=m, logit_std=0.0) for m in (-1.0, 1.0))
    a, b = (flow.noised(clean, o, 5, samples, np.zeros_like(samples)) for o in (early, late))
    moved = (b.noisy_BCHW - a.noisy_BCHW) / (b.time_B - a.time_B)[:, None, None, None]
    torch.testing.assert_close(moved, a.target["velocity"], rtol=1e-5, atol=1e-5)


def test_the_pair_of_a_sample_is_the_same_in_any_batch() -> None:
    clean = images(6)
    order = np.array([4, 0, 5, 1, 3, 2])
    visits = np.arange(6)
    one = flow.noised(clean, Objective(), 5, np.arange(6), visits)
    other = flow.noised(clean[order], Objective(), 5, order, visits[order])
    part = flow.noised(clean[2:4], Objective(), 5, np.arange(2, 4), visits[2:4])
    for name, values in tensors(one).items():
        assert torch.equal(values[order], tensors(other)[name]), name
        assert torch.equal(values[2:4], tensors(part)[name]), name


def test_each_visit_and_seed_has_a_pair_of_its_own_and_validation_has_one() -> None:
    samples = np.arange(8)
    found = {(s, v): pair(Objective(), samples, seed=s, visit=v)[1].time_B for s in (1, 2) for v in (-1, 0, 1)}
    assert len({tuple(times.tolist()) for times in found.values()}) == 6
    assert draws.VALIDATION_VISIT == -1, "no visit of the training plan, and not another one than before"


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (1.0, 2.0)])
def test_times_are_logit_normal(mean: float, std: float) -> None:
    n = 20_000
    objective = Objective(timesteps="logit_normal", logit_mean=mean, logit_std=std)
    t = np.sort(flow.times(objective, 3, np.arange(n), np.zeros(n, np.int64)).numpy().astype(np.float64))
    assert 0 < t[0] < t[-1] < 1
    normal = statistics.NormalDist(mean, std)
    for p in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99):
        wanted = 1 / (1 + np.exp(-normal.inv_cdf(p)))
        slack = 5 * np.sqrt(p * (1 - p) / n) / normal.pdf(normal.inv_cdf(p))  # of the quantile, before the sigmoid
        found = np.log(t[int(p * n)] / (1 - t[int(p * n)]))
        assert found == pytest.approx(normal.inv_cdf(p), abs=slack), (p, wanted)
    cdf = np.array([normal.cdf(x) for x in np.log(t / (1 - t))[:: n // 500]])
    assert np.abs(cdf - np.arange(0, n, n // 500) / n).max() < 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov


def test_times_are_uniform_when_asked() -> None:
    n = 20_000
    t = np.sort(flow.times(UNIFORM, 3, np.arange(n), np.zeros(n, np.int64)).numpy())
    assert np.abs(t - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)


def test_a_spread_of_zero_is_a_fixed_time() -> None:
    times = flow.times(Objective(logit_mean=0.0, logit_std=0.0), 3, np.arange(5), np.zeros(5, np.int64))
    assert times.tolist() == [0.5] * 5


def test_extreme_spreads_stay_finite() -> None:
    """Times pile up at 0 and 1, and nothing becomes NaN on the way."""
    objective = Objective(logit_mean=0.0, logit_std=500.0)
    with np.errstate(over="ignore"):
        _, found = pair(objective, np.arange(40))
    assert ((found.time_B >= 0) & (found.time_B <= 1)).all()
    assert torch.isfinite(found.noisy_BCHW).all()


# ---- the loss of a pair ----------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_square_over_tokens_and_features_of_each_sample() -> None:
    prediction, target = images(4).reshape(4, 3, 16), {"velocity": images(8)[4:].reshape(4, 3, 16)}  # [S, B, P]

    def loss(prediction: torch.Tensor, tokens: slice = slice(None)) -> torch.Tensor:
        part = {"velocity": target["velocity"][tokens]}
        return flow.loss(prediction[tokens], part, torch.zeros(3), learn_sigma=False, channels=1)

    expected = np.mean((prediction.numpy() - target["velocity"].numpy()) ** 2, (0, 2))
    np.testing.assert_allclose(loss(prediction).numpy(), expected, rtol=1e-6)
    assert loss(prediction.bfloat16()).dtype == torch.float32
    assert loss(target["velocity"]).tolist() == [0.0, 0.0, 0.0]
    halves = loss(prediction, slice(0, 2)), loss(prediction, slice(2, 4))  # of two context ranks
    torch.testing.assert_close((halves[0] + halves[1]) / 2, loss(prediction))


def test_a_flow_has_no_variance_to_learn() -> None:
    prediction = torch.zeros(4, 3, 32)
    with pytest.raises(InputError, match=r"model\.learn_sigma.*objective\.kind flow.*ddpm"):
        flow.loss(prediction, {"velocity": prediction}, torch.zeros(3), learn_sigma=True, channels=1)


# ---- the loss of a batch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches() -> Any:
    ranks.warm()
    from mpdit.train import batches

    return batches


def test_images_without_weight_count_for_nothing(batches: Any) -> None:
    """Validation is padded with them to divide over ranks."""
    prediction, target = images(4).reshape(4, 3, 16), images(8)[4:].reshape(4, 3, 16)

    def weighted(*weights: float) -> float:
        weight_B = torch.tensor(weights) if weights else None
        inputs: Any = SimpleNamespace(time_B=torch.zeros(3))  # all of them that a loss needs
        batch = batches.Batch(
            size=3, height=8, width=8, inputs=inputs, target_SBP={"velocity": target}, weight_B=weight_B
        )
        return float(batches.loss(Config(), prediction, batch).item())

    plain = float(np.mean((prediction.numpy() - target.numpy()) ** 2))
    assert weighted() == pytest.approx(plain, rel=1e-6)
    alone = [float(np.mean((prediction[:, i].numpy() - target[:, i].numpy()) ** 2)) for i in range(3)]
    assert weighted(1, 1, 1) == pytest.approx(plain, rel=1e-6)
    assert weighted(3, 0, 0) == pytest.approx(alone[0], rel=1e-6)
    assert weighted(1.5, 0, 1.5) == pytest.approx((alone[0] + alone[2]) / 2, rel=1e-6)
    assert weighted(0, 0, 0) == 0.0
    target[:, 1] = 1e6
    assert weighted(1.5, 0, 1.5) == pytest.approx((alone[0] + alone[2]) / 2, rel=1e-6)


def test_sample_keys_add_up_and_tell_sets_apart(batches: Any) -> None:
    """metrics.jsonl's "samples": the same for any split over ranks, another for any other (sample, visit)."""
    samples, visits = np.arange(10), np.arange(10) % 3
    whole = batches.sample_key(samples, visits)
    parts = [batches.sample_key(samples[i : i + 2], visits[i : i + 2]) for i in (8, 2, 0, 6, 4)]
    assert sum(parts) % 2**48 == whole
    assert batches.sample_key(samples[::-1], visits[::-1]) == whole
    keys = {whole, batches.sample_key(samples + 1, visits), batches.sample_key(samples, visits + 1)}
    keys |= {
        batches.sample_key(samples[1:], visits[1:]),
        batches.sample_key(np.append(samples, 0), np.append(visits, 0)),
    }
    assert len(keys) == 5
