"""Tables and figures of results.jsonl: python examples/lr_transfer/analyse.py writes results.md and the PNGs."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from plan import (
    ARCHS,
    FIRST_SEEDS,
    PROXY_SEEDS,
    VARIANTS,
    WIDTHS,
    Point,
    Results,
    Tuning,
    best_on_grid,
    grid,
    same_loss,
    seeds_of,
    sp_best,
    transfer,
    variant,
)
from plan import against as against_points

HERE = Path(__file__).parent


def parabola(losses: dict[float, float]) -> tuple[float, float, float, float] | None:
    """(middle, log loss there, slope, curvature) through the best grid point and its neighbours; None at an edge."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if best in (0, len(rates) - 1):
        return None
    x = rates[best - 1 : best + 2]
    y = [math.log(losses[rate]) for rate in x]
    h = x[1] - x[0]
    return x[1], y[1], (y[2] - y[0]) / (2 * h), (y[0] - 2 * y[1] + y[2]) / h**2


def vertex(losses: dict[float, float]) -> tuple[float, float]:
    """(log2 LR, loss) at the vertex of :func:`parabola`; at an edge of the grid the edge itself."""
    fitted = parabola(losses)
    if fitted is None:
        best = min(losses, key=lambda rate: losses[rate])
        return best, losses[best]
    middle, height, slope, curvature = fitted
    shift = -slope / curvature if curvature > 0 else 0.0
    return middle + shift, math.exp(height + slope * shift / 2)


def at(losses: dict[float, float], rate: float) -> float:
    """The loss at a learning rate between grid points: on the parabola where it was fitted, else on a straight line."""
    fitted = parabola(losses)
    if fitted is not None and abs(rate - fitted[0]) <= 1:
        middle, height, slope, curvature = fitted
        shift = rate - middle
        return math.exp(height + slope * shift + curvature * shift**2 / 2)
    rates = sorted(losses)
    low = max([r for r in rates if r <= rate], default=rates[0])
    high = min([r for r in rates if r >= rate], default=rates[-1])
    if low == high:
        return losses[low]
    part = (rate - low) / (high - low)
    return math.exp((1 - part) * math.log(losses[low]) + part * math.log(losses[high]))


def curve(results: Results, arch: str, rule: str, width: int, seeds: Sequence[int]) -> dict[float, float]:
    """Mean loss over seeds by log2 LR; learning rates that a seed lacks are left out."""
    of = "mup" if width == WIDTHS[0] else rule
    found = {}
    for rate in grid(arch, rule, width):
        mean = results.mean(Point(arch=arch, rule=of, width=width, log2_lr=rate, seed=seed) for seed in seeds)
        if mean is not None:
            found[float(rate)] = mean
    return found


def complete(results: Results, arch: str) -> bool:
    return all(point.key in results.rows for point in transfer(results, arch))


def transfer_table(results: Results, arch: str) -> list[str]:
    """The optimum of each width, how far it moved, and what the proxy's learning rate costs there."""
    if not complete(results, arch):
        return [f"{arch}: not run to the end.", ""]
    base = vertex(curve(results, arch, "mup", WIDTHS[0], PROXY_SEEDS))
    seeds_at = [len(seeds_of(arch, rule, WIDTHS[-1])) for rule in ("mup", "sp")]
    lines = [
        f"### {arch}, seeds: proxy {len(PROXY_SEEDS)}, muP {seeds_at[0]}, SP {seeds_at[1]}",
        "",
        "| width | muP vertex (each seed) | loss there | at the proxy's LR | SP vertex (each seed) | loss there "
        "| at the proxy's LR |",
        "|---|---|---|---|---|---|---|",
    ]
    for width in WIDTHS:
        cells = []
        for rule in ("mup", "sp"):
            seeds = seeds_of(arch, rule, width)
            losses = curve(results, arch, rule, width, seeds)
            each = [vertex(curve(results, arch, rule, width, [s]))[0] for s in seeds]
            where, best = vertex(losses)
            regret = at(losses, base[0]) / best - 1 if base[0] <= max(losses) else math.nan
            cells += [
                f"{where:+.2f} ({', '.join(f'{x:+.2f}' for x in each)})",
                f"{best:.4f}",
                f"{regret:+.1%}" if regret == regret else "not on the grid",
            ]
        lines.append(f"| {width} | {' | '.join(cells)} |")
    return [*lines, "", _medians(results, arch), ""]


def _medians(results: Results, arch: str) -> str:
    """What single seeds do not move: the median of their vertices, by width."""
    medians = [
        statistics.median(
            vertex(curve(results, arch, "mup", width, [seed]))[0] for seed in seeds_of(arch, "mup", width)
        )
        for width in WIDTHS
    ]
    told = ", ".join(f"{width}: {median:+.2f}" for width, median in zip(WIDTHS, medians, strict=True))
    return f"Median of the seeds' muP vertices: {told}; they span {max(medians) - min(medians):.2f} octaves."


def transfer_figure(results: Results, path: Path) -> None:
    """Loss against learning rate, a curve a width: muP above, SP below, a column a model. Curves are means of the first
    seeds, which ran on the whole grid; crosses mark the vertex over all seeds."""
    from matplotlib import pyplot

    archs = [arch for arch in ARCHS if complete(results, arch)]
    if not archs:
        return
    figure, axes = pyplot.subplots(
        2, len(archs), figsize=(3.4 * len(archs), 5.4), squeeze=False, sharex="col", sharey="col"
    )
    shades = pyplot.get_cmap("viridis")([0.05, 0.35, 0.6, 0.85])
    for column, arch in enumerate(archs):
        for axis, rule, name in zip(axes[:, column], ("mup", "sp"), ("muP", "SP"), strict=True):
            for width, shade in zip(WIDTHS, shades, strict=True):
                losses = curve(results, arch, rule, width, FIRST_SEEDS)
                axis.plot(
                    [*losses],
                    [*losses.values()],
                    "o-",
                    color=shade,
                    markersize=3,
                    linewidth=1.2,
                    label=str(width),
                )
                where, best = vertex(curve(results, arch, rule, width, seeds_of(arch, rule, width)))
                axis.plot([where], [best], "x", color=shade, markersize=8, markeredgewidth=2)
            axis.set_title(f"{arch}, {name}", fontsize=9)
            axis.grid(alpha=0.25)
            lowest = min(min(curve(results, arch, rule, width, FIRST_SEEDS).values()) for width in WIDTHS)
            axis.set_ylim(lowest * 0.97, lowest * 1.6)
        axes[1, column].set_xlabel("log2 learning rate", fontsize=8)
    axes[0, 0].set_ylabel("validation loss", fontsize=8)
    axes[1, 0].set_ylabel("validation loss", fontsize=8)
    axes[0, 0].legend(title="width", fontsize=7, title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---- muP with the proxy's multipliers against SP tuned at each width -------------------------------------------------


def _cost_s(results: Results, points: Iterable[Point]) -> float:
    return sum(results.rows[p.key]["cpu_s"] for p in {p.key: p for p in points}.values() if p.key in results.rows)


def against_table(results: Results, arch: str) -> list[str]:
    tuning = Tuning(results, arch)
    if tuning.choice is None:
        return [f"{arch}: the proxy's tuning is not done."]
    rate, mult = tuning.choice
    points = {p.key: p for p in against_points(results, arch)}.values()
    lines = [
        f"### {arch}: learning rate 2^{rate:g}, multipliers {', '.join(f'{g} x{v:g}' for g, v in mult) or 'none'}",
        "",
        "| width | muP, transferred | SP tuned here (log2 LR) | difference, each seed | mean |",
        "|---|---|---|---|---|",
    ]
    for width in WIDTHS[2:]:
        best, _ = sp_best(results, arch, width)
        pairs = []
        for point in points:
            if point.width == width and point.rule == "mup" and point.lr_mult == mult and point.log2_lr == rate:
                twin = [p for p in points if (p.width, p.rule, p.seed, p.log2_lr) == (width, "sp", point.seed, best)]
                ours, theirs = results.loss(point), results.loss(twin[0]) if twin else None
                if ours is not None and theirs is not None:
                    pairs.append((ours, theirs))
        if not pairs:
            lines.append(f"| {width} | not run to the end | | | |")
            continue
        gaps = [ours / theirs - 1 for ours, theirs in pairs]
        lines.append(
            f"| {width} | {statistics.fmean(o for o, _ in pairs):.4f} | {statistics.fmean(t for _, t in pairs):.4f} "
            f"({best:g}) | {' '.join(f'{g:+.1%}' for g in gaps)} | **{statistics.fmean(gaps):+.2%}** |"
        )
    return [*lines, "", _tuning_cost(results, arch), "", *(f"* {step}" for step in tuning.log), ""]


def _tuning_cost(results: Results, arch: str) -> str:
    """What each side spent before its runs above: on the proxy once, or at each width."""

    def spent(rule: str, width: int, seeds: Sequence[int]) -> str:
        own = [
            row["cpu_s"]
            for row in results.rows.values()
            if all(row["point"][key] == value for key, value in (("arch", arch), ("rule", rule), ("width", width)))
            and (row["point"]["schedule"], row["point"]["more"]) == ("linear", [])
            and row["point"]["seed"] in seeds
        ]
        return f"{len(own)} runs, {sum(own) / 60:.1f} core-minutes"

    sp = "; ".join(f"at {width} {spent('sp', width, (0, 1))}" for width in WIDTHS[2:])
    return (
        f"Spent on tuning: muP on the proxy, learning rate and six multipliers, {spent('mup', WIDTHS[0], range(8))}; "
        f"SP its learning rate, {sp}."
    )


def variants_table(results: Results, arch: str) -> list[str]:
    """muP against SP at x4, neither tuned again, under another schedule, with weight decay, with clipping."""
    lines = []
    for name in VARIANTS:
        pairs = []
        for seed in (0, 1):
            found = [variant(results, arch, name, rule, seed) for rule in ("mup", "sp")]
            losses = [results.loss(point) for point in found if point is not None]
            if len(losses) < 2 or None in losses:
                return [f"{arch}: not run to the end."]
            pairs.append(losses)
        ours, theirs = (statistics.fmean(loss for loss in side if loss) for side in zip(*pairs, strict=True))
        lines.append(f"| {arch} | {name} | {ours:.4f} | {theirs:.4f} | {ours / theirs - 1:+.1%} |")
    return lines


# ---- time to the same loss -------------------------------------------------------------------------------------------


def same_loss_table(results: Results, arch: str) -> list[str]:
    """How many times the steps of muP, at the proxy's learning rate, SP takes to the same loss."""
    points = list(same_loss(results, arch))
    if any(not p.looks or p.key not in results.rows for p in points):
        return [f"{arch}: not run to the end.", ""]
    proxy, tuned = best_on_grid(results, arch, "mup", WIDTHS[0]), best_on_grid(results, arch, "sp", WIDTHS[-1])
    lines = [
        f"### {arch}, width {WIDTHS[-1]}: muP at the proxy's 2^{proxy}",
        "",
        "| SP with | its final loss, each seed (muP's) | SP's steps / muP's to the same loss, each seed |",
        "|---|---|---|",
    ]
    end = str(max(max(map(int, results.rows[p.key]["curve"]), default=0) for p in points))
    for name, rate in (("the proxy's LR", proxy), ("1e-4", None), (f"its own, 2^{tuned}", tuned)):
        losses, ratios = [], []
        for seed in FIRST_SEEDS:
            mine = next(p for p in points if p.rule == "mup" and p.seed == seed)
            others = [p for p in points if p.rule == "sp" and p.seed == seed]
            other = next(p for p in others if (p.log2_lr == rate if rate is not None else p.log2_lr < -13))
            ours, theirs = (results.rows[p.key]["curve"] for p in (mine, other))
            losses.append(f"{theirs[end]:.4f} ({ours[end]:.4f})" if end in theirs else f"diverged ({ours[end]:.4f})")
            ratios.append(speed(ours, theirs, end))
        shown = " ".join("never" if ratio == math.inf else f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {name} | {', '.join(losses)} | {shown} |")
    return [*lines, ""]


def speed(ours: dict[str, float], theirs: dict[str, float], end: str) -> float:
    """Their steps over ours to the same loss: their final one if we come to it, else ours; inf if they diverge."""
    if end not in theirs:
        return math.inf
    if ours[end] <= theirs[end]:
        return int(end) / _steps_to(ours, theirs[end])
    return _steps_to(theirs, ours[end]) / int(end)


def _steps_to(curve: dict[str, float], goal: float) -> float:
    """Where a curve of looks first passes `goal`, between looks by a straight line; inf if it never does."""
    before: tuple[int, float] | None = None
    for step, loss in sorted((int(s), x) for s, x in curve.items()):
        if loss <= goal:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = step, loss
    return math.inf


def main() -> None:
    results = Results(HERE / "results.jsonl")
    lines = ["# Results", "", "Written by `python examples/lr_transfer/analyse.py` from results.jsonl.", ""]
    lines += ["## Where the best learning rate lies", ""]
    for arch in ARCHS:
        lines += transfer_table(results, arch)
    transfer_figure(results, HERE / "transfer.png")
    lines += ["![validation loss against learning rate](transfer.png)", ""]
    lines += ["## Transferred muP against SP tuned at each width, decay to zero", ""]
    for arch in ARCHS:
        lines += against_table(results, arch)
    lines += [f"## The same at width {WIDTHS[2]}, two seeds, with what was not tuned", ""]
    lines += ["| model | with | muP, transferred | SP | difference |", "|---|---|---|---|---|"]
    tables = [variants_table(results, arch) for arch in ARCHS]
    lines += [row for table in tables if len(table) > 1 for row in table]
    lines += ["", *(f"* {table[0]}" for table in tables if len(table) == 1)]
    lines += ["", "## Time to the same loss", ""]
    for arch in ARCHS:
        lines += same_loss_table(results, arch)
    cost_s = sum(row["cpu_s"] for row in results.rows.values())
    lines += ["", f"{len(results.rows)} runs, {cost_s / 60:.0f} core-minutes.", ""]
    (HERE / "results.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
