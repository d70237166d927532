"""Euler's method and guidance against what can be worked out by hand."""

import itertools
import math

import pytest
import torch

from mpdit.sample.samplers import euler, guided


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


def test_guidance_of_one_changes_nothing() -> None:
    conditional, unconditional = noise(), noise().flip(0) * 3
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional, rtol=0, atol=1e-12)


def test_guidance_goes_away_from_the_unconditional_prediction() -> None:
    conditional, unconditional = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guided(conditional, unconditional, 0.0).tolist() == [1.0, 1.0]
    assert guided(conditional, unconditional, 0.5).tolist() == [1.5, 0.0]
    assert guided(conditional, unconditional, 3.0).tolist() == [4.0, -5.0]
    assert guided(conditional, conditional, 7.0).tolist() == [2.0, -1.0]
