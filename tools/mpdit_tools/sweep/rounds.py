"""The figure of a coordinate search: a panel a decision."""

import math
from typing import Any

from mpdit_tools.sweep.coordinate import Change, Round, Sweep
from mpdit_tools.sweep.marks import BLUE, GREY, MARKS, STAR, in_logs, log_ticks
from mpdit_tools.sweep.space import Values
from mpdit_tools.sweep.summary import Summary
from mpdit_tools.sweep.text import change_name, title


def draw(summary: Summary) -> Any:
    from matplotlib import pyplot

    log = summary.log
    tall = max((len(entry.changes) + 1 for entry in log if isinstance(entry, Round)), default=0)
    wide = [2.6 if isinstance(entry, Sweep) else 3.6 for entry in log]
    figure, axes = pyplot.subplots(
        1,
        len(log),
        figsize=(sum(wide) + 0.6, max(2.8, 0.9 + 0.24 * tall)),
        squeeze=False,
        width_ratios=wide,
        layout="constrained",
    )
    for number_of, (axis, entry) in enumerate(zip(axes.flat, log, strict=True), 1):
        if isinstance(entry, Sweep):
            _sweep(axis, entry, summary)
        else:
            _round(axis, entry)
        axis.set_title(f"{number_of}. {axis.get_title()}")
    figure.suptitle(title(summary), fontsize=9)
    return figure


def _sweep(axis: Any, entry: Sweep, summary: Summary) -> None:
    finite = {value: loss for value, loss in entry.losses.items() if math.isfinite(loss)}
    axis.plot([*finite], [*finite.values()], "o-", color=BLUE, markersize=4, linewidth=1)
    best = min(finite, key=lambda value: finite[value], default=None)
    if best is not None:
        axis.scatter([best], [finite[best]], **STAR)
    diverged = [value for value in entry.losses if value not in finite]
    axis.scatter(
        diverged, [1.0] * len(diverged), transform=axis.get_xaxis_transform(), clip_on=False, **MARKS["diverged"]
    )
    low, high = min(entry.losses), max(entry.losses)
    if in_logs(Values(key=entry.key, values=(), ordered=True), [low, high]):
        axis.set_xlim(low * 0.8, high * 1.25)
        axis.set_xscale("log")
        log_ticks(axis.xaxis, [*entry.losses])
    axis.set_xlabel(entry.key)
    axis.set_ylabel(f"{summary.spec.metric}, mean of {len(summary.spec.seeds)} seeds")
    axis.set_title("sweep")


def _round(axis: Any, entry: Round) -> None:
    changes: list[tuple[str, Change]] = [(change_name(change), change) for change in entry.changes]
    if entry.together:
        changes.append(("together", entry.together))
    finite = [gain for _, change in changes for gain in change.gains if math.isfinite(gain)]
    edge = -min(0.2, max([-gain for gain in finite if gain < 0], default=0.01)) * 1.15
    for row, (_, change) in enumerate(changes):
        gains = [max(gain, edge) for gain in change.gains if math.isfinite(gain)]
        bad = len(gains) < len(change.gains)
        colour = BLUE if change.kept else GREY
        if gains and not bad:
            axis.barh(row, max(change.gain, edge), color=colour, height=0.65, alpha=0.85)
        axis.plot(gains, [row] * len(gains), "|", color="black", markersize=6, markeredgewidth=1)
        if bad:
            axis.scatter([edge], [row], **MARKS["diverged"])
    axis.axvspan(-entry.needed, entry.needed, color="#000000", alpha=0.07, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_yticks(range(len(changes)), [name for name, _ in changes])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:+g}%")
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel("gain; ticks: seeds; gray: not beyond the noise")
    axis.set_title(f"changes at {entry.loss:.4f}")
