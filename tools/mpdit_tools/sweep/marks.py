"""What the figures of a sweep share: colours, the loss axis with its rows for trials without a value, ticks."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mpdit_tools.sweep.results import Record
from mpdit_tools.sweep.space import Axis, Range

GREY, RED, BLUE, GOLD = "#7a8794", "#c62828", "#1f5fa8", "#f0a202"
STAR: dict[str, Any] = {"marker": "*", "s": 130, "color": GOLD, "edgecolors": "black", "linewidths": 0.7, "zorder": 6}
_WIDE = 3.0  # of the losses between the best and the third quartile: what is shown above the best at most


MARKS: dict[str, dict[str, Any]] = {
    "off the scale": {"marker": "^", "color": GREY, "s": 16, "alpha": 0.7, "linewidths": 0},
    "pruned": {"marker": "o", "facecolors": "none", "edgecolors": GREY, "s": 16, "linewidths": 0.9},
    "diverged": {"marker": "x", "color": RED, "s": 22, "linewidths": 1.3},
    "failed": {"marker": "s", "facecolors": "none", "edgecolors": RED, "s": 16, "linewidths": 0.9},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heights:
    """The loss axis: values up to `cap`; above, a row each for trials off the scale, pruned, diverged, failed."""

    low: float
    cap: float
    log: bool
    rows: tuple[str, ...]

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Heights":
        """An axis on which the good values can be told apart, however bad the bad ones are."""
        values = [record.value for record in records if record.value is not None]
        low = min(values)
        third = statistics.quantiles(values, n=4)[2] if len(values) > 1 else low
        cap = min(max(values), low + _WIDE * (third - low)) if third > low else max(values)
        cap = max(cap, low + 1e-3 * abs(low))
        states = {record.state for record in records} | ({"off the scale"} if cap < max(values) else set())
        return cls(low=low, cap=cap, log=low > 0 and cap > 3 * low, rows=tuple(row for row in MARKS if row in states))

    def at(self, share: float) -> float:
        """The value at a share of the way from `low` (0) to `cap` (1), and on beyond."""
        if self.log:
            return self.low * (self.cap / self.low) ** share
        return self.low + (self.cap - self.low) * share

    def row(self, record: Record) -> str:
        """The row of a trial that is not on the scale; empty for one that is."""
        if record.value is None:
            return record.state
        return "off the scale" if record.value > self.cap else ""

    def of_row(self, row: str) -> float:
        return self.at(1.09 + 0.075 * self.rows.index(row))

    def apply(self, axis: Any) -> None:
        """Limits and ticks; names of the rows at the left."""
        if self.log:
            axis.set_yscale("log")
        top = self.at(1.06 + 0.075 * len(self.rows))
        axis.set_ylim(self.at(-0.06), top)
        if self.rows:
            axis.axhspan(self.at(1.045), top, color="#000000", alpha=0.04, linewidth=0)
        ticks = [t for t in axis.get_yticks() if self.at(-0.06) <= t <= self.cap]
        axis.set_yticks([*ticks, *map(self.of_row, self.rows)], [*(f"{t:.4g}" for t in ticks), *self.rows])
        axis.minorticks_off()

    def scatter_rows(self, axis: Any, records: Sequence[Record], at: Callable[[Record], float]) -> None:
        """Marks of the trials that are not on the scale."""
        for row in self.rows:
            found = [record for record in records if self.row(record) == row]
            axis.scatter([*map(at, found)], [self.of_row(row)] * len(found), zorder=3, **MARKS[row])


def in_logs(axis: Axis, values: Sequence[Any]) -> bool:
    """Whether a numeric axis is drawn in logarithms."""
    if isinstance(axis, Range):
        return axis.log
    return min(values) > 0 and max(values) >= 4 * min(values)


def log_ticks(axis: Any, values: Sequence[float], searched: Axis | None = None) -> None:
    """Ticks at powers of two where the search speaks in them, as for learning rates; else at 1, 2, 5 a decade."""
    from matplotlib import ticker

    asked = (searched.low, searched.high) if isinstance(searched, Range) else values
    first, last = math.ceil(math.log2(min(values)) - 1e-9), math.floor(math.log2(max(values)) + 1e-9)
    if sum(math.frexp(value)[0] == 0.5 for value in asked) >= 2 and 1 <= last - first <= 16:
        exponents = range(first, last + 1, -(-(last - first) // 8))
        axis.set_ticks([2.0**e for e in exponents], [f"{2.0**e:g}" if e >= -3 else f"$2^{{{e}}}$" for e in exponents])
    else:
        decades = math.log10(max(values) / min(values))
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())
