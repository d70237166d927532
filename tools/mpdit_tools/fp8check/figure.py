"""The check as a picture: a column a recipe; the gap over the steps above, what is lost over the width below."""

from pathlib import Path
from typing import Any

from mpdit.parallel.fp8 import NAMES
from mpdit_tools.fp8check.check import EXACT
from mpdit_tools.fp8check.report import Outcome

_COLOURS = {"x": "#1565c0", "w": "#2e7d32", "dy": "#c62828"}
_STYLES = {"underflow": "-", "saturation": ":", "error": "--"}


def save(outcome: Outcome, title: str, path: Path) -> Path:
    """Write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    recipes = outcome.recipes
    size = (3.6 * len(recipes) + 1.2, 6.2)
    figure, axes = pyplot.subplots(2, len(recipes), figsize=size, squeeze=False, sharey="row")
    for column, recipe in enumerate(recipes):
        _gaps(axes[0, column], outcome, recipe)
        _losses(axes[1, column], outcome, recipe)
        axes[0, column].set_title(recipe, fontsize=9)
    axes[0, 0].set_ylabel("(loss - loss in bf16) / loss in bf16, %", fontsize=8)
    axes[1, 0].set_ylabel("share lost", fontsize=8)
    for axis in axes[:, -1]:
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _gaps(axis: Any, outcome: Outcome, recipe: str) -> None:
    """A curve a width; fp32's, in grey, is what a change of rounding does by itself."""
    from matplotlib import colormaps

    for number, width in enumerate(outcome.widths):
        colour = colormaps["viridis"](0.85 * number / max(1, len(outcome.widths) - 1))
        exact, curve = outcome.gaps[width, EXACT].curve, outcome.gaps[width, recipe].curve
        label = "fp32, all widths" if number == 0 else None
        axis.plot(range(1, len(exact) + 1), [100 * y for y in exact], color="#b0bec5", linewidth=0.7, label=label)
        axis.plot(range(1, len(curve) + 1), [100 * y for y in curve], color=colour, linewidth=1, label=f"width {width}")
    bound = 100 * outcome.bounds.gap_bound
    axis.axhline(bound, color="#c62828", linewidth=0.6, linestyle="--")
    # A recipe that fails is a hundred times off where another one is within a tenth of the bound.
    axis.set_yscale("symlog", linthresh=bound / 5 or 0.01)
    axis.set_xlabel("step", fontsize=8)
    _plain(axis)


def _losses(axis: Any, outcome: Outcome, recipe: str) -> None:
    for name in NAMES:
        for statistic, style in _STYLES.items():
            shares = [outcome.share(width, recipe, name, statistic) for width in outcome.widths]
            points = [(w, y) for w, y in zip(outcome.widths, shares, strict=True) if y > 0]
            if points:
                axis.plot(
                    *zip(*points, strict=True), style, color=_COLOURS[name], marker="o", markersize=2.5, linewidth=1
                )
            axis.plot([], [], style, color=_COLOURS[name], label=f"{name} {statistic}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(outcome.widths, [str(width) for width in outcome.widths])
    axis.set_xlabel("width", fontsize=8)
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
