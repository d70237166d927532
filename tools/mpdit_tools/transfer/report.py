"""REPORT.md: everything that was decided, with the equation, its source and the reason; and what nobody knows."""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpdit.config import Config, flat
from mpdit.mup import rules
from mpdit.mup.table import Table
from mpdit.parallel import fp8_rules
from mpdit_tools import mup_table
from mpdit_tools.transfer import cost, explain
from mpdit_tools.transfer.cost import Cost
from mpdit_tools.transfer.explain import Line, Pair, number
from mpdit_tools.transfer.launch import Machines
from mpdit_tools.transfer.source import Source
from mpdit_tools.transfer.target import Target

Rows = Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the report tells of."""

    source: Source
    target: Target
    pair: Pair
    cost: Cost | None
    machines: Machines
    plan: Mapping[str, Any]  # plan.json
    plan_text: str
    folder: str
    warnings: tuple[str, ...]


def title(pair: Pair) -> str:
    proxy, model = pair.proxy.model, pair.target.model
    depth = f", depth {proxy.depth} -> {model.depth}" if proxy.depth != model.depth else ""
    preset = f" ({model.preset})" if model.preset else ""
    return f"{model.arch}{preset}, width {proxy.width} -> {model.width}{depth}, {pair.target.mup.parametrization}"


def markdown(facts: Facts) -> str:
    pair = facts.pair
    sections = {
        "": [f"# {title(pair)}", f"Tuned on: {facts.source.name}, {facts.source.said}.", _searched(facts)],
        "Mind": ["\n".join(f"* {warning}" for warning in facts.warnings)],
        "Sizes": [_table(["", "proxy", "target", "ratio"], sizes(pair)), _noise(pair)],
        "Hyperparameters": [
            "lr, wd, eps and std are the proxy's (`optim`, `mup.lr_mult`); m, m_L and r stand above.",
            _table(["", "proxy", "rule", "target", "why", "source"], map(_line, explain.lines(pair))),
        ],
        "What each parameter gets": ["Proxy -> target where they differ; a star is every block.", _parameters(pair)],
        "What theory does not carry over": [
            _table(["", "proxy", "target", "chosen", "what is known"], untold(facts)),
        ],
        "Replaced": _replaced(facts.target),
        "Cost of the tuning": ["\n".join(cost.sentences(facts.cost, pair.target.model.arch))],
        "Layout": [_layout(pair.target, facts.machines), f"```\n{facts.plan_text}\n```"],
        "Next": [_next(facts.folder)],
        "Sources": ["\n".join(f"* [{key}] {text}" for key, text in explain.SOURCES.items())],
    }
    parts = [[f"## {head}" if head else "", *body] for head, body in sections.items() if any(body)]
    return "\n\n".join(text for part in parts for text in part if text) + "\n"


def _searched(facts: Facts) -> str:
    """What the trials tried, and what won."""
    values = flat(facts.pair.proxy)
    keys = dict.fromkeys(key for trial in facts.source.trials for key in trial.params if key in values)
    return f"Searched: {', '.join(f'`{key}` = {_text(values[key])}' for key in keys)}." if keys else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that reads as one without a viewer, too; the last column is not padded."""
    body = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    widths[-1] = 0

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"

    return "\n".join([line(head), line(["-" * max(3, width) for width in widths]), *map(line, body)])


# ---- sizes -----------------------------------------------------------------------------------------------------------


def parameters(table: Table) -> int:
    return sum(math.prod(entry.tag.shape) for entry in table.values())


def sizes(pair: Pair) -> Rows:
    def images(config: Config) -> int:
        return config.train.batch_size * config.train.steps

    proxy, target = pair.proxy, pair.target
    rows = {
        "width": ("m", proxy.model.width, target.model.width),
        "depth": ("m_L", proxy.model.depth, target.model.depth),
        "head_dim": ("", proxy.model.head_dim, target.model.head_dim),
        "parameters": ("", parameters(pair.proxy_table), parameters(pair.table)),
        "batch size": ("m_B", proxy.train.batch_size, target.train.batch_size),
        "steps": ("", proxy.train.steps, target.train.steps),
        "images": ("m_D", images(proxy), images(target)),
    }
    return [
        [name, f"{own:,}", f"{its:,}", f"{symbol} = {number(its / own)}" if symbol else number(its / own)]
        for name, (symbol, own, its) in rows.items()
    ]


def _noise(pair: Pair) -> str:
    r = rules.noise_ratio(pair.target)
    if pair.target.mup.base_images is None:
        return "r = 1: batch size and length have no rule (`--no-completedp`)."
    return f"r = m_B / m_D = {number(r)}."


def _line(line: Line) -> list[str]:
    return [line.name, line.proxy, f"`{line.rule}`", line.target, line.why, f"[{line.source}]"]


def _parameters(pair: Pair) -> str:
    head, rows = mup_table.grouped_rows(pair.table, pair.proxy_rules)
    return _table(head, [[*row[:-1], " ".join(f"`{name}`" for name in row[-1].split("\n"))] for row in rows])


# ---- what nobody knows -----------------------------------------------------------------------------------------------

_KEPT, _SHARE = "the proxy's", "the proxy's share of the run"
_KNOWN = {
    "optim.clip": (
        _KEPT,
        "the gradient's norm does not grow with the width, so it keeps its meaning; worth a search",
    ),
    "optim.warmup_steps": (_SHARE, "mattered little in the paper's MMDiT"),
    "optim.decay_steps": (_SHARE, "schedules as shares of the run are what Complete(d)P was shown with"),
    "optim.beta1": (_KEPT, "over the width they were kept wherever transfer was shown"),
    "optim.beta2": (_KEPT, "as beta1"),
    "train.ema_decay": (
        _KEPT,
        "of no effect on training; it counts steps, so a longer run averages a smaller share",
    ),
    "data.caption_drop": (_KEPT, "belongs to guidance, not to the width"),
    "objective.logit_mean": (_KEPT, "the shift of timesteps goes with the number of tokens, which is the same"),
    "objective.logit_std": (_KEPT, "as logit_mean"),
    "objective.repa_weight": (_KEPT, "the paper searched it on the proxy and kept it"),
    "objective.repa_block": ("the proxy's share of the depth", "0 is a third of it"),
}


def untold(facts: Facts) -> Rows:
    """What the rules say nothing about: proxy, target, which default was chosen, what is known."""
    pair, target = facts.pair, facts.target
    before, after = flat(pair.proxy), flat(pair.target)
    rows = [
        [f"`{key}`", _text(before[key]), _text(after[key]), "you" if key in target.chosen else default, known]
        for key, (default, known) in _KNOWN.items()
        if _matters(key, pair.target)
    ]
    if not pair.completep:
        depth = [str(pair.proxy.model.depth), str(pair.target.model.depth)]
        rows.append(["depth", *depth, "has to stay", "mup has no rule for it; mup.parametrization completep has"])
    lengths = [f"{c.train.batch_size:,} x {c.train.steps:,}" for c in (pair.proxy, pair.target)]
    completedp = pair.target.mup.base_images is not None
    rule = "Complete(d)P's rule of r" if completedp else "no rule"
    known = "shown with cosine schedules; in the paper's Figure 3 the best learning rate drifts in its direction"
    rows.append(["batch size x steps", *lengths, rule, known])
    return rows


def _matters(key: str, config: Config) -> bool:
    """Whether a setting does anything in this run."""
    off = {
        "optim.decay_steps": config.optim.schedule != "wsd",
        "objective.logit_mean": config.objective.kind != "flow" or config.objective.timesteps != "logit_normal",
        "objective.repa_weight": not config.objective.repa_weight,
    }
    off["objective.logit_std"] = off["objective.logit_mean"]
    off["objective.repa_block"] = off["objective.repa_weight"]
    return not off.get(key, False)


def _text(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


# ---- the rest --------------------------------------------------------------------------------------------------------


def _replaced(target: Target) -> list[str]:
    """Where the target's own file said another value than the proxy tuned."""
    after = flat(target.config)
    rows = [[f"`{key}`", _text(old), _text(after[key])] for key, old in target.replaced.items()]
    return [_table(["", "the target's file", "the proxy's, taken"], rows)] if rows else []


def _layout(config: Config, machines: Machines) -> str:
    parallel = config.parallel
    data = machines.ranks // (parallel.tp * parallel.pp * parallel.cp)
    return (
        f"{machines}: TP {parallel.tp} x PP {parallel.pp} x CP "
        f"{parallel.cp} x DP {data}, {fp8_rules.said(parallel)}. A checkpoint every {config.train.save_every:,} steps."
    )


def _next(folder: str) -> str:
    return "\n".join(["```", *commands(folder), "```"])


def commands(folder: str) -> list[str]:
    """What to do with the folder."""
    path = shlex.quote(folder)
    return [f"mpdit plan {path}", f"mpdit rehearse {path}", f"bash {path}/launch.sh"]
