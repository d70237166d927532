"""A plan in pictures: memory by pipeline rank, and who works when."""

import dataclasses
from pathlib import Path

from mpdit.config import Config
from mpdit_tools.plan.estimate import Estimate
from mpdit_tools.plan.gpus import Machine
from mpdit_tools.plan.memory import Memory

_COLOURS = {
    "weights": "#3b5b92",
    "gradients": "#6f8fc4",
    "optimizer": "#a9bfe3",
    "ema": "#d3def1",
    "saved": "#d97706",
    "received": "#f0a94e",
    "working": "#f8d7a4",
    "averaging": "#9aa37a",
    "other": "#bdbdbd",
}


def memory(plan: Estimate, config: Config, machine: Machine, path: Path) -> None:
    """Stacked bars, a pipeline rank each, against what the GPU has. Averaging happens after the passes: not on top."""
    from matplotlib import pyplot

    names = [f.name for f in dataclasses.fields(Memory) if f.name != "averaging"]
    ranks = range(len(plan.memory))
    figure, axis = pyplot.subplots(figsize=(max(4.5, 1.6 + 0.7 * len(plan.memory)), 4.2))
    base = [0.0 for _ in ranks]
    for name in names:
        sizes = [getattr(plan.memory[rank], name) / 1e9 for rank in ranks]
        axis.bar([str(rank) for rank in ranks], sizes, bottom=base, color=_COLOURS[name], label=name, width=0.7)
        base = [low + size for low, size in zip(base, sizes, strict=True)]
    limit = machine.gpu.memory_bytes / 1e9
    if max(base) > limit / 2:
        axis.axhline(limit, color="#b91c1c", linewidth=1.2)
        axis.annotate(f"the GPU's {limit:.0f} GB", (0, limit), xytext=(2, 3), textcoords="offset points", fontsize=8)
    axis.set_xlabel("pipeline rank")
    axis.set_ylabel("GB a GPU")
    axis.set_title(f"{config.model.arch} {plan.parameters / 1e9:.3g} B on {plan.gpus} GPUs", fontsize=10)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


_MOST_NUMBERED = 16  # micro-batches, beyond which numbers would not be legible


def timeline(plan: Estimate, config: Config, path: Path) -> None:
    """The simulated schedule: forward passes blue, backward passes orange, later chunks darker; gaps are waiting."""
    from matplotlib import pyplot

    ranks = plan.timeline.ranks
    figure, axis = pyplot.subplots(figsize=(10, 1.1 + 0.42 * len(ranks)))
    blues, oranges = pyplot.get_cmap("Blues"), pyplot.get_cmap("Oranges")
    vpp = config.parallel.vpp
    for row, spans in enumerate(ranks):
        for span in spans:
            shade = 0.35 + 0.4 * (span.task.chunk // config.parallel.pp) / max(1, vpp - 1) if vpp > 1 else 0.45
            colour = (blues if span.task.kind == "forward" else oranges)(shade)
            width = span.end_s - span.begin_s
            axis.broken_barh(
                [(span.begin_s * 1e3, width * 1e3)],
                (row - 0.4, 0.8),
                facecolor=colour,
                edgecolor="white",
                linewidth=0.4,
            )
            if plan.micro_batches <= _MOST_NUMBERED:
                middle = (span.begin_s + width / 2) * 1e3
                axis.text(middle, row, str(span.task.micro_batch), ha="center", va="center", fontsize=6)
    axis.set_yticks(range(len(ranks)), [f"stage {rank}" for rank in range(len(ranks))], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("ms, estimated")
    axis.set_title(
        f"{plan.micro_batches} micro-batches: {plan.timeline.bubble:.1%} of the time is waiting", fontsize=10
    )
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
