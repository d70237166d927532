"""Training with samples whose answer really is wrong: what a damaged latent or teacher feature does to a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mpdit.config import Config
from mpdit.data.mixture import Mixture
from mpdit.data.plan import Plan


def plan_of(config: Config) -> Plan:
    return Mixture.open(config.data, "train").plan(config)


def poison(factors: Mapping[tuple[int, int], float]) -> None:
    """In this process, the target of (sample id, visit) is multiplied; by nan, for one."""
    from mpdit.train import batches

    plain = batches.noised_batch

    def noised_batch(config: Config, images: Any, text: Any, ids: np.ndarray, visits: np.ndarray, *more: Any) -> Any:
        batch = plain(config, images, text, ids, visits, *more)
        pairs = zip(ids.tolist(), visits.tolist(), strict=True)
        factor_B = torch.tensor([factors.get(pair, 1.0) for pair in pairs])[:, None]
        assert batch.target_SBP is not None
        return dataclasses.replace(batch, target_SBP={k: v * factor_B for k, v in batch.target_SBP.items()})

    batches.noised_batch = noised_batch


def train(rank: int, world: int, config: Config, factors: Mapping[tuple[int, int], float]) -> None:
    """A run with such samples, for ranks.run."""
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    poison(factors)
    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()


def command(rank: int, world: int, words: list[str], factors: Mapping[tuple[int, int], float]) -> Any:
    """An mpdit command with such samples, for ranks.run."""
    import commands

    poison(factors)
    return commands.commands(rank, world, [words])[0]
