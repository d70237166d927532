"""Trials as data: what came out, grouped into settings (the same values, several seeds), and which one is best."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from mpdit_tools.sweep.space import Params
from mpdit_tools.sweep.spec import Spec

State = Literal["running", "complete", "pruned", "diverged", "failed"]
Key = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One trial: one training run. `value` is None unless it is complete."""

    number: int
    kind: str  # search, or confirm: a further seed of one of the best
    state: State
    params: Params
    seed: int
    value: float | None = None
    images: int = 0  # trained on
    flops: int | None = None  # forward and backward of them; None where the search changes the model
    wall_s: float = 0.0
    error: str = ""  # failed: the last line of the run's stderr
    looks: Mapping[int, float] = dataclasses.field(default_factory=dict)  # step: what the pruner saw there

    @property
    def loss(self) -> float:
        """The value, infinite for a run that did not get to one."""
        return math.inf if self.value is None else self.value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Values of the searched keys, and the latest trial of each seed that ran with them."""

    params: Params
    by_seed: Mapping[int, Record]

    @property
    def seeds(self) -> list[int]:
        """Those whose trials came to an end that says something: a crash does not."""
        return [seed for seed, record in self.by_seed.items() if record.state not in ("running", "failed")]

    def has(self, seeds: Iterable[int]) -> bool:
        return set(seeds) <= {*self.seeds}

    def mean(self, seeds: Iterable[int]) -> float:
        """Over `seeds`, which it has; infinite if one of them did not get to a value."""
        return statistics.fmean(self.by_seed[seed].loss for seed in seeds)

    @property
    def values(self) -> list[float]:
        return [record.value for record in self.by_seed.values() if record.value is not None]


def key(params: Params) -> Key:
    return tuple(sorted(params.items()))


def settings(records: Iterable[Record]) -> dict[Key, Setting]:
    """In the order of their first trials. A run that failed twice counts as diverged: it will fail again."""
    found: dict[Key, Setting] = {}
    for record in sorted(records, key=lambda record: record.number):
        before = found.get(key(record.params))
        by_seed = {**before.by_seed} if before else {}
        if record.state == "failed" and record.seed in by_seed:
            record = dataclasses.replace(record, state="diverged")
        by_seed[record.seed] = record
        found[key(record.params)] = Setting(params=record.params, by_seed=by_seed)
    return found


def ranked(spec: Spec, records: Iterable[Record]) -> list[Setting]:
    """Settings that got to a value with each of the spec's seeds, best mean over those seeds first."""
    found = [s for s in settings(records).values() if s.has(spec.seeds) and math.isfinite(s.mean(spec.seeds))]
    return sorted(found, key=lambda setting: setting.mean(spec.seeds))


def best(spec: Spec, records: Iterable[Record]) -> Setting | None:
    """Of the settings that ran with most seeds the one with the best mean: a lucky seed does not win.

    None if no setting is complete. Coordinate search decides by itself (``coordinate.Search``).
    """
    found = [setting for setting in ranked(spec, records) if math.isfinite(setting.mean(setting.seeds))]
    most = max((len(setting.seeds) for setting in found), default=0)
    sure = [setting for setting in found if len(setting.seeds) == most]
    return min(sure, key=lambda setting: setting.mean(setting.seeds), default=None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Relative standard deviations: of a run's value over seeds, and what is left of it when the luck that a seed
    brings to every setting is taken out (that of a difference of two settings with one seed, over sqrt(2))."""

    seed: float
    paired: float | None
    settings: int  # that it was taken from


_ALIKE = 1.1  # x the best mean: what bad settings scatter says little of the good ones


def noise(spec: Spec, records: Iterable[Record]) -> Noise | None:
    """Of the good settings that ran with most seeds; None if none ran with several."""
    found = [s for s in ranked(spec, records) if len(s.values) == len(s.seeds) > 1 and min(s.values) > 0]
    most = max((len(setting.values) for setting in found), default=0)
    alike = [setting for setting in found if len(setting.values) == most and {*setting.seeds} == {*found[0].seeds}]
    alike = [setting for setting in alike if setting.mean(setting.seeds) <= _ALIKE * alike[0].mean(alike[0].seeds)]
    if not alike:
        return None
    logs = [[math.log(setting.by_seed[seed].loss) for seed in alike[0].seeds] for setting in alike]
    own = [statistics.fmean(row) for row in logs]
    seed = math.sqrt(statistics.fmean(map(statistics.variance, logs)))
    if len(logs) == 1:
        return Noise(seed=seed, paired=None, settings=1)
    common = [statistics.fmean(column) - statistics.fmean(own) for column in zip(*logs, strict=True)]
    rest = [log - mean - c for row, mean in zip(logs, own, strict=True) for log, c in zip(row, common, strict=True)]
    freedom = (len(logs) - 1) * (most - 1)
    return Noise(seed=seed, paired=math.sqrt(sum(r * r for r in rest) / freedom), settings=len(logs))
