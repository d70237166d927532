"""The coordinate check's arithmetic: slopes of what was measured against the width (or depth), and what they mean.

Under a right parametrization nothing that the network computes, and nothing that an update changes, grows or shrinks
with the width (Yang et al., arXiv 2203.03466, appendix D.1). Statistics, steps and bounds: what was found to catch each
of a dozen planted faults, where plain activations after many steps miss five of nine.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from mpdit.mup.roles import Role, Tag

ACTIVATION = "activation"  # RMS of a module's output; judged at step 0, where it shows the init
CHANGE = "change"  # RMS of what an output has changed since step 0
UPDATE = "update"  # RMS of x (W_k - W_0), a matrix's own update; of the changed entries of a vector or a table
GRADIENT = "gradient"  # RMS of a parameter's gradient
SPECTRAL = "spectral"  # largest singular value of W_k - W_0, times sqrt(fan_in / fan_out) (arXiv 2310.17813)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Key:
    """What was measured: a statistic, of a module or a parameter, after so many updates."""

    statistic: str
    step: int
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How far from 0 a slope of log2(statistic) against log2(width) may be."""

    activation: float = 0.1
    change: float = 0.1
    update: float = 0.3

    def of(self, key: Key) -> float | None:
        """None: shown, not judged."""
        if key.statistic == ACTIVATION:
            return self.activation if key.step == 0 else None
        return {CHANGE: self.change, UPDATE: self.update}.get(key.statistic)


# What a residual stream gathers by chance from few blocks fades only slowly with the depth: its slopes are less sharp.
BOUNDS = {"width": Bounds(), "depth": Bounds(activation=0.3, change=0.3)}

Measured = Mapping[int, Mapping[Key, list[float]]]  # size -> key -> a value a seed


def slopes(measured: Measured) -> dict[Key, float]:
    """Least-squares slope of log2 of the seeds' geometric mean against log2 of the size.

    What is zero at some size (an unused parameter, all but the readout after one step from a zero readout) has none.
    """
    sizes = sorted(measured)
    position = [math.log2(size) for size in sizes]
    middle = sum(position) / len(position)
    spread = sum((x - middle) ** 2 for x in position)
    found = {}
    for key in measured[sizes[0]]:
        rows = [measured[size].get(key, [0.0]) for size in sizes]
        if all(value > 0 and math.isfinite(value) for row in rows for value in row):
            height = [sum(math.log2(value) for value in row) / len(row) for row in rows]
            found[key] = sum((x - middle) * y for x, y in zip(position, height, strict=True)) / spread
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A slope that is farther than `bound` from what is `expected`."""

    key: Key
    slope: float
    expected: float
    bound: float

    @property
    def excess(self) -> float:
        return abs(self.slope - self.expected) / self.bound


def expected_slope(key: Key, tags: Mapping[str, Tag]) -> float:
    """0, but -1/2 for what an output layer makes at the start: its init is that of the proxy, divided by the width.

    (A readout that starts at zero has no slope at all.)
    """
    tag = tags.get(f"{key.name}.weight")
    starts = key.statistic == ACTIVATION and key.step == 0
    return -0.5 if starts and tag is not None and tag.role is Role.OUTPUT else 0.0


def is_finite(key: Key, tags: Mapping[str, Tag]) -> bool:
    """Whether a layer has neither fan in the width, as those behind an output layer: what they are given shrinks with
    it, so theirs is no slope to judge. `tags` are those of the widest model: there, what grows has grown."""
    tag = tags.get(f"{key.name.removesuffix('.weight')}.weight")
    return (
        tag is not None and tag.role is Role.INPUT and (tag.fan_in, tag.fan_out) == (tag.base_fan_in, tag.base_fan_out)
    )


def judge(
    found: Mapping[Key, float], bound_of: Callable[[Key], float | None], expected: Callable[[Key], float]
) -> list[Finding]:
    """What is out of bounds; first what names a culprit: a wrong init (step 0), then own updates, then activations."""
    every = (
        Finding(key=key, slope=slope, expected=expected(key), bound=bound)
        for key, slope in found.items()
        if (bound := bound_of(key)) is not None
    )
    out = [finding for finding in every if finding.excess > 1]
    order = {ACTIVATION: 0, UPDATE: 1, CHANGE: 2}
    return sorted(out, key=lambda finding: (order[finding.key.statistic], -finding.excess))


def still(measured: Measured, names: Iterable[str]) -> list[str]:
    """Parameters that never moved at any size: the check says nothing about them."""
    moved = {
        key.name for row in measured.values() for key, values in row.items() if key.statistic == UPDATE and any(values)
    }
    return [name for name in names if name not in moved]


def expected_gradient_slope(tag: Tag) -> float:
    """The width exponent of a gradient's RMS that the rule ``eps / m`` counts on: -1 where any fan grows, else 0."""
    return -1.0 if (tag.fan_in, tag.fan_out) != (tag.base_fan_in, tag.base_fan_out) else 0.0
