"""Power-function averages of weights, and how to get one of another width out of others: the arithmetic alone.

Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv 2312.02696), section 3 and
appendix C. After t updates, the average weighs the weights of time u in [0, t] by (gamma + 1) u^gamma / t^(gamma + 1):
its width is a fixed share of the run's length, sigma_rel, the profile's standard deviation over t. Time is counted in
updates: a step that was skipped is none.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

WIDEST = 0.28  # sigma_rel of gamma 0.16; at 0.289 the profile is flat, gamma 0


def exponent(width: float) -> float:
    """gamma of sigma_rel, in (0, 0.28]: the largest root of (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2."""
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def width(gamma: float) -> float:
    """sigma_rel of gamma: the standard deviation of the profile over its length."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def fresh(gamma: float, update: int) -> float:
    """1 - beta, the share of the present weights in the average at the `update`-th update, from 1."""
    return 1.0 if update == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / update))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """An average: its sigma_rel, and the number of updates after which it was or is to be taken."""

    width: float
    updates: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Coefficients of the given averages, which add up to one, and how far their mixture is from the profile that was
    wanted: the norm of the difference over the norm of the profile."""

    coefficients: tuple[float, ...]
    error: float


def mixture(given: Sequence[Profile], wanted: Profile) -> Mixture:
    """The combination of `given` whose profile is nearest to `wanted`'s in the least-squares sense."""
    profiles = [*given, wanted]
    gamma = np.array([exponent(profile.width) for profile in profiles])
    length = np.array([profile.updates for profile in profiles], dtype=np.float64)
    products = _products(gamma, length)
    norms = np.sqrt(np.diagonal(products))
    scaled = products / np.outer(norms, norms)  # to unit profiles: the system of many snapshots is nearly singular
    solution = np.linalg.lstsq(scaled[:-1, :-1], scaled[:-1, -1], rcond=1e-13)[0]
    coefficients = solution / norms[:-1]
    coefficients /= coefficients.sum()
    own, between = products[-1, -1], products[:-1, -1]
    square = own - 2 * coefficients @ between + coefficients @ products[:-1, :-1] @ coefficients
    return Mixture(coefficients=tuple(coefficients.tolist()), error=math.sqrt(max(0.0, square) / own))


def _products(gamma: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Inner products of the profiles: integrals over the time that two of them share."""
    a, b = gamma[:, None], gamma[None, :]
    ratio = np.minimum(length[:, None], length[None, :]) / np.maximum(length[:, None], length[None, :])
    later = np.where(length[:, None] < length[None, :], b, a)  # the exponent of the longer one
    longest = np.maximum(length[:, None], length[None, :])
    products: np.ndarray = (a + 1) * (b + 1) / ((a + b + 1) * longest) * ratio**later
    return products
