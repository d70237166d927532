"""The data of a run, opened, and whether a checkpoint is of that run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Self

from mpdit.config import Config
from mpdit.data import text
from mpdit.data.latents import Autoencoder
from mpdit.data.mixture import Mixture
from mpdit.data.plan import Plan
from mpdit.errors import InputError
from mpdit.parallel import groups
from mpdit.train import cached, checkpoint
from mpdit.train.checkpoint import Position


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sets:
    """The data of a run, opened and checked."""

    train: Mixture
    val: Mixture
    tokenizer: text.Tokenizer
    plan: Plan
    autoencoder: Autoencoder | None  # None: pixels

    @classmethod
    def open(cls, config: Config) -> Self:
        train, val = Mixture.open(config.data, "train"), Mixture.open(config.data, "val")
        return cls(
            train=train,
            val=val,
            tokenizer=cached.tokenizer(config, train, val),
            plan=train.plan(config),
            autoencoder=cached.autoencoder(config, train),
        )

    def start(self) -> Position:
        """Of a new run."""
        return Position(step=0, plan_hash=self.plan.hash, tokenizer_sha256=self.tokenizer.sha256)


def find_start(config: Config, sets: Sets, warn: Callable[[str], None]) -> tuple[Path | None, Position]:
    """(checkpoint, position) to go on from; (None, step 0) for a new run; collective. Raises as :func:`same_run`."""
    path = checkpoint.newest(Path(config.run.dir), warn)
    if path is None:
        return None, sets.start()
    return path, groups.decided_by_rank_0(lambda: same_run(path, config, sets))


def same_run(path: Path, config: Config, sets: Sets) -> Position:
    """Where a verified checkpoint stands. Raises InputError if it is of another model or data than the config's."""
    at = checkpoint.position(path, config)
    checkpoint.same_tokenizer(path, at, sets.tokenizer)
    checkpoint.same_averages(path, config)
    if sets.autoencoder is not None:
        sets.autoencoder.same_as_in(Path(config.run.dir))
    if at.plan_hash != sets.plan.hash:
        raise InputError(
            f"{path}: was trained with other data, train.batch_size or train.seed than the config has; set them back, "
            "or give another run.dir."
        )
    return at
