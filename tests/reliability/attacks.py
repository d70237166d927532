"""Kills a run again and again, at places and moments drawn from a seed, and lets it go on in another layout."""

import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import tiny
from mpdit.config import Config

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"micro_batch": 2}),
    (2, {"tp": 2, "sp": True}),
    (2, {"pp": 2, "micro_batch": 1}),
    (2, {"cp": 2}),
    (2, {"distributed_optimizer": True}),
    (2, {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "micro_batch": 2}),
    (4, {"tp": 2, "pp": 2}),
    (4, {"tp": 2, "sp": True, "distributed_optimizer": True}),
    (4, {"pp": 2, "vpp": 2, "micro_batch": 2}),
]


def _read(kill: Callable[[], None]) -> None:
    from mpdit.data.shards import Shards

    _before(Shards, "read", kill)


def _optimizer(kill: Callable[[], None]) -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(lambda *_: kill())


def _update(kill: Callable[[], None]) -> None:
    from mpdit.train.session import Session

    _before(Session, "update", kill)


def _pack(kill: Callable[[], None]) -> None:
    from mpdit.parallel import packed

    _before(packed, "pack", kill)


def _write(kill: Callable[[], None]) -> None:
    """Some milliseconds after a save has begun, while its files are written."""
    from mpdit.train.saver import Saver

    begin = Saver.begin

    def begins(self: Saver, *args: Any) -> None:
        begin(self, *args)
        threading.Timer(random.random() * 0.1, kill).start()

    Saver.begin = begins  # type: ignore[method-assign]


def _marker(kill: Callable[[], None]) -> None:
    """When all files are written and the marker is due."""
    from mpdit.train import checkpoints

    _before(checkpoints, "manifest", kill)


def _before(owner: Any, name: str, kill: Callable[[], None]) -> None:
    plain = getattr(owner, name)

    def trapped(*args: Any, **kwargs: Any) -> Any:
        kill()
        return plain(*args, **kwargs)

    setattr(owner, name, trapped)


# Where a rank kills itself: how to get there, and at most how many times it comes by in an attempt.
PLACES: dict[str, tuple[Callable[[Callable[[], None]], None], int]] = {
    "data": (_read, 60),
    "optimizer": (_optimizer, 9),
    "update": (_update, 9),
    "copy for a save": (_pack, 3),
    "files of a save": (_write, 3),
    "marker of a save": (_marker, 3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """`place` and `count`: a rank kills itself the n-th time that it comes there; "time": ranks are killed from outside
    `count` milliseconds after the attempt's first step. `ranks`: which; None: all."""

    place: str
    count: int
    ranks: tuple[int, ...] | None


def draw(rng: random.Random, world: int) -> Attack:
    place = rng.choice([*PLACES, "time", "time"])
    count = rng.randrange(1, 400) if place == "time" else rng.randrange(1, PLACES[place][1] + 1)
    one = (rng.randrange(world),)
    return Attack(place=place, count=count, ranks=one if rng.random() < 0.5 else None)


def attacked(rank: int, world: int, config: Config, attack: Attack) -> None:
    if attack.place != "time" and (attack.ranks is None or rank in attack.ranks):
        left = [attack.count]

        def kill() -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        PLACES[attack.place][0](kill)
    train(rank, world, config)


def train(rank: int, world: int, config: Config) -> None:
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_one(config: Config, world: int, attack: Attack, steps: int) -> str | None:
    """An attempt: where it was killed, or None. One that its attack does not meet is killed after `steps` steps."""
    folder = Path(config.run.dir)
    before = lines(folder)
    place = attack.place
    started = ranks.start(world, attacked, config=config, attack=attack)
    try:
        deadline = time.monotonic() + 240
        met = None
        while _alive(started):
            now = lines(folder)
            if met is None and now != before:
                met = time.monotonic()
            waited = met is not None and attack.place == "time" and time.monotonic() - met > attack.count / 1000
            if waited or (met is not None and abs(now - before) >= steps):
                place = "time"
                started.kill(attack.ranks)
                break
            assert time.monotonic() < deadline, f"no end under {attack}"
            time.sleep(0.002)
        try:
            started.results()
        except ranks.RankFailed as error:
            if not _only_killed(str(error)):
                raise
            return place
        return None
    finally:
        started.close()


def _alive(world: ranks.World) -> bool:
    """Whether all ranks run: a killed one is a zombie until it is waited for."""
    for pid in world.pids.values():
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            return False
    return True


def _only_killed(error: str) -> bool:
    """Whether every rank was killed or met the killed one's absence: anything else is a fault of the run."""
    known = ("ended without a word", "Connection closed", "Connection reset", "Broken pipe", "Read error", "peer")
    return all(any(word in part for word in known) for part in error.split("\nrank "))


def campaign(data: Path, folder: Path, /, *, kills: int, steps: int, seed: int, **sections: Any) -> dict[str, Any]:
    """Kill `kills` times, then let it end. Counts by place, and what metrics.jsonl holds in the end."""
    rng, counted, killed = random.Random(seed), dict[str, int](), 0
    while killed < kills:
        world, parallel = rng.choice(LAYOUTS)
        attack = draw(rng, world)
        settings = config(data, folder, parallel, steps, **sections)
        place = run_one(settings, world, attack, rng.randrange(2, 7))
        assert place is not None, f"the run ended after {killed} kills: it is too short"
        killed += 1
        name = f"{place}, {'all' if attack.ranks is None or world == 1 else 'one'}"
        counted[name] = counted.get(name, 0) + 1
    world, parallel = rng.choice(LAYOUTS)
    ranks.run(world, train, timeout_s=600, config=config(data, folder, parallel, steps, **sections))
    return {"kills": counted, "rows": metrics(folder)}


def config(data: Path, folder: Path, parallel: dict[str, Any], steps: int, /, **sections: Any) -> Config:
    train_section = {"steps": steps, "save_every": 3, "keep_last": 2, **sections.pop("train", {})}
    tiny_config = tiny.config(data, parallel=parallel, train=train_section, **sections)
    return tiny.with_run_dir(tiny_config, folder)
