"""What a check found, in numbers, words and JSON: pure functions of what the runs showed."""

import dataclasses
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mpdit.parallel.fp8 import NAMES
from mpdit.parallel.fp8_statistics import Key, Tally
from mpdit_tools.fp8check.arguments import Bounds
from mpdit_tools.fp8check.check import BASELINE, EXACT, Seen

STATISTICS = ("underflow", "saturation", "error")
WORST = 3  # tensors that are named


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """(loss - loss in bf16) / loss in bf16, the mean over the second half of the steps; nan where a run diverged.

    `noise` is its standard error: over the seeds, or of one seed over its steps.
    """

    mean: float
    noise: float
    curve: list[float]  # of each step, the mean over the seeds
    loss: float  # in bf16, the mean over the same steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A check's runs, by (width, arithmetic)."""

    bounds: Bounds
    seen: Sequence[Seen]

    @property
    def widths(self) -> list[int]:
        return sorted({one.run.width for one in self.seen})

    @property
    def recipes(self) -> list[str]:
        return [a for a in dict.fromkeys(one.run.arithmetic for one in self.seen) if a not in (BASELINE, EXACT)]

    @functools.cached_property
    def gaps(self) -> dict[tuple[int, str], Gap]:
        """Of everything but the baseline itself."""
        losses = {(s.run.width, s.run.arithmetic, s.run.seed): s.losses for s in self.seen}
        seeds = sorted({seed for _, _, seed in losses})
        found = {}
        for width in self.widths:
            for arithmetic in (EXACT, *self.recipes):
                pairs = [(losses[width, arithmetic, s], losses[width, BASELINE, s]) for s in seeds]
                found[width, arithmetic] = _gap(pairs)
        return found

    @functools.cached_property
    def tallies(self) -> dict[tuple[int, str], dict[Key, Tally]]:
        """Of every tensor by (width, recipe), over seeds and looks."""
        found: dict[tuple[int, str], dict[Key, Tally]] = defaultdict(dict)
        for one in self.seen:
            into = found[one.run.width, one.run.arithmetic]
            for key, tally in one.tallies.items():
                into[key] = into.get(key, Tally()) + tally
        return found

    def share(self, width: int, recipe: str, name: str, statistic: str) -> float:
        """A statistic of all inputs, weights or gradients together."""
        of_name = (tally for (_, n), tally in self.tallies[width, recipe].items() if n == name)
        return float(getattr(sum(of_name, Tally()), statistic))

    def slope(self, recipe: str, name: str, statistic: str) -> float | None:
        """Of log2 of :meth:`share` over log2 of the width; None where it is zero somewhere, or at a single width."""
        return slope({width: self.share(width, recipe, name, statistic) for width in self.widths})

    def worst(self, width: int, recipe: str, statistic: str) -> list[tuple[Key, float]]:
        """Tensors by a statistic that is not zero, the largest first."""
        values = {key: float(getattr(tally, statistic)) for key, tally in self.tallies[width, recipe].items()}
        return sorted(((k, v) for k, v in values.items() if v), key=lambda pair: (-pair[1], pair[0]))[:WORST]

    @functools.cached_property
    def findings(self) -> list[str]:
        """A sentence for every bound that is crossed, by recipe and width."""
        return [said for recipe in self.recipes for width in self.widths for said in self._crossed(recipe, width)]

    def _crossed(self, recipe: str, width: int) -> Iterator[str]:
        gap, bounds = self.gaps[width, recipe], self.bounds
        if not math.isfinite(gap.mean):
            yield f"{recipe}, width {width}: the loss is no number."
        elif gap.mean - 2 * gap.noise > bounds.gap_bound:
            yield (
                f"{recipe}, width {width}: the loss is {gap.mean:.2%} (noise {gap.noise:.2%}) above bf16's, more than "
                f"{bounds.gap_bound:.2%}."
            )
        for statistic, bound in (("underflow", bounds.underflow_bound), ("saturation", bounds.saturation_bound)):
            for (linear, name), value in self.worst(width, recipe, statistic)[:1]:
                if value > bound:
                    what = f"{statistic} of {name} of {linear}"
                    yield f"{recipe}, width {width}: {what} is {shown(value)}, more than {shown(bound)}."

    @property
    def passed(self) -> bool:
        return not self.findings


def _gap(pairs: list[tuple[list[float], list[float]]]) -> Gap:
    """`pairs`: (losses, losses in bf16), a pair a seed."""
    curves = [[_relative(loss, base) for loss, base in zip(*pair, strict=True)] for pair in pairs]
    late = [curve[len(curve) // 2 :] for curve in curves]
    means = [statistics.fmean(curve) for curve in late]
    spread = means if len(means) > 1 else late[0]
    finite = all(map(math.isfinite, spread)) and len(spread) > 1
    return Gap(
        mean=statistics.fmean(means),
        noise=statistics.stdev(spread) / math.sqrt(len(spread)) if finite else math.nan,
        curve=[statistics.fmean(step) for step in zip(*curves, strict=True)],
        loss=statistics.fmean(statistics.fmean(base[len(base) // 2 :]) for _, base in pairs),
    )


def _relative(loss: float, base: float) -> float:
    return (loss - base) / base if math.isfinite(loss) and math.isfinite(base) else math.nan


def slope(by_width: Mapping[int, float]) -> float | None:
    """Least squares of log2 of the value over log2 of the width; None of a value that is not positive, or of one."""
    if len(by_width) < 2 or not all(value > 0 for value in by_width.values()):
        return None
    return statistics.linear_regression([*map(math.log2, by_width)], [*map(math.log2, by_width.values())]).slope


# ---- tables ----------------------------------------------------------------------------------------------------------


def gap_rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """(width, arithmetic, loss in bf16, gap, noise, verdict)."""
    for width in outcome.widths:
        for arithmetic in (EXACT, *outcome.recipes):
            gap = outcome.gaps[width, arithmetic]
            verdict = "" if arithmetic == EXACT else "OUT" if any(outcome._crossed(arithmetic, width)) else "ok"
            yield str(width), arithmetic, f"{gap.loss:.4f}", f"{gap.mean:+.3%}", f"{gap.noise:.3%}", verdict


def share_rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """(recipe, tensor, statistic, its value at each width, slope), of all inputs, weights or gradients together; but
    saturation where there is none."""
    for recipe in outcome.recipes:
        for name in NAMES:
            for statistic in STATISTICS:
                values = [outcome.share(width, recipe, name, statistic) for width in outcome.widths]
                if statistic == "saturation" and not any(values):
                    continue
                found = outcome.slope(recipe, name, statistic)
                yield recipe, name, statistic, *map(shown, values), "" if found is None else f"{found:+.2f}"


def worst_rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """(recipe, statistic, the worst tensors at the largest width by name, with the value)."""
    for recipe in outcome.recipes:
        for statistic in STATISTICS:
            named = outcome.worst(outcome.widths[-1], recipe, statistic)
            said = "; ".join(f"{name} of {linear} {shown(value)}" for (linear, name), value in named)
            yield recipe, statistic, said or "none"


def shown(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.2%}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything that was measured and concluded; what is no number is null."""
    return {
        "passed": outcome.passed,
        "findings": outcome.findings,
        "bounds": {f.name: getattr(outcome.bounds, f.name) for f in dataclasses.fields(Bounds)},
        "widths": outcome.widths,
        "recipes": outcome.recipes,
        "gaps": [
            {"width": width, "arithmetic": arithmetic, **_numbers(dataclasses.asdict(gap))}
            for (width, arithmetic), gap in outcome.gaps.items()
        ],
        "shares": [
            {
                "recipe": recipe,
                "tensor": name,
                "statistic": statistic,
                "by_width": {str(w): _number(outcome.share(w, recipe, name, statistic)) for w in outcome.widths},
                "slope": _number(outcome.slope(recipe, name, statistic)),
            }
            for recipe in outcome.recipes
            for name in NAMES
            for statistic in STATISTICS
        ],
        "tensors": [
            {
                "width": width,
                "recipe": recipe,
                "linear": linear,
                "tensor": name,
                **{statistic: _number(getattr(tally, statistic)) for statistic in (*STATISTICS, "amax")},
            }
            for (width, recipe), tallies in outcome.tallies.items()
            for (linear, name), tally in tallies.items()
        ],
        "losses": [
            {"width": s.run.width, "seed": s.run.seed, "arithmetic": s.run.arithmetic, "losses": _list(s.losses)}
            for s in outcome.seen
        ],
    }


def _number(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _list(values: Iterable[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _numbers(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _list(value) if isinstance(value, list) else _number(value) for key, value in tree.items()}
