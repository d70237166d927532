"""The runs of a check: sizes x seeds x layouts, checked before the first starts, and what comes out of them."""

import dataclasses
import functools
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from mpdit import config as configs
from mpdit.config import Config, Parallel
from mpdit.errors import InputError
from mpdit.mup.coordcheck import BOUNDS, Bounds, Key
from mpdit.mup.roles import Tag
from mpdit.parallel import fp8_rules, groups
from mpdit.train import preflight
from mpdit_tools.coordcheck import measure
from mpdit_tools.coordcheck.arguments import Arguments
from mpdit_tools.coordcheck.report import Outcome

# Relative. Layouts differ by rounding alone, which a division by a small eps can enlarge.
_AGREE = 2e-2
# Of updates: where a gradient is nothing but rounding, as that of the keys' bias is without qk_norm, Adam makes whole
# steps of it, and a third of a bias of queries, keys and values moves at random.
_UPDATES_AGREE = 5e-2

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    layout: str
    size: int  # width or depth
    config: Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    axis: str
    steps: Sequence[int]
    bounds: Bounds
    from_data: bool
    runs: list[Run]


def plan(arguments: Arguments, config: Config, world: int) -> Plan:
    """All runs, each checked. Raises InputError for a size, seed count or step that makes no sense or does not fit."""
    sizes = arguments.depths or arguments.widths or tuple(config.mup.base_width * k for k in (1, 2, 4, 8))
    axis = "depth" if arguments.depths else "width"
    if arguments.depths and arguments.widths:
        raise InputError("--widths and --depths: give one of them.")
    if len(set(sizes)) < 3:
        raise InputError(f"--{axis}s {' '.join(map(str, sizes))}: give at least three; a slope needs them.")
    if min(arguments.steps, default=0) < 1 or arguments.seeds < 1:
        raise InputError(f"--steps {arguments.steps} and --seeds {arguments.seeds} should be at least 1.")
    runs = []
    for layout in arguments.layouts or ("",):
        laid_out = _laid_out(config, layout)
        preflight.machine(laid_out)
        for size in sorted(set(sizes)):
            for seed in range(arguments.seeds):
                small = measure.at(
                    laid_out,
                    width=size if axis == "width" else config.model.width,
                    depth=size if axis == "depth" else config.model.depth,
                    seed=seed,
                    lr=arguments.lr,
                    batch_size=arguments.batch_size,
                    steps=max(arguments.steps),
                )
                try:
                    small = preflight.without_data(small, world)
                except InputError as error:
                    raise InputError(f"--{axis}s: {size} does not fit: {error}") from error
                runs.append(Run(layout=_name(small.parallel, world), size=size, config=small))
    asked = {name: getattr(arguments, f"{name}_bound") for name in ("activation", "change", "update")}
    bounds = dataclasses.replace(BOUNDS[axis], **{name: value for name, value in asked.items() if value is not None})
    return Plan(axis=axis, steps=arguments.steps, bounds=bounds, from_data=arguments.data, runs=runs)


def _laid_out(config: Config, layout: str) -> Config:
    if not layout:
        return config
    tree = configs.to_dict(config)
    tree["parallel"] = fp8_rules.arithmetic(config.parallel)
    for part in re.split(r",(?=\w+=)", layout):
        configs.override(tree, f"parallel.{part}")
    return configs.from_dict(tree, "--layouts")


def _name(parallel: Parallel, world: int) -> str:
    dp = world // (parallel.tp * parallel.pp * parallel.cp)
    ways = {"TP": parallel.tp, "PP": parallel.pp, "VPP": parallel.vpp, "CP": parallel.cp, "DP": dp}
    named = " x ".join(f"{name}{size}" for name, size in ways.items() if size > 1)
    return (named or "one process") + (" + SP" if parallel.sp else "")


def run(plan: Plan, progress: Progress) -> list[Outcome]:
    """An outcome a layout, the same on every rank. Collective over all that were started."""
    measured: dict[str, dict[int, dict[Key, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    tags: dict[str, dict[str, Tag]] = {}
    for number, one in enumerate(plan.runs):
        if one.layout not in measured:  # groups are made once a layout: each is a pair of threads that gloo never ends
            if number:
                groups.leave_layout()
            groups.start(one.config.parallel, one.config.train.seed)
        values, whole = measure.run(one.config, plan.steps, from_data=plan.from_data)
        rename = functools.partial(_of_axis, axis=plan.axis, depth=one.config.model.depth)
        sums: dict[Key, list[float]] = defaultdict(list)
        for key, value in values.items():
            sums[dataclasses.replace(key, name=rename(key.name))].append(value)
        for key, parts in sums.items():
            measured[one.layout][one.size][key].append(statistics.fmean(parts))
        tags[one.layout] = {rename(name): tag for name, tag in whole.items()}
        progress(number + 1, len(plan.runs), f"{one.layout}, {plan.axis} {one.size}")
    return [
        Outcome(axis=plan.axis, layout=layout, bounds=plan.bounds, measured=rows, tags=tags[layout])
        for layout, rows in measured.items()
    ]


def _of_axis(name: str, axis: str, depth: int) -> str:
    """Over depths, all blocks but the last are one: a block has no twin in a model of another depth."""
    if axis == "width" or not name.startswith("blocks."):
        return name
    _, index, rest = name.split(".", 2)
    return f"blocks.{'last' if int(index) == depth - 1 else 'others'}.{rest}"


def disagreement(outcomes: Sequence[Outcome]) -> str:
    """A sentence on the first statistic that a layout changes; empty if none does."""
    first, *others = outcomes
    for other in others:
        for size, row in first.measured.items():
            for key, values in row.items():
                for mine, theirs in zip(values, other.measured[size].get(key, []), strict=True):
                    bound = _UPDATES_AGREE if key.statistic == measure.UPDATE else _AGREE
                    if abs(mine - theirs) > bound * max(abs(mine), abs(theirs)):
                        return (
                            f"layouts disagree: {key.statistic} of {key.name} at step {key.step}, {first.axis} {size} "
                            f"is {mine:.4g} in {first.layout} and {theirs:.4g} in {other.layout}."
                        )
    return ""
