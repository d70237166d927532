"""A start of a run: its data, where it goes on, its folder; then the steps (run.py)."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from mpdit.config import Config
from mpdit.data import text
from mpdit.data.plan import Plan
from mpdit.data.shards import Shards
from mpdit.errors import InputError
from mpdit.parallel import groups
from mpdit.train import checkpoint, session
from mpdit.train.checkpoint import Position
from mpdit.train.guards import Judge
from mpdit.train.recorder import Recorder, only_writer
from mpdit.train.run import Run
from mpdit.train.signals import Signals
from mpdit.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sets:
    """The data of a run, opened and checked."""

    train: Shards
    val: Shards
    tokenizer: text.Tokenizer
    plan: Plan

    @classmethod
    def open(cls, config: Config) -> "Sets":
        train, val = Shards.open(config.data.path, "train"), Shards.open(config.data.path, "val")
        plan = Plan(
            samples=len(train),
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            fingerprint=train.fingerprint,
        )
        return cls(train=train, val=val, tokenizer=text.of_data_set(config.data.text, train), plan=plan)


def find_start(config: Config, sets: Sets, warn: Any) -> tuple[Path | None, Position]:
    """(checkpoint, position) to go on from; (None, step 0) for a new run. Raises InputError as :func:`same_run`."""
    path = checkpoint.newest(Path(config.run.dir), warn)
    if path is None:
        return None, Position(step=0, plan_hash=sets.plan.hash, tokenizer_sha256=sets.tokenizer.sha256)
    return path, same_run(path, config, sets)


def same_run(path: Path, config: Config, sets: Sets) -> Position:
    """Where a verified checkpoint stands. Raises InputError if it is of another model or data than the config's."""
    at = checkpoint.position(path, config)
    checkpoint.same_tokenizer(path, at, sets.tokenizer)
    if at.plan_hash != sets.plan.hash:
        raise InputError(
            f"{path}: was trained with other data, train.batch_size or train.seed than the config has; set them back, "
            "or give another run.dir."
        )
    return at


def train(config: Config, asked: Config | None = None) -> None:
    """Train to ``train.steps``, from the newest checkpoint if the run folder has one. Collective; groups are up.

    `asked` is the config before preflight resolved it: its open values are written down as open, so that the run
    folder's config.yaml can be started in another layout. A run that has its steps is left as it is.

    Raises InputError for a run folder of another model or that another job writes, CheckFailed when the run diverges,
    signals.Stop when it was asked to stop, once it has saved.
    """
    sets = Sets.open(config)
    with contextlib.ExitStack() as held:
        groups.decided_by_rank_0(lambda: held.enter_context(only_writer(Path(config.run.dir))))
        _train(config, asked or config, sets)


def _train(config: Config, asked: Config, sets: Sets) -> None:
    path, at = groups.decided_by_rank_0(lambda: find_start(config, sets, _warn))
    if at.step >= config.train.steps:
        if groups.rank() == 0:
            _warn(f"{path}: the run has its {config.train.steps} steps; raise train.steps to go on.")
        return
    run = session.build(config)
    if path is not None:
        checkpoint.load(run, path, at.step, at.skipped)
    metrics = Path(config.run.dir) / "metrics.jsonl"
    judge = groups.decided_by_rank_0(lambda: Judge.after(config.guard, metrics, at.step))
    with Signals() as caught, Recorder(config, asked, sets.tokenizer, run.network.table, at.step) as recorder:
        if path is not None:
            recorder.report.say(f"going on from {path} at step {at.step}")
        if run.network.note:
            recorder.report.say(run.network.note)
        try:
            with Watchdog(config.guard, caught, at.step) as watch:
                this = Run(config, sets, run, recorder, judge=judge, skipped=at.skipped, caught=caught, watch=watch)
                this.from_step(at.step)
        except InputError as error:
            error.any_rank = True
            raise


def _warn(text: str) -> None:
    print(f"mpdit: {text}", flush=True)
