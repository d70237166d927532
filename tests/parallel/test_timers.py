"""The pipeline's idle share: of what Megatron's schedules say, and of a pipeline whose ranks must take turns."""

import time
from pathlib import Path

import pytest

import ranks
import tiny
from mpdit.config import Config
from mpdit.parallel.timers import Timers


def passes(timers: Timers, clock: list[float]) -> None:
    """As a schedule does it: 2 s forward and 3 s backward within 10 s, and a second of waiting that is no matter."""

    def spend(name: str, seconds: float) -> None:
        timers(name, log_level=2).start()
        clock[0] += seconds
        timers(name).stop()

    timers("forward-backward", log_level=1).start(barrier=False)
    spend("forward-compute", 2)
    spend("forward-recv", 1)
    spend("backward-compute", 3)
    clock[0] += 4
    timers("forward-backward").stop()


def test_idle_is_what_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, timers = [0.0], Timers()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert timers.idle() == 0
    passes(timers, clock)
    assert timers.idle() == pytest.approx(0.5)
    assert timers.idle() == 0, "each pass is counted once"
    passes(timers, clock)
    timers.clear()
    passes(timers, clock)
    assert timers.idle() == pytest.approx(0.5)


def idle_ranks(rank: int, world: int, config: Config) -> float:
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), Sets.open(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    timers = run.network.timers
    assert timers is not None
    run.forward_backward(feed.next())
    run.network.validate(batches.validation_batches(config, sets.val, sets.tokenizer))
    run.forward_backward(feed.next())
    idle = timers.idle()
    feed.close()
    groups.stop()
    return idle


@pytest.mark.dist
def test_ranks_that_take_turns_are_idle_half_of_the_time(tiny_set: Path) -> None:
    """With one micro-batch no two ranks of a pipeline compute at once: together they wait one pass in two."""
    first, second = ranks.run(2, idle_ranks, config=tiny.config(tiny_set, parallel={"pp": 2, "micro_batch": 8}))
    assert 0 < first < 1
    assert 0 < second < 1
    assert first + second >= 0.8  # less of what each does outside its passes


@pytest.mark.dist
def test_alone_nothing_is_timed(tiny_set: Path) -> None:
    def timers(rank: int, world: int, config: Config) -> bool:
        from mpdit.parallel import groups
        from mpdit.train import preflight, session

        config = preflight.check(config, world)
        groups.start(config.parallel, config.train.seed)
        found = session.build(config).network.timers
        groups.stop()
        return found is None

    assert ranks.run(1, timers, config=tiny.config(tiny_set)) == [True]
