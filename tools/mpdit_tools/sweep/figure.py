"""Figures of a sweep: every trial against each searched key, the best so far, importances. Trials without a value keep
a place above the axis: none is left out of the picture."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpdit_tools.sweep import folder, rounds
from mpdit_tools.sweep.marks import BLUE, GOLD, GREY, RED, STAR, Heights, in_logs, log_ticks
from mpdit_tools.sweep.results import Record, ranked
from mpdit_tools.sweep.space import Axis, Range, Values, number
from mpdit_tools.sweep.summary import Summary
from mpdit_tools.sweep.text import title


def save(summary: Summary, where: Path) -> list[Path]:
    """Write the PNGs that this sweep has something for; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted: list[tuple[str, Callable[[Summary], Any], bool]] = [
        ("response.png", _responses, any(record.value is not None for record in summary.over)),
        ("coordinate.png", rounds.draw, bool(summary.log)),
        ("importance.png", _importance, bool(summary.importance)),
        ("progress.png", _progress, any(record.value is not None for record in summary.over)),
    ]
    made = []
    with pyplot.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.25, "axes.titlesize": 9}):
        for name, draw, possible in wanted:
            if possible:
                figure = draw(summary)
                save = functools.partial(figure.savefig, dpi=130, format="png", bbox_inches="tight")
                made.append(folder.write(where / name, save))
                pyplot.close(figure)
            else:
                (where / name).unlink(missing_ok=True)
    return made


# ---- every trial against each key ------------------------------------------------------------------------------------


def _responses(summary: Summary) -> Any:
    from matplotlib import pyplot

    axes_of = summary.spec.axes
    columns = {4: 2}.get(len(axes_of), min(3 if len(axes_of) <= 6 else 4, len(axes_of)))
    lines = -(-len(axes_of) // columns)
    single = len(axes_of) == 1
    size = (5.6, 4.0) if single else (3.5 * columns + 0.9, 3.0 * lines + 0.5)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    heights, hue = Heights.of(summary.over), _hue(summary)
    for axis, searched in zip(axes.flat, axes_of, strict=False):
        _response(axis, searched, summary, heights, hue)
        heights.apply(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel(summary.spec.metric)
    for axis in axes.flat[len(axes_of) :]:
        axis.set_visible(False)
    figure.suptitle(title(summary), fontsize=9)
    _legend(figure, summary)
    if hue is not None:
        shades = pyplot.cm.ScalarMappable(cmap="viridis", norm=_norm(hue, summary))
        bar = figure.colorbar(shades, ax=axes, shrink=0.8, aspect=30, label=hue.key, pad=0.01)
        values = [record.params[hue.key] for record in summary.over]
        if in_logs(hue, values):
            log_ticks(bar.ax.yaxis, values, hue)
    return figure


def _legend(figure: Any, summary: Summary) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], marker="*", markersize=11, color="none", mfc=GOLD, mec="black", label="best setting")]
    if any(record.seed not in summary.spec.seeds for record in summary.over):
        marks.append(Line2D([], [], marker="D", markersize=4, color="none", mfc="none", mec=GREY, label="another seed"))
    if len(summary.spec.axes) > 1 and any(isinstance(axis, Range) for axis in summary.spec.axes):
        marks.append(Line2D([], [], color=GREY, linewidth=1, label="lower hull"))
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=7)


def _hue(summary: Summary) -> Axis | None:
    """The key that colours all panels: the most important number of several; None where one key was searched."""
    numeric = {axis.key: axis for axis in summary.spec.axes if not isinstance(axis, Values) or axis.ordered}
    if len(summary.spec.axes) < 2 or not numeric:
        return None
    first = next((key for key in summary.importance if key in numeric), None)
    return numeric[first or ("optim.lr" if "optim.lr" in numeric else next(iter(numeric)))]


def _norm(axis: Axis, summary: Summary) -> Any:
    from matplotlib import colors

    values = [record.params[axis.key] for record in summary.over]
    log = in_logs(axis, values)
    return (colors.LogNorm if log else colors.Normalize)(min(values), max(values))


def _response(axis: Any, searched: Axis, summary: Summary, heights: Heights, hue: Axis | None) -> None:
    place = _places(axis, searched, summary)
    jitter = _jitter(searched, summary)

    def at(record: Record) -> float:
        return jitter(place(record.params[searched.key]), record.number)

    heights.scatter_rows(axis, summary.over, at)
    there = [record for record in summary.over if heights.row(record) == ""]
    shown = [record for record in there if record.seed in summary.spec.seeds]
    others = [record for record in there if record.seed not in summary.spec.seeds]
    # Another seed's luck moves a run for other reasons than the key.
    axis.scatter([*map(at, others)], [r.value for r in others], s=14, marker="D", facecolors="none", edgecolors=GREY)
    colour = {"color": BLUE} if hue is None else {"c": [record.params[hue.key] for record in shown], "cmap": "viridis"}
    norm = None if hue is None else _norm(hue, summary)
    values = [record.value for record in shown]
    axis.scatter(
        [*map(at, shown)], values, s=20, alpha=0.85, linewidths=0.4, edgecolors="white", norm=norm, zorder=4, **colour
    )
    if len(summary.spec.axes) == 1:
        _curve(axis, searched, summary, place)
    elif isinstance(searched, Range):
        _hull(axis, searched, shown)
    if summary.best is not None:
        best = (place(summary.best.params[searched.key]), summary.best.mean(summary.spec.seeds))
        axis.scatter(*best, **STAR)
    axis.set_xlabel(searched.key)
    if searched.key in summary.narrow:
        axis.set_title(f"best at an end: {summary.narrow[searched.key]}", color=RED, fontsize=7.5)


def _places(axis: Any, searched: Axis, summary: Summary) -> Callable[[Any], float]:
    """Sets the scale of the x axis; where a value stands on it."""
    values = sorted({record.params[searched.key] for record in summary.over}, key=_order)
    if isinstance(searched, Values) and not (searched.ordered and in_logs(searched, values)):
        listed = [*searched.values, *(value for value in values if value not in searched.values)]
        axis.set_xticks(range(len(listed)), [number(value) for value in listed])
        axis.set_xlim(-0.5, len(listed) - 0.5)
        return lambda value: float(listed.index(value))
    if in_logs(searched, values):
        axis.set_xscale("log")
        log_ticks(axis.xaxis, (searched.low, searched.high) if isinstance(searched, Range) else values, searched)
    if isinstance(searched, Range):
        pad = 0.04
        low, high = searched.low, searched.high
        wide = (high / low) ** pad if searched.log else (high - low) * pad
        axis.set_xlim(low / wide if searched.log else low - wide, high * wide if searched.log else high + wide)
    return float


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _jitter(searched: Axis, summary: Summary) -> Callable[[float, int], float]:
    """Spreads trials that share a place on an axis of categories; the same at every drawing."""
    categories = isinstance(searched, Values) and not (
        searched.ordered and in_logs(searched, [record.params[searched.key] for record in summary.over])
    )
    wide = 0.3 if categories and len(summary.spec.axes) > 1 else 0.0
    return lambda x, trial: x + wide * ((trial * 0.618034) % 1 - 0.5)


def _curve(axis: Any, searched: Axis, summary: Summary, place: Callable[[Any], float]) -> None:
    """One key: the mean over seeds at each value."""
    if isinstance(searched, Values):
        found = sorted(ranked(summary.spec, summary.over), key=lambda setting: place(setting.params[searched.key]))
        means = [setting.mean(summary.spec.seeds) for setting in found]
        axis.plot([place(s.params[searched.key]) for s in found], means, "-", color=BLUE, linewidth=1, alpha=0.6)


def _hull(axis: Any, searched: Range, shown: Sequence[Record]) -> None:
    """The lower convex hull of all trials: what the key could reach, whatever the others were."""
    place = math.log if searched.log else float
    points = sorted((place(record.params[searched.key]), record.loss) for record in shown)
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and not _turns_up(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    # The outermost trials are always on it: one that is near its neighbour, and worse, says nothing of the key.
    close = 0.1 * (place(searched.high) - place(searched.low))
    for end, inner in ((0, 1), (-1, -2)):
        if len(hull) > 2 and abs(hull[end][0] - hull[inner][0]) < close and hull[end][1] > hull[inner][1]:
            hull.pop(end)
    x_of = math.exp if searched.log else float
    axis.plot([x_of(x) for x, _ in hull], [y for _, y in hull], "-", color=GREY, linewidth=1, zorder=2)


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether the way from a over b to c bends upwards."""
    return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])


# ---- in the order of the trials --------------------------------------------------------------------------------------


def _progress(summary: Summary) -> Any:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
    heights = Heights.of(summary.over)
    heights.scatter_rows(axis, summary.over, lambda record: record.number)
    for kind, marker, colour in (("search", "o", BLUE), ("confirm", "D", GOLD)):
        found = [record for record in summary.over if record.kind == kind and heights.row(record) == ""]
        name = {"search": "a trial", "confirm": "one of the best again, another seed"}[kind]
        if found:
            axis.scatter(
                *zip(*((r.number, r.value) for r in found), strict=True), s=16, marker=marker, color=colour, label=name
            )
    searched = [record for record in summary.over if record.kind == "search" and record.value is not None]
    so_far = [min(record.loss for record in searched[: n + 1]) for n in range(len(searched))]
    axis.step(
        [record.number for record in searched], so_far, where="post", color="black", linewidth=1, label="best so far"
    )
    heights.apply(axis)
    axis.set_xlabel("trial")
    axis.set_ylabel(summary.spec.metric)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(title(summary))
    figure.legend(fontsize=7, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _importance(summary: Summary) -> Any:
    from matplotlib import pyplot

    names = [*summary.importance][::-1]
    figure, axis = pyplot.subplots(figsize=(5.0, 0.7 + 0.38 * len(names)), layout="constrained")
    bars = axis.barh(names, [summary.importance[name] for name in names], color=BLUE, height=0.6)
    axis.bar_label(bars, [f"{summary.importance[name]:.0%}" for name in names], padding=3, fontsize=8)
    axis.set_xlim(0, 1.1 * max(summary.importance.values()))
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.grid(visible=False, axis="y")
    axis.set_title("share in being among the best trials (PED-ANOVA)")
    return figure
