"""Power-function profiles by their definition: each formula against sums and integrals that know nothing of it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit.train import profiles
from mpdit.train.profiles import Profile

WIDTHS = st.floats(0.01, profiles.WIDEST)


def density(width: float, updates: float, time: np.ndarray) -> np.ndarray:
    """The profile over time in updates; 0 after its end."""
    gamma = profiles.exponent(width)
    return np.where(time <= updates, (gamma + 1) * (time / updates) ** gamma / updates, 0.0)


@settings(deadline=None)
@given(width=WIDTHS)
def test_the_exponent_gives_the_width(width: float) -> None:
    """The standard deviation of the profile, integrated, is sigma_rel of its length."""
    length = 1000.0
    time = (np.arange(20_000) + 0.5) / 20_000 * length
    weight = density(width, length, time)
    weight /= weight.sum()
    mean = (weight * time).sum()
    assert math.sqrt((weight * (time - mean) ** 2).sum()) / length == pytest.approx(width, rel=1e-3)
    assert profiles.width(profiles.exponent(width)) == pytest.approx(width, rel=1e-9)


def test_the_papers_numbers() -> None:
    """Section 3.1: gamma 6.94 and 16.97 for sigma_rel 0.10 and 0.05."""
    assert [round(profiles.exponent(width), 2) for width in (0.10, 0.05)] == [6.94, 16.97]


@settings(deadline=None)
@given(width=WIDTHS, updates=st.integers(1, 300))
def test_betas_step_by_step_make_the_profile(width: float, updates: int) -> None:
    """What each update's weights come to in the end is the profile's integral over that update."""
    share = np.zeros(updates)
    for update in range(1, updates + 1):
        fresh = profiles.fresh(profiles.exponent(width), update)
        share *= 1 - fresh
        share[update - 1] += fresh
    edges = (np.arange(updates + 1) / updates) ** (profiles.exponent(width) + 1)
    assert share == pytest.approx(np.diff(edges), abs=1e-12)


def test_beta_stays_accurate_over_millions_of_updates() -> None:
    gamma = profiles.exponent(0.1)
    assert profiles.fresh(gamma, 10**7) == pytest.approx((gamma + 1) / 1e7, rel=1e-6)


@settings(deadline=None)
@given(widths=st.tuples(WIDTHS, WIDTHS), updates=st.tuples(st.integers(10, 100), st.integers(10, 100)))
def test_inner_products_are_integrals(widths: tuple[float, float], updates: tuple[int, int]) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(400)
    end = min(updates)
    time = (nodes + 1) / 2 * end
    values = [density(w, t, time) for w, t in zip(widths, updates, strict=True)]
    integral = (weights * values[0] * values[1]).sum() * end / 2
    gamma, length = np.array([profiles.exponent(w) for w in widths]), np.array(updates, dtype=float)
    assert profiles._products(gamma, length)[0, 1] == pytest.approx(integral, rel=1e-4)


def snapshots(count: int, last: int) -> list[Profile]:
    return [Profile(width=w, updates=last * (k + 1) // count) for k in range(count) for w in (0.05, 0.1)]


@pytest.mark.parametrize("width", [0.03, 0.05, 0.075, 0.1, 0.15])
def test_a_mixture_is_as_near_as_it_says(width: float) -> None:
    given, wanted = snapshots(16, 4000), Profile(width=width, updates=4000)
    found = profiles.mixture(given, wanted)
    time = (np.arange(400_000) + 0.5) / 100
    target = density(width, 4000, time)
    made = sum(c * density(one.width, one.updates, time) for c, one in zip(found.coefficients, given, strict=True))
    assert sum(found.coefficients) == pytest.approx(1, abs=1e-12)
    assert np.linalg.norm(made - target) / np.linalg.norm(target) == pytest.approx(found.error, abs=2e-4)
    assert found.error < 0.05


def test_more_snapshots_come_nearer_and_one_that_is_there_is_taken_as_it_is() -> None:
    wanted = Profile(width=0.075, updates=10_000)
    errors = [profiles.mixture(snapshots(count, 10_000), wanted).error for count in (4, 8, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    given = snapshots(8, 800)
    exact = profiles.mixture(given, Profile(width=0.1, updates=400))
    assert exact.error < 1e-6
    at = given.index(Profile(width=0.1, updates=400))
    assert exact.coefficients[at] == pytest.approx(1, abs=1e-6)
