"""What a check found, in words: a table by statistic, the culprits by role, and everything as JSON."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from mpdit.mup.coordcheck import (
    ACTIVATION,
    UPDATE,
    Bounds,
    Finding,
    Key,
    Measured,
    expected_slope,
    is_finite,
    judge,
    slopes,
    still,
)
from mpdit.mup.roles import Tag

_RULE = {
    "input": "lr unchanged: its fan-in does not grow",
    "table": "lr unchanged: an input",
    "hidden": "init std 1 / sqrt(fan_in), lr / m",
    "modulation": "init std 1 / sqrt(fan_in) or zero, lr / m",
    "output": "lr unchanged, forward times 1 / m",
    "vector": "lr unchanged",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One layout's check. ``axis`` is "width" or "depth"; ``tags`` are those of the largest model."""

    axis: str
    layout: str
    bounds: Bounds
    measured: Measured
    tags: Mapping[str, Tag]

    @functools.cached_property
    def slopes(self) -> dict[Key, float]:
        return slopes(self.measured)

    @functools.cached_property
    def findings(self) -> list[Finding]:
        return judge(self.slopes, self.bound, self.expected)

    @property
    def still(self) -> list[str]:
        return still(self.measured, self.tags)

    def bound(self, key: Key) -> float | None:
        """How far from the expected a slope may be; None: shown, not judged."""
        if self.axis == "width" and is_finite(key, self.tags):
            return None
        return self.bounds.of(key)

    def expected(self, key: Key) -> float:
        return expected_slope(key, self.tags) if self.axis == "width" else 0.0

    @property
    def passed(self) -> bool:
        return not self.findings

    def off(self, key: Key) -> float:
        """How far a slope is from the right one."""
        return abs(self.slopes[key] - self.expected(key))


def rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """(statistic, step, how many, largest |slope|, of what, bound, verdict) for each judged statistic and step."""
    groups: dict[tuple[int, str], list[Key]] = defaultdict(list)
    for key in outcome.slopes:
        if outcome.bound(key) is not None:
            groups[key.step, key.statistic].append(key)
    for (step, statistic), keys in sorted(groups.items()):
        worst = max(keys, key=outcome.off)
        bound = outcome.bound(worst)
        assert bound is not None
        expected = outcome.expected(worst)
        slope = f"{outcome.slopes[worst]:+.2f}" + (f" (right: {expected:+g})" if expected else "")
        verdict = "ok" if outcome.off(worst) <= bound else "OUT"
        yield (statistic, str(step), str(len(keys)), slope, worst.name, f"{bound:g}", verdict)


def culprits(outcome: Outcome) -> list[str]:
    """A sentence each: which layers start wrongly; if none does, which parameters move wrongly by themselves.

    What else is out of bounds follows from these; without either, the first module that changes wrongly is named.
    """
    said = _by_group(outcome, ACTIVATION, "layers start with an output")
    said = said or _by_group(outcome, UPDATE, "parameters move by themselves")
    if not said and outcome.findings:
        first = min(outcome.findings, key=lambda f: (f.key.step, -f.excess))
        verb = "starts with an output" if first.key.statistic == ACTIVATION else "changes its output by an amount"
        said = [f"{first.key.name} {verb} that goes like {outcome.axis}^{first.slope:+.2f} at step {first.key.step}."]
    return said


def _by_group(outcome: Outcome, statistic: str, verb: str) -> list[str]:
    """A sentence a group of parameters, with the slope of each at the first step where it is out of bounds."""
    suffix = ".weight" if statistic == ACTIVATION else ""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for finding in sorted(outcome.findings, key=lambda f: (f.key.step, -f.excess)):
        tag = outcome.tags.get(finding.key.name + suffix)
        if finding.key.statistic == statistic and tag is not None:
            found[tag.group.value].setdefault(finding.key.name, finding.slope)
    judged: dict[str, set[str]] = defaultdict(set)
    for key in outcome.slopes:
        if key.statistic == statistic and key.name + suffix in outcome.tags:
            judged[outcome.tags[key.name + suffix].group.value].add(key.name)
    sentences = []
    for group, by_name in found.items():
        low, high = min(by_name.values()), max(by_name.values())
        span = f"{low:+.2f}" if high - low < 0.01 else f"{low:+.2f} ... {high:+.2f}"
        names = ", ".join(list(by_name)[:3]) + (", ..." if len(by_name) > 3 else "")
        sentences.append(
            f"{group}: {len(by_name)} of {len(judged[group])} {verb} like {outcome.axis}^({span}): {names}; "
            f"the rule is: {_RULE[group]}."
        )
    return sentences


def gradient_rows(outcome: Outcome, expected: Mapping[str, float]) -> Iterator[tuple[str, str, str, str]]:
    """(parameter, measured width exponent of its gradient's RMS, what the eps rule counts on, verdict), last step."""
    step = max((k.step for k in outcome.slopes if k.statistic == "gradient"), default=0)
    for key, slope in outcome.slopes.items():
        if key.statistic == "gradient" and key.step == step:
            wanted = expected[key.name]
            verdict = "ok" if abs(slope - wanted) <= 0.5 else "differs"
            yield key.name, f"{slope:+.2f}", f"{wanted:+.0f}", verdict


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything that was measured and concluded."""
    return {
        "layout": outcome.layout,
        "passed": outcome.passed,
        "culprits": culprits(outcome),
        "findings": [
            {**dataclasses.asdict(f.key), "slope": round(f.slope, 4), "bound": f.bound} for f in outcome.findings
        ],
        "never_moved": outcome.still,
        "slopes": [{**dataclasses.asdict(key), "slope": round(slope, 4)} for key, slope in outcome.slopes.items()],
        "measured": {
            str(size): [
                {**dataclasses.asdict(key), "values": [float(f"{v:.6g}") for v in values]}
                for key, values in row.items()
            ]
            for size, row in outcome.measured.items()
        },
    }
