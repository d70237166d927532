"""Law 5 under attack: a run that is SIGKILLed at random moments, in a random layout each time, is the unbroken run."""

from pathlib import Path

import pytest

import ranks
import tiny
from reliability import attacks

BOUND = 1e-5


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kills", "steps"),
    [pytest.param(5, 60, id="5 kills"), pytest.param(100, 600, id="100 kills", marks=pytest.mark.slow)],
)
def test_a_run_killed_at_random_moments_is_the_unbroken_run(
    kills: int, steps: int, mixed_set: Path, tmp_path: Path
) -> None:
    """Pictures of three shapes, checkpoints written beside the training."""
    buckets = {"data": {"buckets": tiny.BUCKETS}}
    whole = attacks.config(mixed_set, tmp_path / "whole", {}, steps, **buckets)
    ranks.run(1, attacks.train, timeout_s=600, config=whole)
    wanted = attacks.metrics(tmp_path / "whole")
    found = attacks.campaign(mixed_set, tmp_path / "killed", kills=kills, steps=steps, seed=kills, **buckets)
    rows = found["rows"]
    assert [row["step"] for row in rows] == [*range(steps)]
    assert [row["samples"] for row in rows] == [row["samples"] for row in wanted], "a sample twice, or never"
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, wanted, strict=True))
    print(f"\n{sum(found['kills'].values())} kills: {found['kills']}; largest relative loss difference {worst:.1e}")
    assert worst <= BOUND
    assert rows[-1]["val_loss"] == pytest.approx(wanted[-1]["val_loss"], rel=BOUND)
