"""The runs of the experiment: which models, rules, widths, learning rates and seeds, some chosen by earlier results.

Pairing: batches, noise and times are functions of (seed, sample), initial weights of (seed, name, shape); so runs of
one seed differ in nothing but what a point says.
"""

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mpdit import config as configs
from mpdit.config import Config

ARCHS = ("dit", "mmdit", "pixart", "uvit")
WIDTHS = (32, 64, 128, 256)
DIVERGED = 1.3  # a loss above it has learned nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run. ``lr_mult`` holds base multipliers as in mup.lr_mult, ``more`` further dotted keys of the config."""

    arch: str
    rule: str  # sp | mup
    width: int
    log2_lr: float
    seed: int
    schedule: str = "constant"
    lr_mult: tuple[tuple[str, float], ...] = ()
    more: tuple[str, ...] = ()
    looks: tuple[int, ...] = ()  # steps at which the validation loss is written down

    def config(self, path: Path, data: Path) -> Config:
        overrides = [
            f"model.width={self.width}",
            f"mup.parametrization={self.rule}",
            f"optim.lr={2.0**self.log2_lr!r}",
            f"optim.schedule={self.schedule}",
            f"train.seed={self.seed}",
            *(f"mup.lr_mult.{group}={value}" for group, value in self.lr_mult),
            *self.more,
        ]
        config = configs.load(path, overrides)
        folder = data / Path(config.data.path).name
        return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder)))

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        mult = "".join(f" {group} x{value:g}" for group, value in self.lr_mult)
        return f"{self.arch} {self.rule} {self.width} lr 2^{self.log2_lr:g} seed {self.seed} {self.schedule}{mult}"


class Results:
    """What results.jsonl holds: outcomes by point."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.rows: dict[str, dict[str, Any]] = {json.dumps(row["point"]): row for row in rows}

    def loss(self, point: Point) -> float | None:
        """Of the run's averaged weights under a constant learning rate, of its final ones under decay; capped."""
        row = self.rows.get(point.key)
        if row is None:
            return None
        loss = row["ema_loss" if point.schedule == "constant" else "loss"]
        return min(loss, DIVERGED) if loss == loss else DIVERGED

    def mean(self, points: Iterable[Point]) -> float | None:
        """Over seeds; None while one is missing."""
        losses = [self.loss(point) for point in points]
        return None if None in losses else statistics.fmean(x for x in losses if x is not None)


# ---- learning rate against width, constant after the warm-up ---------------------------------------------------------

_MUP_GRID = range(-8, -3)
_SP_GRID = {32: range(-10, -2), 64: range(-9, -4), 128: range(-10, -4), 256: range(-10, -5)}


def grid(arch: str, rule: str, width: int) -> range:
    """log2 learning rates of the constant-rate sweep; at the proxy both rules are one model."""
    return _SP_GRID[width] if rule == "sp" or width == WIDTHS[0] else _MUP_GRID


# A vertex moves by 0.1 to 0.4 octaves with the seed: muP's, which is to stay within half an octave, gets more of them.
FIRST_SEEDS = (0, 1)  # run on the whole grid
SWEEP_SEEDS = {"mup": (0, 1, 2, 3), "sp": FIRST_SEEDS}
PROXY_SEEDS = tuple(range(8))  # the proxy costs little, and every width is held against it
_SCATTERED = ("uvit",)  # some of its seeds learn to read the time late or never


def seeds_of(arch: str, rule: str, width: int) -> tuple[int, ...]:
    if width == WIDTHS[0] or (rule == "mup" and arch in _SCATTERED):
        return PROXY_SEEDS
    return SWEEP_SEEDS[rule]


def sweep(results: Results, arch: str, rule: str, width: int) -> Iterator[Point]:
    """The first seeds on the whole grid, the others at the best rate of those and its neighbours, as far as known."""

    def points(seed: int, rates: Iterable[int]) -> Iterator[Point]:
        for rate in rates:
            yield Point(arch=arch, rule=rule, width=width, log2_lr=rate, seed=seed)

    rates = grid(arch, rule, width)
    for seed in FIRST_SEEDS:
        yield from points(seed, rates)
    best = best_on_grid(results, arch, rule, width)
    if best is not None:
        for seed in seeds_of(arch, rule, width)[len(FIRST_SEEDS) :]:
            yield from points(seed, [rate for rate in rates if abs(rate - best) <= 1])


def best_on_grid(results: Results, arch: str, rule: str, width: int) -> int | None:
    """The constant-rate sweep's best grid point by its first seeds."""
    losses = {
        rate: results.mean(Point(arch=arch, rule=rule, width=width, log2_lr=rate, seed=seed) for seed in FIRST_SEEDS)
        for rate in grid(arch, rule, width)
    }
    return None if None in losses.values() else min(losses, key=lambda rate: losses[rate] or DIVERGED)


def transfer(results: Results, arch: str) -> Iterator[Point]:
    """muP on one grid at every width; SP on a grid that holds its own optimum, and at the proxy's learning rate."""
    for width in WIDTHS:
        yield from sweep(results, arch, "mup", width)
        if width > WIDTHS[0]:
            yield from sweep(results, arch, "sp", width)


def quick(results: Results) -> Iterator[Point]:
    """A DiT at three widths, 200 steps, one seed: what `make test-slow` runs."""
    steps = ("train.steps=200", "optim.warmup_steps=20")
    for width in WIDTHS[:3]:
        for log2_lr in _SP_GRID[32] if width == WIDTHS[0] else range(-7, -3):
            yield Point(arch="dit", rule="mup", width=width, log2_lr=log2_lr, seed=0, more=steps)
        if width > WIDTHS[0]:
            for log2_lr in range(-9, -4):
                yield Point(arch="dit", rule="sp", width=width, log2_lr=log2_lr, seed=0, more=steps)


# ---- multipliers, tuned on the proxy under linear decay --------------------------------------------------------------

_GROUPS = ("modulation", "output", "input", "hidden", "table", "vector")
_PROXY_GRID = (-6.0, -5.5, -5.0, -4.5, -4.0, -3.5)
_TUNING_SEEDS = {"dit": 6}  # the DiT's proxy is nearly as noisy as what there is to gain; the others get three
_SEED_NOISE = 0.0087  # relative, of one seed: what helps less than the mean's noise is not kept

Mult = tuple[tuple[str, float], ...]


def _proxy(arch: str, log2_lr: float, mult: Mult, seed: int) -> Point:
    return Point(arch=arch, rule="mup", width=WIDTHS[0], log2_lr=log2_lr, seed=seed, schedule="linear", lr_mult=mult)


def _scaled(mult: Mult, group: str, factor: float) -> Mult:
    values = dict(mult)
    values[group] = values.get(group, 1.0) * factor
    return tuple(sorted((name, value) for name, value in values.items() if value != 1.0))


def _named(mult: Mult) -> str:
    return ", ".join(f"{group} x{value:g}" for group, value in mult) or "no multipliers"


def tuning_seeds(arch: str) -> range:
    return range(_TUNING_SEEDS.get(arch, 3))


class Tuning:
    """Coordinate-wise search on the proxy: the learning rate, one group at a time by 1/2 and 2, all that helped
    together, the learning rate again. `wanted` are the points that the next decision waits for."""

    def __init__(self, results: Results, arch: str) -> None:
        self.results, self.arch = results, arch
        self.worth = _SEED_NOISE / math.sqrt(len(tuning_seeds(arch)))
        self.wanted: list[Point] = []
        self.log: list[str] = []
        self.choice: tuple[float, Mult] | None = None
        self.plain_lr = lr = self._best_lr(())
        if lr is None:
            return
        mult = self._helpful(lr, ())
        if mult is None:
            return
        second = self._helpful(lr, mult) if mult else ()
        if second is None:
            return
        best = self._best_lr(second)
        if best is not None:
            self.choice = best, second

    def _loss(self, lr: float, mult: Mult) -> float | None:
        points = [_proxy(self.arch, lr, mult, seed) for seed in tuning_seeds(self.arch)]
        loss = self.results.mean(points)
        if loss is None:
            self.wanted += points
        return loss

    def _best_lr(self, mult: Mult) -> float | None:
        losses = {lr: self._loss(lr, mult) for lr in _PROXY_GRID}
        if None in losses.values():
            return None
        found = ", ".join(f"2^{rate:g} {loss:.4f}" for rate, loss in losses.items() if loss is not None)
        self.log.append(f"learning rates with {_named(mult)}: {found}")
        return min(losses, key=lambda lr: losses[lr] or DIVERGED)

    def _helpful(self, lr: float, start: Mult) -> Mult | None:
        """`start` with every single change that helps by more than the noise, if they help together too."""
        here = self._loss(lr, start)
        changes = {
            (group, factor): self._loss(lr, _scaled(start, group, factor)) for group in _GROUPS for factor in (0.5, 2.0)
        }
        if here is None or None in changes.values():
            return None
        kept = [change for change, loss in changes.items() if loss is not None and loss < here * (1 - self.worth)]
        together = functools.reduce(lambda mult, change: _scaled(mult, *change), kept, start)
        single = min(changes, key=lambda change: changes[change] or DIVERGED)
        joint = self._loss(lr, together)
        if joint is None:
            return None
        found = ", ".join(f"{g} x{f:g} {loss:.4f}" for (g, f), loss in changes.items() if loss is not None)
        self.log.append(
            f"at 2^{lr:g} with {_named(start)} {here:.4f}; changed: {found}; {_named(together)} {joint:.4f}"
        )
        if joint < here * (1 - self.worth):
            return together
        return _scaled(start, *single) if kept else start


def tune(results: Results, arch: str) -> Iterator[Point]:
    yield from Tuning(results, arch).wanted


# ---- transferred muP against SP tuned at each width ------------------------------------------------------------------

_SEEDS = (0, 1, 2, 3)
_SP_START = {128: (-8.0, -7.5, -7.0, -6.5, -6.0), 256: (-8.5, -8.0, -7.5, -7.0)}


def _decayed(arch: str, rule: str, width: int, lr: float, seed: int, mult: Mult = ()) -> Point:
    return Point(arch=arch, rule=rule, width=width, log2_lr=lr, seed=seed, schedule="linear", lr_mult=mult)


def sp_best(results: Results, arch: str, width: int) -> tuple[float | None, list[Point]]:
    """SP's best learning rate at a width by two seeds, and what is missing to say it; an edge widens the grid."""
    rates = list(_SP_START[width])
    while True:
        points = {lr: [_decayed(arch, "sp", width, lr, seed) for seed in _SEEDS[:2]] for lr in rates}
        losses = {lr: results.mean(row) for lr, row in points.items()}
        if None in losses.values():
            return None, [point for row in points.values() for point in row]
        best = min(losses, key=lambda lr: losses[lr] or DIVERGED)
        if best not in (min(rates), max(rates)):
            return best, []
        rates.append(best - 0.5 if best == min(rates) else best + 0.5)


def against(results: Results, arch: str) -> Iterator[Point]:
    """muP with the proxy's multipliers and learning rate, muP with its learning rate alone, SP tuned; x4 and x8."""
    tuning = Tuning(results, arch)
    if tuning.choice is None or tuning.plain_lr is None:
        yield from tuning.wanted
        return
    lr, mult = tuning.choice
    for width in WIDTHS[2:]:
        best, wanted = sp_best(results, arch, width)
        yield from wanted
        for seed in _SEEDS:
            yield _decayed(arch, "mup", width, lr, seed, mult)
            if best is not None:
                yield _decayed(arch, "sp", width, best, seed)
        for seed in _SEEDS[:2]:
            yield _decayed(arch, "mup", width, tuning.plain_lr, seed)


# ---- the same with what was not tuned --------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {  # name: schedule, further keys
    "linear": ("linear", ()),
    "cosine": ("cosine", ()),
    "weight decay 0.03": ("linear", ("optim.weight_decay=0.03",)),
    "clip 1": ("linear", ("optim.clip=1.0",)),
}


def variant(results: Results, arch: str, name: str, rule: str, seed: int) -> Point | None:
    """A run of width x4 with what linear decay chose, the schedule or a key changed; None before it is chosen."""
    tuning, width = Tuning(results, arch), WIDTHS[2]
    best, _ = sp_best(results, arch, width)
    if tuning.choice is None or best is None:
        return None
    lr, mult = tuning.choice if rule == "mup" else (best, ())
    schedule, more = VARIANTS[name]
    return dataclasses.replace(_decayed(arch, rule, width, lr, seed, mult), schedule=schedule, more=more)


def variants(results: Results, arch: str) -> Iterator[Point]:
    for name in VARIANTS:
        for rule in ("mup", "sp"):
            for seed in _SEEDS[:2]:
                point = variant(results, arch, name, rule, seed)
                if point is None:
                    yield from against(results, arch)
                    return
                yield point


# ---- time to the same loss -------------------------------------------------------------------------------------------

PUBLISHED_LOG2_LR = -13.2877  # 1e-4


def same_loss(results: Results, arch: str) -> Iterator[Point]:
    """At the largest width with looks on the way: muP and SP with the proxy's rate, SP with 1e-4, SP tuned."""
    width = WIDTHS[-1]
    proxy, tuned = best_on_grid(results, arch, "mup", WIDTHS[0]), best_on_grid(results, arch, "sp", width)
    if proxy is None or tuned is None:
        yield from transfer(results, arch)
        return
    looks = tuple(range(25, 601 if arch == "uvit" else 401, 25))  # beyond a run's end nobody looks
    for seed in (0, 1):
        for rule, lr in (("mup", proxy), ("sp", proxy), ("sp", PUBLISHED_LOG2_LR), ("sp", tuned)):
            yield Point(arch=arch, rule=rule, width=width, log2_lr=lr, seed=seed, looks=looks)


PARTS: dict[str, Callable[[Results], Iterator[Point]]] = {
    "quick": quick,
    **{f"transfer-{arch}": functools.partial(transfer, arch=arch) for arch in ARCHS},
    **{f"tune-{arch}": functools.partial(tune, arch=arch) for arch in ARCHS},
    **{f"against-{arch}": functools.partial(against, arch=arch) for arch in ARCHS},
    **{f"variants-{arch}": functools.partial(variants, arch=arch) for arch in ARCHS},
    **{f"time-{arch}": functools.partial(same_loss, arch=arch) for arch in ARCHS},
}
