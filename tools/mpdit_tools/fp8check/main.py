"""``mpdit fp8check CONFIG``: a model in emulated FP8 beside bf16, over the width."""

import dataclasses
import json
import sys
import time
from typing import Any

import tyro

from mpdit import config as configs
from mpdit.config import Config
from mpdit_tools.fp8check.arguments import Arguments, Bounds


def main(argv: list[str]) -> int:
    """0 when every recipe is within the bounds, 1 otherwise. Raises InputError for widths that don't fit."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit fp8check")
    config = configs.load(arguments.config, arguments.overrides)

    from mpdit.train.main import use_cores

    use_cores()
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.errors import InputError
    from mpdit.parallel import groups
    from mpdit_tools.fp8check import check, report

    if groups.world_size() > 1:
        raise InputError("mpdit fp8check runs in one process; start it without torchrun.")
    if arguments.out:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {arguments.out}: {error.strerror}; give a folder that can be made.") from error
    began = time.monotonic()
    runs = check.plan(arguments, config)
    bounds = Bounds(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Bounds)})
    outcome = report.Outcome(bounds=bounds, seen=list(check.run(arguments, runs, _progress(arguments))))
    groups.stop()
    _tell(arguments, config, outcome, time.monotonic() - began)
    return 0 if outcome.passed else 1


def _progress(arguments: Arguments) -> Any:
    terminal = sys.stderr.isatty()

    def say(done: int, runs: int, what: str, left_s: float) -> None:
        if arguments.json and not terminal:
            return
        left = f", {left_s / 60:.0f} min left" if left_s > 60 else f", {left_s:.0f} s left" if left_s else ""
        line = f"run {min(done + 1, runs)} of {runs}: {what}{left}"
        print(line.ljust(79) if terminal else line, end="\r" if terminal and done < runs else "\n", file=sys.stderr)
        sys.stderr.flush()

    return say


def _tell(arguments: Arguments, config: Config, outcome: Any, took_s: float) -> None:
    from mpdit_tools.fp8check import figure, report

    model, mup, verdict = config.model, config.mup, "pass" if outcome.passed else "FAIL"
    title = f"{model.arch}, {mup.parametrization}, depth {model.depth}, emulated FP8"
    found = report.as_json(outcome)
    if arguments.out:
        figure.save(outcome, f"{title}: {verdict}", arguments.out / "fp8check.png")
        (arguments.out / "fp8check.json").write_text(json.dumps(found) + "\n")
    if arguments.json:
        print(json.dumps(found))
        return
    _tables(title, outcome)
    for sentence in outcome.findings:
        print(sentence)
    where = f"; figure and JSON in {arguments.out}" if arguments.out else ""
    print(f"{verdict}: {len(outcome.seen)} runs in {took_s:.0f} s{where}")


def _tables(title: str, outcome: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from mpdit_tools.fp8check import report

    console = Console(width=None if sys.stdout.isatty() else 140)
    gaps = Table("width", "", "loss in bf16", "gap", "noise", "", title=title)
    for row in report.gap_rows(outcome):
        gaps.add_row(*row, style="red" if row[-1] == "OUT" else None)
    widths = [f"width {width}" for width in outcome.widths]
    shares = Table("recipe", "tensor", "", *widths, "slope", title="lost, of all inputs, weights and output gradients")
    for row in report.share_rows(outcome):
        shares.add_row(*row)
    worst = Table("recipe", "", f"worst at width {outcome.widths[-1]}")
    for row in report.worst_rows(outcome):
        worst.add_row(*row)
    for table in (gaps, shares, worst):
        console.print(table)
