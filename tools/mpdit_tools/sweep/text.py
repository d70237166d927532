"""REPORT.md of a sweep: what won, how sure that is, whether the space was wide enough, what each round decided."""

import math
import statistics
from collections.abc import Iterator

from mpdit_tools.sweep import space
from mpdit_tools.sweep.coordinate import Change, Round
from mpdit_tools.sweep.results import Setting
from mpdit_tools.sweep.space import Range, number
from mpdit_tools.sweep.spec import advice, fingerprint
from mpdit_tools.sweep.summary import Summary, full_runs, spread, table_settings

_WORST = 12  # failed trials listed
_SURE = 2 * math.sqrt(2)  # x the noise of one value: two standard errors of a difference


def markdown(summary: Summary, figures: list[str]) -> str:
    lines = [f"# Sweep {summary.name}", "", *_head(summary), ""]
    for part in (_best, _space, _noise, _cost, _rounds, _settings, _failures):
        lines += [*part(summary)]
    pictures = {"response.png": "Every trial", "coordinate.png": "Round by round", "progress.png": "Progress"}
    pictures["importance.png"] = "Importance"
    for name in figures:
        lines += [f"## {pictures[name]}", "", f"![{pictures[name].lower()}]({name})", ""]
    return "\n".join(lines)


def _head(summary: Summary) -> Iterator[str]:
    spec, model = summary.spec, summary.spec.proxy.model
    counts = ", ".join(f"{count} {state}" for state, count in summary.counts.items() if count)
    train = spec.proxy.train
    yield (
        f"{spec.mode} search for the smallest {spec.metric} of {model.arch}, width {model.width}, depth {model.depth}, "
        f"{train.steps} steps of {train.batch_size} images: {len(summary.over)} trials ({counts or 'none'}). "
        f"Fingerprint {fingerprint(spec)}."
    )
    for said in advice(spec):
        yield f"\n**Warning:** {said}"


def _best(summary: Summary) -> Iterator[str]:
    yield from ("## Best", "")
    found, spec = summary.best, summary.spec
    if found is None:
        yield from ("No setting has come to a value with each of its seeds.", "")
        return
    yield f"{spec.metric} **{value_of(found)}** with these values, in `best.yaml`:"
    yield from ("", "| key | searched | best | proxy had |", "|---|---|---|---|")
    for axis in spec.axes:
        had = number(space.of(spec.proxy, axis.key))
        yield f"| {axis.key} | {searched(axis)} | **{number(found.params[axis.key])}** | {had} |"
    yield ""


def title(summary: Summary) -> str:
    """Of the figures."""
    shown = ", ".join(f"{count} {state}" for state, count in summary.counts.items() if count)
    return f"{summary.name}: {len(summary.over)} trials ({shown})"


def value_of(setting: Setting) -> str:
    values = [record.value for record in map(setting.by_seed.get, setting.seeds) if record and record.value is not None]
    trials = ", ".join(str(setting.by_seed[seed].number) for seed in setting.seeds)
    over = (
        f" ± {spread(values):.4f} over {len(values)} seeds (trials {trials})"
        if len(values) > 1
        else f" (trial {trials})"
    )
    return f"{statistics.fmean(values):.4f}{over}"


def searched(axis: space.Axis) -> str:
    if isinstance(axis, Range):
        return f"{number(axis.low)} … {number(axis.high)}{', log' if axis.log else ''}"
    if isinstance(axis, space.Factors):
        return ", ".join(f"x {number(factor)}" for factor in axis.factors)
    return ", ".join(map(number, axis.values))


def _space(summary: Summary) -> Iterator[str]:
    if summary.best is None:
        return
    yield from ("## Was the space wide enough?", "")
    if not summary.narrow:
        yield "Yes: no best value lies at an end of its range."
    for key, remedy in summary.narrow.items():
        at = number(summary.best.params[key])
        yield f"* **{key}**: the best value, {at}, lies at an end; the optimum may lie beyond: {remedy}."
    yield ""


def _noise(summary: Summary) -> Iterator[str]:
    yield from ("## How far to trust it", "")
    found, metric = summary.noise, summary.spec.metric
    if found is None:
        yield (
            "Every setting ran with one seed, so it is not known what a seed does; add `confirm: {top: 3, seeds: "
            "[1, 2]}` to the spec and start the same command again."
        )
    else:
        of = f"{found.settings} of the best settings" if found.settings > 1 else "the best setting"
        yield f"A run's {metric} scatters by **{found.seed:.2%}** with the seed ({of}, several seeds each)."
        if found.paired is not None:
            yield (
                "A seed brings the same batches, noise and initial weights to every setting, and much of its luck: "
                "between two settings with the same seed a difference of less than "
                f"**{_SURE * found.paired:.2%}** may be chance."
            )
    shares = ", ".join(f"{key} {share:.0%}" for key, share in summary.importance.items())
    yield from ("", f"Importance for being among the best: {shares or 'not known: ' + summary.why}.")
    if shares and summary.spec.mode == "tpe":
        yield "TPE samples where it expects to win, which hides what it has settled; random search tells more here."
    yield ""


def _cost(summary: Summary) -> Iterator[str]:
    hours = sum(record.wall_s for record in summary.records) / 3600
    work = f" and {summary.flops:.3g} FLOPs" if summary.flops is not None else ""
    yield from ("## Cost", "")
    yield (
        f"{summary.images:,} images{work}, as much as {full_runs(summary):.1f} whole runs of the proxy; {hours:.2f} "
        "hours of trials."
    )
    yield ""


def _rounds(summary: Summary) -> Iterator[str]:
    if not summary.log:
        return
    yield from ("## What each round decided", "")
    for entry in summary.log:
        if not isinstance(entry, Round):
            losses = ", ".join(f"{number(value)}: {loss:.4f}" for value, loss in entry.losses.items())
            best = min(entry.losses, key=lambda value: entry.losses[value])
            yield f"* {entry.key} swept ({losses}): **{number(best)}**."
            continue
        kept = [f"{change_name(change)} ({change.gain:+.2%})" for change in entry.changes if change.kept]
        said = f"{', '.join(kept)} helped by more than the noise" if kept else "nothing helped by more than the noise"
        if entry.together:
            said += (
                f"; together {entry.together.gain:+.2%}, {'kept' if entry.together.kept else 'the best one alone kept'}"
            )
        yield f"* From {entry.loss:.4f}, {len(entry.changes)} changes alone: {said}; the noise is {entry.needed:.2%}."
    yield ""


def change_name(change: Change) -> str:
    return " and ".join(f"{key.rpartition('.')[2]} x {number(factor)}" for key, factor in change.what)


def _settings(summary: Summary) -> Iterator[str]:
    found, more = table_settings(summary)
    keys = [axis.key for axis in summary.spec.axes]
    last = [key.rpartition(".")[2] for key in keys]
    names = last if len({*last}) == len(last) else keys
    yield from ("## Best settings", "")
    yield f"| {summary.spec.metric} | seeds | {' | '.join(names)} |"
    yield f"|---|---|{'---|' * len(keys)}"
    for setting in found:
        values = " | ".join(number(setting.params[key]) for key in keys)
        yield f"| {value_of(setting)} | {', '.join(map(str, setting.seeds))} | {values} |"
    if more:
        yield from ("", f"And {more} more in trials.jsonl.")
    yield ""


def _failures(summary: Summary) -> Iterator[str]:
    failed = [record for record in summary.over if record.state == "failed"]
    if not failed:
        return
    yield from ("## Failed", "")
    for record in failed[:_WORST]:
        yield f"* trial {record.number}: {record.error}"
    if len(failed) > _WORST:
        yield f"* and {len(failed) - _WORST} more in trials.jsonl"
    yield ""
