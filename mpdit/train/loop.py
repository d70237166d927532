"""A start of a run: its data, where it goes on, its folder; then the steps (run.py)."""

import contextlib
import types
from collections.abc import Mapping
from pathlib import Path

from mpdit.config import Config
from mpdit.data.buckets import Size
from mpdit.errors import InputError
from mpdit.parallel import groups
from mpdit.train import cached, checkpoint, session
from mpdit.train.guards import Judge
from mpdit.train.meters import Meter
from mpdit.train.recorder import Recorder, only_writer
from mpdit.train.run import Run
from mpdit.train.sets import Sets, find_start
from mpdit.train.signals import Signals
from mpdit.train.watchdog import Watchdog


def train(config: Config, asked: Config | None = None, flops: Mapping[Size, int] = types.MappingProxyType({})) -> None:
    """Train to ``train.steps``, from the newest checkpoint if the run folder has one. Collective; groups are up.

    `asked` is the config before preflight resolved it: its open values are written down as open, so that the run
    folder's config.yaml can be started in another layout. `flops`: an image's by its size, for the meters. A run that
    has its steps is left as it is.

    Raises InputError for a run folder of another model or that another job writes, CheckFailed when the run diverges,
    signals.Stop when it was asked to stop, once it has saved.
    """
    sets = Sets.open(config)
    with contextlib.ExitStack() as held:
        groups.decided_by_rank_0(lambda: held.enter_context(only_writer(Path(config.run.dir))))
        _train(config, asked or config, sets, flops)


def _train(config: Config, asked: Config, sets: Sets, flops: Mapping[Size, int]) -> None:
    path, at = find_start(config, sets, _warn)
    if at.step >= config.train.steps:
        if groups.rank() == 0:
            _warn(f"{path}: the run has its {config.train.steps} steps; raise train.steps to go on.")
        return
    run = session.build(config)
    if path is not None:
        checkpoint.load(run, path, at.step, at.skipped)
    metrics = Path(config.run.dir) / "metrics.jsonl"
    judge = groups.decided_by_rank_0(lambda: Judge.after(config.guard, metrics, at.step))
    with Signals() as caught, Recorder(config, asked, sets, run.network.table, at.step) as recorder:
        if path is not None:
            recorder.report.say(f"going on from {path} at step {at.step}")
            if note := checkpoint.note_on_scales(path, config):
                recorder.report.say(note)
        for note in filter(None, [run.network.note, *cached.notes(sets.autoencoder, sets.tokenizer)]):
            recorder.report.say(note)
        try:
            with Watchdog(config.guard, caught, at.step) as watch:
                Run(
                    config,
                    sets,
                    run,
                    recorder,
                    judge=judge,
                    skipped=at.skipped,
                    caught=caught,
                    watch=watch,
                    meter=Meter(config, run.network.timers, flops),
                ).from_step(at.step)
        except InputError as error:
            error.any_rank = True
            raise


def _warn(text: str) -> None:
    print(f"mpdit: {text}", flush=True)
