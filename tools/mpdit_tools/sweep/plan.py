"""What a sweep runs next: a pure function of its spec and of what came out, so that any process can go on."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from mpdit_tools.sweep import coordinate
from mpdit_tools.sweep.results import Record, Setting, best, key, ranked, settings
from mpdit_tools.sweep.space import Params, Values
from mpdit_tools.sweep.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """A trial to run; `params` None: values that the sampler has still to choose."""

    seed: int
    params: Params | None = None
    kind: str = "search"


WAIT: Literal["wait"] = "wait"  # for trials that run, here or in another process
DONE: Literal["done"] = "done"


def following(spec: Spec, records: Sequence[Record]) -> Wish | Literal["wait", "done"]:
    """The next trial of the sweep, of which `records` are there, running ones included."""
    running = any(record.state == "running" for record in records)
    wish = _coordinate(spec, records) if spec.mode == "coordinate" else _search(spec, records)
    if wish is None and not running and spec.confirm:
        wish = _confirm(spec, records)
    return wish or (WAIT if running else DONE)


def _search(spec: Spec, records: Sequence[Record]) -> Wish | None:
    """First the other seeds of settings whose first seed came through, then a new one if the budget allows."""
    first, *others = spec.seeds
    searched = [record for record in records if record.kind == "search"]
    spent = len(searched)
    wish = None
    for setting in settings(searched).values():
        begun = setting.by_seed.get(first)
        if begun is None or begun.state not in ("running", "complete"):
            continue
        missing = [seed for seed in others if _is_open(setting, seed)]
        spent += len(missing)  # a running first seed may still ask for them
        if missing and begun.state == "complete" and wish is None:
            wish = Wish(seed=missing[0], params=setting.params)
    if wish is None and (spec.trials is None or spent + len(spec.seeds) <= spec.trials):
        if spec.mode != "grid":
            return Wish(seed=first)
        there = settings(searched)
        point = next((point for point in grid(spec) if key(point) not in there), None)
        wish = Wish(seed=first, params=point) if point else None
    return wish


def _is_open(setting: Setting, seed: int) -> bool:
    """Not run yet, or crashed once: what is compared over seeds can't do without it."""
    record = setting.by_seed.get(seed)
    return record is None or record.state == "failed"


def grid(spec: Spec) -> Iterator[Params]:
    """All points, the last axis fastest."""
    axes = [axis for axis in spec.axes if isinstance(axis, Values)]
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def _confirm(spec: Spec, records: Sequence[Record]) -> Wish | None:
    assert spec.confirm is not None
    for setting in ranked(spec, records)[: spec.confirm.top]:
        for seed in spec.confirm.seeds:
            if _is_open(setting, seed):
                return Wish(seed=seed, params=setting.params, kind="confirm")
    return None


def _coordinate(spec: Spec, records: Sequence[Record]) -> Wish | None:
    if spec.trials is not None and len(records) >= spec.trials:
        return None
    there = settings(records)
    for params, seed in coordinate.Search(spec, there).wanted:
        setting = there.get(key(params))
        if setting is None or _is_open(setting, seed):
            return Wish(seed=seed, params=params)
    return None


def winner(spec: Spec, records: Sequence[Record]) -> Setting | None:
    """The best setting so far: coordinate search's own choice, else :func:`results.best`."""
    if spec.mode == "coordinate":
        there = settings(records)
        held = there.get(key(coordinate.Search(spec, there).here))
        if held is not None and held.has(spec.seeds) and math.isfinite(held.mean(spec.seeds)):
            return held
    return best(spec, records)
