"""Coordinate search: one change at a time with paired seeds, keep what helps beyond the noise, then look again.

The proxy's values are swept over one grid (as a rule the learning rate), then each key is changed alone by each of
its factors, what helped is tried together, once more around that, and last the grid again. Under muP the changes
are group multipliers (mup.lr_mult.*), which transfer as they are. Every decision is a pure function of the trials.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from mpdit_tools.sweep import space
from mpdit_tools.sweep.results import Key, Setting, key
from mpdit_tools.sweep.space import Factors, Params, Values
from mpdit_tools.sweep.spec import Spec

_SURE = 2.0  # standard errors by which a change has to help
_WIDENED = 4  # points that the grid may grow by beyond either end


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One key by one factor, or several. `gains`: by what share each seed's loss fell; -inf: it diverged."""

    what: tuple[tuple[str, float], ...]
    gains: tuple[float, ...]
    kept: bool = False

    @property
    def gain(self) -> float:
        return statistics.fmean(self.gains)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """All single changes around one setting, and those that helped, together."""

    start: Params
    loss: float
    needed: float  # gain beyond which a change is kept
    changes: tuple[Change, ...]
    together: Change | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Mean losses over the grid, all else as in `start`."""

    key: str
    start: Params
    losses: Mapping[float, float]


class Search:
    """Where the search stands: `here` is the setting held so far, `wanted` the trials that the next decision waits
    for (none: it is over), `log` the decisions in their order."""

    def __init__(self, spec: Spec, there: Mapping[Key, Setting]) -> None:
        self._spec, self._there = spec, there
        self._grid = next(axis for axis in spec.axes if isinstance(axis, Values))
        self._factors = [axis for axis in spec.axes if isinstance(axis, Factors)]
        self.here: Params = {axis.key: space.of(spec.proxy, axis.key) for axis in spec.axes}
        self.wanted: list[tuple[Params, int]] = []
        self.log: list[Sweep | Round] = []
        self._run()

    def _run(self) -> None:
        if not self._sweep():
            return
        moved = False
        for _ in range(self._spec.rounds if self._factors else 0):
            before = self.here
            if not self._round():
                return
            if self.here == before:
                break
            moved = True
        if moved:
            self._sweep()

    def _losses(self, points: Iterable[Params]) -> list[tuple[float, ...]] | None:
        """Of each point the losses of the seeds, in order; None, with `wanted` filled, while some are missing."""
        found, missing = [], []
        for params in points:
            setting = self._there.get(key(params))
            if setting and any(record.state == "diverged" for record in setting.by_seed.values()):
                found.append((math.inf,) * len(self._spec.seeds))  # whatever the other seeds would do
            elif setting is None or not setting.has(self._spec.seeds):
                missing += [(params, seed) for seed in self._spec.seeds]
            else:
                found.append(tuple(setting.by_seed[seed].loss for seed in self._spec.seeds))
        self.wanted += missing
        return None if missing else found

    # ---- the grid ----

    def _sweep(self) -> bool:
        """Move to the best value of the grid, which grows while that is an end; False while trials are missing, or
        if all of it diverges."""
        values = list(self._grid.values)
        while True:
            points = [{**self.here, self._grid.key: value} for value in values]
            losses = self._losses(points)
            if losses is None:
                return False
            means = dict(zip(values, map(statistics.fmean, losses), strict=True))
            best = min(values, key=lambda value: means[value])
            further = _beyond(values, best)
            if further is None or len(values) >= len(self._grid.values) + _WIDENED or math.isinf(means[best]):
                break
            values = sorted([*values, further])
        self.log.append(Sweep(key=self._grid.key, start=self.here, losses=means))
        self.here = {**self.here, self._grid.key: best}
        return math.isfinite(means[best])

    # ---- changes ----

    def _round(self) -> bool:
        """Try every change alone, then together what helped, and move there; False while trials are missing."""
        singles = [((axis.key, factor),) for axis in self._factors for factor in axis.factors]
        found = self._changes(singles)
        if found is None:
            return False
        here, changes = found
        needed = needed_gain(changes, self._spec.least_gain)
        helpful = _best_of_each_key([change for change in changes if change.gain > needed])
        together, choice = None, max(helpful, key=lambda change: change.gain, default=None)
        if len(helpful) > 1:
            joint = self._changes([tuple(part for change in helpful for part in change.what)])
            if joint is None:
                return False
            together = joint[1][0]
            assert choice is not None
            choice = together if together.gain > choice.gain else choice
        self.log.append(
            Round(
                start=self.here,
                loss=statistics.fmean(here),
                needed=needed,
                changes=tuple(dataclasses.replace(change, kept=change in helpful) for change in changes),
                together=together and dataclasses.replace(together, kept=together is choice),
            )
        )
        self.here = self._changed(choice.what) if choice else self.here
        return True

    def _changes(self, whats: Sequence[tuple[tuple[str, float], ...]]) -> tuple[tuple[float, ...], list[Change]] | None:
        losses = self._losses([self.here, *map(self._changed, whats)])
        if losses is None:
            return None
        here, *others = losses
        return here, [Change(what=w, gains=_gains(here, after)) for w, after in zip(whats, others, strict=True)]

    def _changed(self, what: tuple[tuple[str, float], ...]) -> Params:
        def changed(params: Params, part: tuple[str, float]) -> Params:
            name, factor = part
            return {**params, name: space.scaled(params[name], factor)}

        return functools.reduce(changed, what, self.here)


def _gains(before: Sequence[float], after: Sequence[float]) -> tuple[float, ...]:
    return tuple(
        -math.inf if math.isinf(b) else math.inf if math.isinf(a) else (a - b) / abs(a) if a else 0.0
        for a, b in zip(before, after, strict=True)
    )


def needed_gain(changes: Sequence[Change], least: float) -> float:
    """The mean gain that a change has to exceed: two standard errors of a mean of paired differences, or `least`.

    Few seeds say little of one change's own spread, so it is that of all of them: the median of their variances,
    which a change that goes badly and scatters does not move, over the median of the chi-square law (Wilson &
    Hilferty).
    """
    spread = [statistics.variance(c.gains) for c in changes if all(map(math.isfinite, c.gains))]
    if not spread:
        return least
    seeds = len(changes[0].gains)
    freedom = seeds - 1
    variance = statistics.median(spread) / (1 - 2 / (9 * freedom)) ** 3
    return max(least, _SURE * math.sqrt(variance / seeds))


def _best_of_each_key(changes: Sequence[Change]) -> list[Change]:
    """x 1/2 and x 2 of one key would cancel: the better one of those that help."""
    best: dict[str, Change] = {}
    for change in sorted(changes, key=lambda change: change.gain):
        best[change.what[0][0]] = change
    return [change for change in changes if change in best.values()]


def _beyond(values: Sequence[float], best: float) -> float | None:
    """The next grid point where the best one is an end, in the ratio of the last two; None if it lies inside."""
    if len(values) < 2 or best not in (values[0], values[-1]) or min(values) <= 0:
        return None
    further = best * best / (values[1] if best == values[0] else values[-2])
    further = round(further) if isinstance(best, int) else further
    return further if further > 0 and further not in values else None
