"""``mpdit coordcheck CONFIG``: the coordinate check, in one process or in any layout under torchrun."""

import json
import sys
import time
from typing import Any

import tyro

from mpdit import config as configs
from mpdit.config import Config
from mpdit_tools.coordcheck.arguments import Arguments


def main(argv: list[str]) -> int:
    """0 when all slopes are in bounds, 1 otherwise. Raises InputError for sizes that don't fit the layout."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit coordcheck")
    config = configs.load(arguments.config, arguments.overrides)

    from mpdit.train.main import use_cores

    use_cores()
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.parallel import groups
    from mpdit_tools.coordcheck import check

    began = time.monotonic()
    plan = check.plan(arguments, config, groups.world_size())
    outcomes = check.run(plan, _progress(arguments))
    disagreement = check.disagreement(outcomes)
    if groups.rank() == 0:
        _tell(arguments, config, plan, outcomes, disagreement, time.monotonic() - began)
    groups.stop()
    return 0 if all(outcome.passed for outcome in outcomes) and not disagreement else 1


def _progress(arguments: Arguments) -> Any:
    def say(done: int, runs: int, what: str) -> None:
        end = "\n" if done == runs else "\r"
        if not arguments.json and sys.stderr.isatty():
            print(f"run {done} of {runs}: {what}".ljust(79), end=end, file=sys.stderr, flush=True)

    return say


def _tell(
    arguments: Arguments, config: Config, plan: Any, outcomes: list[Any], disagreement: str, took_s: float
) -> None:
    from mpdit_tools.coordcheck import figure, report

    for number, outcome in enumerate(outcomes):
        suffix = f"-{number}" if number else ""
        if arguments.out:
            model, mup = config.model, config.mup
            title = f"{model.arch}, {mup.parametrization}, {outcome.layout}: {'pass' if outcome.passed else 'FAIL'}"
            figure.save(outcome, title, arguments.out / f"coordcheck{suffix}.png")
            (arguments.out / f"coordcheck{suffix}.json").write_text(json.dumps(report.as_json(outcome)) + "\n")
        if not arguments.json:
            _table(arguments, config, plan, outcome)
    if disagreement:
        print(disagreement)
    if arguments.json:
        print(json.dumps([report.as_json(outcome) for outcome in outcomes]))
        return
    passed = all(outcome.passed for outcome in outcomes) and not disagreement
    where = f"; figure and JSON in {arguments.out}" if arguments.out else ""
    print(f"{'pass' if passed else 'FAIL'}: {len(plan.runs)} runs in {took_s:.0f} s{where}")


def _table(arguments: Arguments, config: Config, plan: Any, outcome: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from mpdit.mup.coordcheck import expected_gradient_slope
    from mpdit_tools.coordcheck import report

    console = Console(width=None if sys.stdout.isatty() else 140)
    sizes = ", ".join(map(str, sorted(outcome.measured)))
    table = Table(title=f"{config.model.arch}, {config.mup.parametrization}, {outcome.layout}; {outcome.axis} {sizes}")
    for column in ("statistic", "step", "how many", "worst slope", "of", "bound", ""):
        table.add_column(column, justify="right" if column in ("step", "how many", "worst slope", "bound") else "left")
    for row in report.rows(outcome):
        table.add_row(*row, style="red" if row[-1] == "OUT" else None)
    console.print(table)
    for sentence in report.culprits(outcome):
        console.print(f"culprit: {sentence}", style="red", soft_wrap=True)
    if outcome.still:
        console.print(f"never moved, so not judged: {', '.join(outcome.still)}", soft_wrap=True)
    if arguments.gradients:
        expected = {name: expected_gradient_slope(tag) for name, tag in outcome.tags.items()}
        table = Table(title="gradient RMS: width exponent, and what the eps rule counts on")
        for column in ("parameter", "measured", "eps rule", ""):
            table.add_column(column)
        for row in report.gradient_rows(outcome, expected):
            table.add_row(*row)
        console.print(table)
