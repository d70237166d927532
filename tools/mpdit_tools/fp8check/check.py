"""The runs of a check: widths x seeds x precisions, checked before the first starts, and what was seen in each."""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

from mpdit.config import Config, Parallel
from mpdit.errors import InputError
from mpdit.parallel import fp8_statistics, groups
from mpdit.parallel.fp8_statistics import Key, Tally
from mpdit.train import preflight, session
from mpdit_tools.coordcheck import measure
from mpdit_tools.coordcheck.batch import fixed_batch
from mpdit_tools.fp8check.arguments import Arguments

BASELINE, EXACT = "bf16", "fp32"

Progress = Callable[[int, int, str, float], None]  # runs done, runs, the next one, seconds left


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """`arithmetic`: a recipe of FP8, or BASELINE, or EXACT."""

    width: int
    seed: int
    arithmetic: str
    config: Config


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a run showed: a loss a step, and each tensor's numbers, summed over the looks."""

    run: Run
    losses: list[float]
    tallies: dict[Key, Tally]


def plan(arguments: Arguments, config: Config) -> list[Run]:
    """All runs, the narrowest first. Raises InputError for counts that make no sense, and a width that does not fit."""
    widths = arguments.widths or tuple(config.mup.base_width * k for k in (1, 2, 4))
    for name, least in (("steps", 4), ("seeds", 1), ("looks", 1), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)} should be at least {least}.")
    if not arguments.recipes:
        raise InputError("--recipes: give at least one.")
    runs = []
    for width in sorted(set(widths)):
        for seed in range(arguments.seeds):
            for arithmetic in (BASELINE, EXACT, *dict.fromkeys(arguments.recipes)):
                try:
                    small = preflight.without_data(_at(arguments, config, width, seed, arithmetic), 1)
                except InputError as error:
                    raise InputError(f"--widths: {width} does not fit: {error}") from error
                runs.append(Run(width=width, seed=seed, arithmetic=arithmetic, config=small))
    return runs


def _at(arguments: Arguments, config: Config, width: int, seed: int, arithmetic: str) -> Config:
    """`config` at a width in one process, its learning rate constant after its warm-up or a quarter of the run."""
    small = measure.at(
        config,
        width=width,
        depth=config.model.depth,
        seed=seed,
        lr=config.optim.lr,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
    )
    parallel: dict[str, Any] = {"precision": arithmetic}
    if arithmetic not in (BASELINE, EXACT):
        blocks = config.parallel.fp8_bf16_blocks
        parallel = {"precision": "fp8_emulated", "fp8_recipe": arithmetic, "fp8_bf16_blocks": blocks}
    warmup = min(config.optim.warmup_steps, arguments.steps // 4)
    return dataclasses.replace(
        small,
        optim=dataclasses.replace(config.optim, schedule="constant", warmup_steps=warmup),
        parallel=Parallel(**parallel),
        train=dataclasses.replace(small.train, posthoc_ema=()),
    )


def run(arguments: Arguments, runs: list[Run], progress: Progress) -> Iterator[Seen]:
    """Each run in turn; groups of one process are started."""
    groups.start(Parallel(), 0)
    began, work, whole = time.monotonic(), 0.0, sum(map(_work, runs))
    for number, one in enumerate(runs):
        left_s = (time.monotonic() - began) * (whole / work - 1) if work else 0.0
        progress(number, len(runs), f"width {one.width}, seed {one.seed}, {one.arithmetic}", left_s)
        yield _train(arguments, one)
        work += _work(one)
        gc.collect()  # a session is a ring of hooks: the next one would find no memory
    progress(len(runs), len(runs), "done", 0.0)


def _work(run: Run) -> float:
    """Roughly, in any unit: what goes with the weights, what each operator costs at least, and the casts."""
    return (run.width**2 + 1000**2) * (1.0 if run.arithmetic in (BASELINE, EXACT) else 2.0)


def _train(arguments: Arguments, run: Run) -> Seen:
    built, steps = session.build(run.config), arguments.steps
    looks = {steps - 1 - steps // 2 * i // arguments.looks for i in range(arguments.looks)}
    losses, tallies = [], dict[Key, Tally]()
    for step in range(steps):
        micro_batches = fixed_batch(run.config, from_data=arguments.data, step=step)
        look = step in looks and run.arithmetic not in (BASELINE, EXACT)
        counted = fp8_statistics.counted(built.network.chunks) if look else contextlib.nullcontext(dict[Key, Tally]())
        with counted as found:
            losses.append(built.forward_backward(micro_batches))
        built.update()
        for key, tally in found.items():
            tallies[key] = tallies.get(key, Tally()) + tally
    return Seen(run=run, losses=losses, tallies=tallies)
