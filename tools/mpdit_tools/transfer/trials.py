"""What a search tried: the lines of a sweep's trials.jsonl, and whether its best value lies at an edge."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpdit.errors import InputError

COMPLETE, PRUNED, DIVERGED, FAILED = STATES = ("complete", "pruned", "diverged", "failed")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run of a search. ``params`` by dotted key; ``images`` is what it was trained on, whole or cut short."""

    state: str
    value: float | None
    params: Mapping[str, Any]
    images: int
    flops: int | None = None  # forward and backward of them all


def read(path: Path) -> tuple[Trial, ...]:
    """The trials of a sweep. Raises InputError for a file without any, and for a line that is no trial."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as a sweep's trials: {error}; run the sweep to its end.") from error
    trials = tuple(_trial(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
    if not trials:
        raise InputError(f"{path}: holds no trial; run the sweep before its best is transferred.")
    return trials


def _trial(where: str, line: str) -> Trial:
    try:
        row = json.loads(line)
        value = None if row["value"] is None else float(row["value"])
        flops = None if row.get("flops") is None else int(row["flops"])
        trial = Trial(
            state=row["state"], value=value, params=dict(row["params"]), images=int(row["images"]), flops=flops
        )
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{where}: is no trial ({type(error).__name__}: {error}); a line holds JSON with state, value, params and "
            "images, so remove it or go on with the sweep."
        ) from error
    if trial.state not in STATES:
        raise InputError(f"{where}: state is {trial.state!r}, but should be one of {', '.join(STATES)}.")
    if trial.state == COMPLETE and (value is None or not math.isfinite(value)):
        return dataclasses.replace(trial, state=DIVERGED, value=None)
    return trial


def counted(trials: Sequence[Trial]) -> str:
    """For example "12 trials: 9 complete, 1 pruned, 2 diverged"."""
    found = Counter(trial.state for trial in trials)
    states = ", ".join(f"{found[state]} {state}" for state in STATES if found[state])
    return f"{len(trials)} trial{'s' if len(trials) != 1 else ''}: {states}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """The best value of `key` is the lowest or the highest tried: the true best may lie beyond."""

    key: str
    value: float
    side: str  # "lowest" or "highest"
    other: float  # the other end of what was tried

    def __str__(self) -> str:
        low, high = sorted((self.value, self.other))
        return f"{self.key} of the best trial is {self.value:g}, the {self.side} tried ({low:g} to {high:g})"


def edges(trials: Sequence[Trial], best: Mapping[str, Any]) -> list[Edge]:
    """Where `best` (dotted key: value) lies at an end of what was tried.

    Diverged trials count as tried: an optimum beside the cliff is none at an edge. Zero, below which nothing can be
    searched, is no lower edge, and a value that all trials share was not searched.
    """
    tried = [trial.params for trial in trials if trial.state != FAILED]
    found = []
    for key in dict.fromkeys(key for params in tried for key in params):
        values = {number for params in tried if (number := _number(params.get(key))) is not None}
        value = _number(best.get(key))
        if len(values) < 2 or value is None:
            continue
        low, high = min(values), max(values)
        if value <= low and value != 0:
            found.append(Edge(key=key, value=value, side="lowest", other=high))
        elif value >= high:
            found.append(Edge(key=key, value=value, side="highest", other=low))
    return found


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
