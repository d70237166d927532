"""SIGTERM and SIGUSR1: the ranks save together, lose no step, and leave with the code that a scheduler knows."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ranks
import tiny
from mpdit.config import Config


def wait(done: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def train(rank: int, world: int, config: Config, stuck_at: int = -1) -> int:
    """The exit code of a run whose rank 0 stands still in a step, if told to."""
    from mpdit import cli
    from mpdit.config import dump
    from mpdit.train import batches, signals

    signals._ECHO_S = 0.3
    plain = batches.TrainFeed.next

    def next(feed: batches.TrainFeed) -> Any:
        if rank == 0 and rows(Path(config.run.dir)) == stuck_at:
            Path(config.run.dir, "stuck").touch()
            time.sleep(600)
        return plain(feed)

    batches.TrainFeed.next = next  # type: ignore[method-assign]
    path = Path(config.run.dir).with_suffix(f".{rank}.yaml")
    path.write_text(dump(config))
    try:
        return cli.main(["train", str(path)])
    except SystemExit as stop:
        return int(stop.code or 0)


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGUSR1, 138), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_saves_on_all_and_costs_no_step(
    signum: int, code: int, tiny_set: Path, tmp_path: Path
) -> None:
    """The launcher passes it on to all, and a group gets it twice: one request."""
    sections: dict[str, Any] = {"train": {"steps": 10_000, "val_images": 1}, "optim": {"schedule": "constant"}}
    config = tiny.with_run_dir(tiny.config(tiny_set, parallel={"pp": 2}, **sections), tmp_path / "run")
    world = ranks.start(2, train, config=config)
    try:
        wait(lambda: rows(tmp_path / "run") >= 2)
        os.kill(world.pids[1], signum)
        os.kill(world.pids[1], signum)
        assert world.results() == [code, code]
    finally:
        world.close()
    done = rows(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{done}"]
    before = losses(tmp_path / "run")

    again = tiny.config(tiny_set, **{**sections, "train": {"steps": done + 2, "val_images": 1}})
    assert ranks.run(1, train, config=tiny.with_run_dir(again, tmp_path / "run")) == [0]
    assert losses(tmp_path / "run")[:done] == before
    assert len(losses(tmp_path / "run")) == done + 2


@pytest.mark.dist
def test_a_second_signal_leaves_at_once(tiny_set: Path, tmp_path: Path) -> None:
    """From a step that does not end, as a scheduler's or a person's patience does."""
    config = tiny.with_run_dir(tiny.config(tiny_set), tmp_path / "run")
    world = ranks.start(1, train, config=config, stuck_at=2)
    try:
        wait((tmp_path / "run" / "stuck").exists)
        os.kill(world.pids[0], signal.SIGTERM)
        time.sleep(0.6)
        assert os.waitpid(world.pids[0], os.WNOHANG) == (0, 0)
        os.kill(world.pids[0], signal.SIGTERM)
        status: list[int] = []

        def ended() -> bool:
            pid, said = os.waitpid(world.pids[0], os.WNOHANG)
            status.append(said)
            return pid != 0

        wait(ended, 20)
        assert os.waitstatus_to_exitcode(status[-1]) == 143
    finally:
        world.close()
    assert not (tmp_path / "run" / "checkpoints").exists()
