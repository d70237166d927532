"""Law 3: what is drawn for a sample is a function of (seed, purpose, sample id, visit) and of nothing else."""

import itertools
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit.objective import draws

SHAPE = (3, 4, 4)
PURPOSES = ("time", "caption drop", "mirror")
pairs = st.lists(st.tuples(st.integers(0, 2**40), st.integers(-1, 1000)), min_size=1, max_size=6)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def drawn(seed: int, sample: int, visit: int, purpose: str = "time") -> tuple[torch.Tensor, float]:
    """One sample, drawn alone."""
    noise = draws.noise(seed, ids(sample), ids(visit), SHAPE)[0]
    return noise, draws.uniform(seed, purpose, ids(sample), ids(visit))[0]


@settings(deadline=None)
@given(batch=pairs, seed=st.integers(0, 2**63), data=st.data())
def test_a_batchs_size_order_and_company_do_not_matter(
    batch: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(batch))
    samples, visits = (ids(*column) for column in zip(*order, strict=True))
    noise, uniform = draws.noise(seed, samples, visits, SHAPE), draws.uniform(seed, "time", samples, visits)
    for row, value, (sample, visit) in zip(noise, uniform, order, strict=True):
        alone, alone_value = drawn(seed, sample, visit)
        assert torch.equal(row, alone)
        assert value == alone_value


def test_the_programs_own_generators_neither_matter_nor_move() -> None:
    torch.manual_seed(1)
    first, state = drawn(3, 4, 5), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    np.random.seed(2)
    again = drawn(3, 4, 5)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]


def test_seed_sample_and_visit_each_give_something_else() -> None:
    """Also where their digits run together: (1, 12) is not (11, 2)."""
    keys = [*itertools.product((0, 1, 12), (0, 1, 11, 12), (-1, 0, 1, 2, 12))]
    found = [drawn(*key) for key in keys]
    assert len({value for _, value in found}) == len(keys)
    assert len({noise.numpy().tobytes() for noise, _ in found}) == len(keys)


def test_purposes_of_one_sample_are_independent() -> None:
    samples, visits = np.arange(4000), np.zeros(4000, np.int64)
    drawn = {purpose: draws.uniform(0, purpose, samples, visits) for purpose in PURPOSES}
    drawn["noise"] = draws.noise(0, samples, visits, (1,))[:, 0].numpy()
    for one, other in itertools.combinations(drawn, 2):
        assert abs(np.corrcoef(drawn[one], drawn[other])[0, 1]) < 5 / np.sqrt(4000), (one, other)


def test_neighbouring_samples_visits_and_seeds_are_independent() -> None:
    samples, zeros = np.arange(4000), np.zeros(4000, np.int64)
    first = draws.uniform(0, "time", samples, zeros)
    others = {
        "sample": draws.uniform(0, "time", samples + 1, zeros),
        "visit": draws.uniform(0, "time", samples, zeros + 1),
        "seed": draws.uniform(1, "time", samples, zeros),
    }
    for what, other in others.items():
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(4000), what


def test_uniform_is_uniform() -> None:
    n = 20_000
    u = np.sort(draws.uniform(7, "time", np.arange(n), np.zeros(n, np.int64)))
    assert u.dtype == np.float64
    assert 0 < u[0] < u[-1] < 1
    assert len(np.unique(u)) == n
    distance = np.abs(u - (np.arange(n) + 0.5) / n).max()  # Kolmogorov-Smirnov
    assert distance < 1.95 / np.sqrt(n)
    assert u.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * n))
    assert u.var() == pytest.approx(1 / 12, abs=5 / np.sqrt(180 * n))


def test_noise_is_standard_normal() -> None:
    samples = np.arange(400)
    noise = draws.noise(7, samples, np.zeros_like(samples), (3, 8, 8))
    assert (noise.dtype, noise.shape) == (torch.float32, (400, 3, 8, 8))
    values = np.sort(noise.numpy().ravel().astype(np.float64))
    n = len(values)
    assert values.mean() == pytest.approx(0, abs=5 / np.sqrt(n))
    assert values.var() == pytest.approx(1, abs=5 * np.sqrt(2 / n))
    assert (values**3).mean() == pytest.approx(0, abs=5 * np.sqrt(15 / n))
    assert (values**4).mean() == pytest.approx(3, abs=5 * np.sqrt(96 / n))
    for p in (0.01, 0.1, 0.5, 0.9, 0.99):
        wanted = statistics.NormalDist().inv_cdf(p)
        density = statistics.NormalDist().pdf(wanted)
        assert values[int(p * n)] == pytest.approx(wanted, abs=5 * np.sqrt(p * (1 - p) / n) / density)


def test_noise_of_different_samples_and_pixels_is_independent() -> None:
    noise = draws.noise(7, np.arange(4000), np.zeros(4000, np.int64), (1, 1, 16)).numpy()[:, 0, 0]
    assert np.abs(np.corrcoef(noise.T) - np.eye(16)).max() < 5 / np.sqrt(4000)
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 5 / np.sqrt(4000 * 16)


def test_ids_and_visits_have_to_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        draws.noise(0, ids(1, 2), ids(0), SHAPE)
    with pytest.raises(ValueError, match="zip"):
        draws.uniform(0, "time", ids(1, 2), ids(0))


def test_the_draws_of_a_key_stay_what_they_are() -> None:
    """Whoever changes the key or the generator changes every run that is resumed afterwards: not by accident."""
    noise, uniform = drawn(1, 2, 3)
    assert uniform == 0.5668220742182262
    assert noise.ravel()[:3].tolist() == pytest.approx([-0.57480127, -0.14094338, 1.61017287], abs=1e-5)
