"""A rank that is stopped, stuck or dead ends the others within the timeout, by name."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ranks
import tiny
from mpdit.config import Config
from mpdit.train.watchdog import Beat, blamed

TIMEOUT_S = 6.0
STUCK_AT = 2


def beat(rank: int, step: int, phase: str, *stack: str, count: int = 5) -> Beat:
    return Beat(rank=rank, host="n1", pid=7, count=count, step=step, phase=phase, stack=stack)


def test_who_is_to_blame() -> None:
    late, early = beat(0, 7, "update"), beat(1, 7, "forward and backward")
    waiting = beat(2, 7, "forward and backward", "/x/site-packages/torch/distributed/distributed_c10d.py:9 all_reduce")
    stuck = beat(3, 7, "forward and backward", "/x/mpdit/train/batches.py:9 noised_batch")
    assert blamed([late, beat(1, 8, "data")]) == [late]
    assert blamed([late, early]) == [early]
    assert blamed([late, waiting, stuck]) == [stuck]
    assert blamed([waiting]) == [waiting]  # a collective that all wait in
    dead = beat(4, 9, "data", count=-1)
    assert blamed([waiting, stuck, dead]) == [dead]
    assert str(dead) == "rank 4 (host n1, pid 7) gives no sign of life, last at step 9, data"
    assert str(stuck).endswith("is at step 7, forward and backward (/x/mpdit/train/batches.py:9 noised_batch)")
    assert "(torch/distributed/distributed_c10d.py:9 all_reduce)" in str(waiting)


def train(rank: int, world: int, config: Config, folder: Path) -> Any:
    """A run of which rank 1 does not get beyond the data of a step: it hangs."""
    from mpdit import cli
    from mpdit.config import dump
    from mpdit.train import batches

    os.dup2(os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w")
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error.{rank}")
    plain, calls = batches.TrainFeed.next, iter(range(100))

    def next(feed: batches.TrainFeed) -> Any:
        if rank == 1 and __builtins__["next"](calls) == STUCK_AT:
            (folder / "there").touch()
            wait_for_ever()
        return plain(feed)

    batches.TrainFeed.next = next  # type: ignore[method-assign]
    path = folder / f"{rank}.yaml"
    path.write_text(dump(config))
    return cli.main(["train", str(path)])


def wait_for_ever() -> None:
    threading.Event().wait(600)


def codes(world: ranks.World, wanted: tuple[int, ...], seconds: float) -> dict[int, int]:
    """Exit codes of the ranks `wanted`, which end within `seconds`."""
    found: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(wanted):
        assert time.monotonic() < deadline, found
        for rank in set(wanted) - found.keys():
            pid, status = os.waitpid(world.pids[rank], os.WNOHANG)
            if pid:
                found[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    "how", ["stuck", "dead", "stopped", pytest.param("the first is stopped", marks=pytest.mark.slow)]
)
def test_the_others_end_and_name_it(how: str, tiny_set: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"train": {"steps": 1000}, "guard": {"hang_timeout_s": TIMEOUT_S}}
    config = tiny.with_run_dir(tiny.config(tiny_set, **sections), tmp_path / "run")
    world = ranks.start(2, train, config=config, folder=tmp_path)
    victim, others = (0, (1,)) if how.startswith("the first") else (1, (0, 1) if how == "stuck" else (0,))
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "there").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if how != "stuck":
            os.kill(world.pids[victim], signal.SIGKILL if how == "dead" else signal.SIGSTOP)
        # A margin for a busy machine; a dead peer is known at once.
        assert codes(world, others, 4 * TIMEOUT_S) == dict.fromkeys(others, 1)
    finally:
        world.close()
    for rank in others:
        said = (tmp_path / f"stderr.{rank}").read_text()
        sentence = next(line for line in said.splitlines() if line.startswith("mpdit: "))
        assert f"rank {victim} (host {os.uname().nodename}, pid {world.pids[victim]})" in sentence
        assert f"rank {1 - victim} (host" not in sentence
        if how == "stuck":
            assert f"is at step {STUCK_AT}, data" in sentence
            assert "test_watchdog.py" in sentence
            assert "wait_for_ever" in sentence
        else:
            assert "gives no sign of life, last at step" in sentence
        if how != "dead":
            assert sentence.startswith("mpdit: no progress for ")
            assert "Thread 0x" in said  # all of its own stacks
            assert sentence.removeprefix("mpdit: ") in (tmp_path / f"error.{rank}").read_text()
        else:
            assert "Traceback" in (tmp_path / f"error.{rank}").read_text()


@pytest.mark.dist
@pytest.mark.slow
def test_torchrun_goes_on_by_itself_after_a_rank_was_stopped(tiny_set: Path, tmp_path: Path) -> None:
    from mpdit.config import dump

    sections: dict[str, Any] = {
        "train": {"steps": 600, "save_every": 20, "val_images": 1},
        "guard": {"hang_timeout_s": 2 * TIMEOUT_S},
    }
    config = tiny.with_run_dir(tiny.config(tiny_set, **sections), tmp_path / "run")
    (tmp_path / "config.yaml").write_text(dump(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    log = tmp_path / "log"
    with log.open("w") as out:
        job = subprocess.Popen(
            [*torchrun, "-m", "mpdit", "train", str(tmp_path / "config.yaml")],
            env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # as launch.sh does
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "checkpoints" / "step_20").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pids = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        os.kill(pids[1], signal.SIGSTOP)
        assert job.wait(400) == 0, log.read_text()
    finally:
        job.terminate()
        job.wait()
    said = log.read_text()
    assert f"pid {pids[1]}) gives no sign of life" in said
    assert "going on from" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 600
