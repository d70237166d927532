"""A skipped step leaves nothing in what delayed scaling remembers: the run goes on as if it had not been tried."""

import math
from pathlib import Path
from typing import Any

import poison
import pytest
import torch
from torch import Tensor

import ranks
import tiny
from mpdit.config import Config

DELAYED = {"precision": "fp8_emulated", "fp8_recipe": "delayed", "micro_batch": 2}
BAD, STEPS = 1, 4
LAYOUTS = {
    "one rank, recompute": (1, {"recompute": "full"}),
    "PP2 of two chunks": (2, {"pp": 2, "vpp": 2}),
}


def remembered(run: Any) -> dict[str, Tensor]:
    from mpdit.parallel import fp8

    return {
        f"{kind}.{name}": value.clone()
        for name, kinds in fp8.state(run.network.chunks).items()
        for kind, value in kinds.items()
    }


def stepped(
    rank: int, world: int, config: Config, factors: dict[tuple[int, int], float], attempt: bool
) -> dict[str, Any]:
    """Losses of the good steps, and what was remembered around the bad one, which is tried, or left out at once."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    poison.poison(factors)
    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    sets, run = Sets.open(config), session.build(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    found: dict[str, Any] = {"losses": []}
    for step in range(STEPS):
        micro_batches = feed.next()
        if step != BAD:
            found["losses"].append(run.forward_backward(micro_batches))
            run.update()
            continue
        found["before"] = remembered(run)
        if not attempt:
            run.scheduler.step(1)
            continue
        found["bad"] = run.forward_backward(micro_batches)
        found["tried"] = remembered(run)
        run.skip()
        found["after"] = remembered(run)
    feed.close()
    groups.stop()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("factor", [math.nan, 1e5], ids=["nan", "spike"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_is_not_remembered(layout: str, factor: float, tiny_set: Path) -> None:
    world, parallel = LAYOUTS[layout]
    config = tiny.config(tiny_set, parallel={**DELAYED, **parallel})
    batch = poison.plan_of(config).batch(BAD)
    factors = {(int(batch.sample_ids[-1]), int(batch.visits[-1])): factor}
    tried, left_out = (ranks.run(world, stepped, config=config, factors=factors, attempt=a) for a in (True, False))
    for mine, wanted in zip(tried, left_out, strict=True):
        assert not mine["bad"] < 1e5, "the step is not bad enough to be skipped"
        assert mine["before"]
        for key, value in mine["before"].items():
            # A scale that would not be finite stays as it is, but its history has moved.
            assert key.startswith("fp8_scale") or not torch.equal(mine["tried"][key], value)
        assert all(torch.equal(mine["after"][key], value) for key, value in mine["before"].items())
        assert mine["losses"] == wanted["losses"]
