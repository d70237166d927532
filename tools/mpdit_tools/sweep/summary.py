"""Everything that is told of a sweep, by its report, its figures and its JSON."""

import dataclasses
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence

from mpdit_tools.sweep import coordinate, plan, space
from mpdit_tools.sweep.results import Noise, Record, Setting, noise, ranked, settings
from mpdit_tools.sweep.space import Values
from mpdit_tools.sweep.spec import Spec

_FEWEST = 20  # trials, under which importances are noise: the best fifth would be fewer than 5
_SHOWN = 20  # settings in the report's table; trials.jsonl has every trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """All that the report says; `importance` is empty where it can't be known, and `why` says so."""

    name: str
    spec: Spec
    records: Sequence[Record]
    best: Setting | None
    noise: Noise | None
    narrow: dict[str, str]  # key: how to widen its axis
    importance: dict[str, float]
    why: str
    log: Sequence[coordinate.Sweep | coordinate.Round] = ()

    @property
    def over(self) -> list[Record]:
        return [record for record in self.records if record.state != "running"]

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(record.state for record in self.over)
        return {state: found[state] for state in ("complete", "pruned", "diverged", "failed")}

    @property
    def images(self) -> int:
        return sum(record.images for record in self.records)

    @property
    def flops(self) -> int | None:
        """Of all trials; None where the search changes the model."""
        found = [record.flops for record in self.records]
        return None if None in found else sum(flops or 0 for flops in found)


def summarize(name: str, spec: Spec, records: Sequence[Record]) -> Summary:
    found = plan.winner(spec, records)
    log = coordinate.Search(spec, settings(records)).log if spec.mode == "coordinate" else []
    importance, why = importances(spec, records)
    return Summary(
        name=name,
        spec=spec,
        records=records,
        best=found,
        noise=noise(spec, records),
        narrow=_narrow(spec, records, found, log) if found else {},
        importance=importance,
        why=why,
        log=log,
    )


def _narrow(
    spec: Spec, records: Sequence[Record], found: Setting, log: Sequence[coordinate.Sweep | coordinate.Round]
) -> dict[str, str]:
    best = [found]
    if spec.mode in ("random", "tpe"):
        there = ranked(spec, records)
        best += [setting for setting in there[: max(5, len(there) // 10)] if setting != found]
    grown = {entry.key: tuple(sorted(entry.losses)) for entry in log if isinstance(entry, coordinate.Sweep)}
    said = {}
    for axis in spec.axes:
        if isinstance(axis, Values) and axis.key in grown:
            axis = dataclasses.replace(axis, values=grown[axis.key])
        said[axis.key] = space.too_narrow(axis, [setting.params[axis.key] for setting in best])
    return {key: remedy for key, remedy in said.items() if remedy}


def importances(spec: Spec, records: Sequence[Record]) -> tuple[dict[str, float], str]:
    """PED-ANOVA (arXiv 2304.10255): how much each key decides on being among the best trials, shares of 1; empty,
    with the reason, where that would be guessing. Trials that diverged or were pruned count as bad ones."""
    found = [
        r for r in records if r.kind == "search" and r.seed == spec.seeds[0] and r.state not in ("running", "failed")
    ]
    complete = [record.loss for record in found if record.value is not None]
    if spec.mode == "coordinate":
        return {}, "coordinate search changes one key at a time; its gains say what matters"
    if len(spec.axes) < 2:
        return {}, "one key was searched"
    if len(found) < _FEWEST or len(complete) < 5:
        return {}, f"{len(found)} trials, of which {len(complete)} complete, are too few; it takes {_FEWEST} and 5"
    import optuna

    from mpdit_tools.sweep.study import distribution

    distributions = {axis.key: distribution(axis, spec) for axis in spec.axes}
    study = optuna.create_study()
    for record in found:
        value = record.loss if record.value is not None else max(complete)
        study.add_trial(optuna.trial.create_trial(params=record.params, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / len(found)))
        return optuna.importance.get_param_importances(study, evaluator=evaluator), ""


def spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table_settings(summary: Summary) -> tuple[list[Setting], int]:
    """The best settings for a table, and how many more there are."""
    found = ranked(summary.spec, summary.records)
    found.sort(key=lambda setting: (setting != summary.best, setting.mean(setting.seeds)))
    return found[:_SHOWN], max(0, len(found) - _SHOWN)


def full_runs(summary: Summary) -> float:
    """Images of all trials in units of one whole run of the proxy."""
    train = summary.spec.proxy.train
    return summary.images / (train.steps * train.batch_size)
