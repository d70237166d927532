"""Everything that a launch folder is made of: source, target, their muP tables, what is in the way or in doubt."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpdit.config import Config, flat
from mpdit.errors import InputError
from mpdit_tools import mup_table
from mpdit_tools.plan import report as plan_report
from mpdit_tools.plan import resolve
from mpdit_tools.plan.gpus import Machine
from mpdit_tools.transfer import cost, explain, launch, read, report, target, trials
from mpdit_tools.transfer.arguments import Arguments
from mpdit_tools.transfer.explain import Pair
from mpdit_tools.transfer.report import Facts
from mpdit_tools.transfer.source import Source


def gather(arguments: Arguments) -> Facts:
    """Everything that the folder is made of. Raises InputError where the proxy's values do not transfer."""
    asked = target.asked(arguments.to, arguments.overrides)
    found = read.read(arguments.source, arguments.tracking_uri)
    proxy, unsaid = target.proxy_of(found, asked)
    mup_table.check(proxy, f"--from {found.name}")
    goal = target.target_of(asked, proxy, arguments.out, completedp=arguments.completedp)
    machines = launch.machines(arguments.gpus, arguments.gpus_per_node, goal.config.parallel)
    edges = _edges(found, proxy, allowed=arguments.allow_edge)
    config, guessed = mup_table.with_vocabulary(goal.config)
    pair = _pair(arguments, proxy, config)
    if guessed:  # a guess is not written down
        pair = dataclasses.replace(pair, target=goal.config)
    untrainable = _trainable(asked.name, goal.config, machines.ranks)
    plan, plan_text, too_big = _plan(arguments, config, machines.ranks)
    warnings = (*found.warnings, *unsaid, *edges, *goal.warnings, guessed, untrainable, too_big)
    return Facts(
        source=found,
        target=goal,
        pair=pair,
        cost=_cost(arguments, found, pair, plan["model_flops_per_image"]),
        machines=machines,
        plan=plan,
        plan_text=plan_text,
        folder=str(arguments.out),
        warnings=tuple(filter(None, warnings)),
    )


def _edges(found: Source, proxy: Config, *, allowed: bool) -> list[str]:
    """A sentence for each value at an edge of what was tried.

    Raises InputError for the learning rate, on which most depends: if the best one lies beyond, the target's run is
    wasted. Others are flat, and a random search puts each at an edge by chance once in so many trials.
    """
    edges = trials.edges(found.trials, flat(proxy))
    for edge in edges:
        if edge.key == "optim.lr" and not allowed:
            raise InputError(
                f"--from {found.name}: {edge}, so that the true best may lie beyond; search on there, or give "
                "--allow-edge."
            )
    return [f"{edge}: the true best may lie beyond." for edge in edges]


def _pair(arguments: Arguments, proxy: Config, config: Config) -> Pair:
    """Proxy and target with their muP tables."""
    small, _ = mup_table.with_vocabulary(proxy)
    table, proxy_table = mup_table.tables([(f"--to {arguments.to}", config), (f"--from {arguments.source}", small)])
    proxy_rules = mup_table.rules_of(table, proxy_table)
    return Pair(proxy=small, target=config, table=table, proxy_table=proxy_table, proxy_rules=proxy_rules)


def _trainable(name: str, config: Config, ranks: int) -> str:
    """A sentence if the config lacks latents or text that it needs. Raises InputError if it could not be trained so."""
    from mpdit.train import preflight

    pixels = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=3, text_dim=0))
    try:
        preflight.without_data(pixels, ranks)
    except InputError as error:
        raise InputError(f"--to {name}: {error}") from error
    try:
        preflight.without_data(config, ranks)
    except InputError as error:
        return f"config.yaml can't be trained as it is: {error}"
    return ""


def _plan(arguments: Arguments, config: Config, ranks: int) -> tuple[Mapping[str, Any], str, str]:
    """plan.json, the same in words, and a sentence if the GPU's memory does not hold it."""
    machine = Machine.of(arguments.gpu, config, arguments.gpus_per_node)
    plan, resolved = resolve.of(config, ranks, machine)
    peak, has = plan.memory[plan.fullest].peak / 1e9, machine.gpu.memory_bytes / 1e9
    too_big = (
        f"a GPU would need {peak:.1f} GB, but {arguments.gpu} has {has:.0f}; `mpdit plan {arguments.out}/config.yaml "
        f"--search --gpus {ranks}` looks for a layout that fits."
    )
    told = plan_report.as_json(plan, resolved, arguments.gpu, machine)
    text = plan_report.text(plan, resolved, arguments.gpu, machine)
    return told, text, "" if plan_report.fits(plan, machine) else too_big


def _cost(arguments: Arguments, found: Source, pair: Pair, flops_per_image: int) -> cost.Cost | None:
    run = pair.proxy.train.batch_size * pair.proxy.train.steps
    tried = found.trials
    if arguments.trials is not None:
        if tried or arguments.trials < 1:
            raise InputError(
                f"--trials is {arguments.trials}, but should be at least 1, and is for a proxy without trials of its "
                f"own (PROXY has {len(tried)})."
            )
        tried = (trials.Trial(state=trials.COMPLETE, value=None, params={}, images=run),) * arguments.trials
    if not tried:
        return None
    train = pair.target.train
    sizes = report.parameters(pair.proxy_table), report.parameters(pair.table)
    return cost.of_trials(tried, *sizes, target_images=train.batch_size * train.steps, flops_per_image=flops_per_image)


def as_json(facts: Facts) -> Mapping[str, Any]:
    """The report, but for each parameter's values, which mup_table.json has."""
    size, open_value = ("name", "proxy", "target", "ratio"), ("name", "proxy", "target", "chosen", "known")
    return {
        "title": report.title(facts.pair),
        "from": {"name": facts.source.name, "said": facts.source.said},
        "warnings": facts.warnings,
        "sizes": [dict(zip(size, row, strict=True)) for row in report.sizes(facts.pair)],
        "hyperparameters": [dataclasses.asdict(line) for line in explain.lines(facts.pair)],
        "not_carried_over": [dict(zip(open_value, row, strict=True)) for row in report.untold(facts)],
        "replaced": facts.target.replaced,
        "cost": facts.cost and {**dataclasses.asdict(facts.cost), "share": facts.cost.share},
        "ranks": facts.machines.ranks,
        "plan": facts.plan,
        "out": facts.folder,
    }
