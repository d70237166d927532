"""The check as a picture: small multiples of each statistic against the width, flat where muP holds."""

from pathlib import Path
from typing import Any

from mpdit.mup.coordcheck import ACTIVATION, CHANGE, UPDATE, Key
from mpdit_tools.coordcheck.report import Outcome

_LABELLED = 4  # curves out of bounds that are named in a panel
_GREY, _RED = "#7a8794", "#c62828"


def save(outcome: Outcome, title: str, path: Path) -> Path:
    """Write a PNG: a panel for each judged statistic and step, a curve a module or parameter, over its first value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted(
        {(key.step, key.statistic) for key in outcome.slopes if outcome.bound(key) is not None},
        key=lambda panel: (panel[0], [ACTIVATION, CHANGE, UPDATE].index(panel[1])),
    )
    columns = min(4, max(1, len(panels)))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.4 * columns, 2.9 * lines), squeeze=False, sharex=True)
    for axis, (step, statistic) in zip(axes.flat, panels, strict=False):
        _panel(axis, outcome, statistic, step)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(outcome.axis, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _panel(axis: Any, outcome: Outcome, statistic: str, step: int) -> None:
    sizes, named = sorted(outcome.measured), 0
    keys = [key for key in outcome.slopes if (key.statistic, key.step) == (statistic, step)]
    for key in sorted(keys, key=lambda key: outcome.off(key)):
        bound = outcome.bound(key)
        out = bound is not None and outcome.off(key) > bound
        curve = _relative(outcome, key, sizes)
        axis.plot(sizes, curve, color=_RED if out else _GREY, linewidth=1.2 if out else 0.7, alpha=0.9 if out else 0.6)
    for key in sorted(keys, key=lambda key: -outcome.off(key)):
        bound = outcome.bound(key)
        if named < _LABELLED and bound is not None and outcome.off(key) > bound:
            axis.text(
                0.03,
                0.97 - 0.075 * named,
                f"{key.name}  {outcome.slopes[key]:+.2f}",
                transform=axis.transAxes,
                fontsize=6,
                va="top",
                color=_RED,
            )
            named += 1
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.4), max(high, 2.5))
    axis.tick_params(labelsize=7)
    axis.set_title(f"{statistic}, step {step}", fontsize=8)
    axis.grid(alpha=0.25)


def _relative(outcome: Outcome, key: Key, sizes: list[int]) -> list[float]:
    mean = [sum(values) / len(values) for values in (outcome.measured[size][key] for size in sizes)]
    return [value / mean[0] for value in mean]
