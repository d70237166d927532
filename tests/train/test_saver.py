"""Saves beside the training: what is on the disk is the moment of `begin`, and trouble with storage on any rank stops
nothing, is said once and leaves the checkpoints of before."""

import contextlib
import io
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import commands
import ranks
import tiny
from mpdit.config import Config

TP2 = {"tp": 2, "distributed_optimizer": True}
SHORT: dict[str, Any] = {"optim": {"warmup_steps": 1}}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class Bench:
    """A session at step 0 and a saver, on a rank; what was said."""

    def __init__(self, config: Config, world: int, **settings: Any) -> None:
        from mpdit.parallel import groups
        from mpdit.train import preflight, saver, session

        self.config = preflight.check(config, world)
        groups.start(self.config.parallel, self.config.train.seed)
        self.said: list[str] = []
        self.run = session.build(self.config)
        self.folder = Path(config.run.dir)
        self.saver = saver.Saver(self.folder, self.said.append, **settings)

    def begin(self, step: int) -> None:
        from mpdit.train.checkpoint import Position

        self.saver.begin(self.run, self.config, Position(step=step, plan_hash="p", tokenizer_sha256="t"))

    def save(self, step: int) -> Any:
        self.begin(step)
        return self.saver.wait()

    def weights(self) -> dict[str, Any]:
        return {name: p.detach().clone() for name, p in self.run.ema.parameters.items()}

    def end(self) -> None:
        from mpdit.parallel import groups

        self.saver.close()
        groups.stop()


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- the moment of begin ---------------------------------------------------------------------------------------------


def frozen_writer(rank: int, world: int, config: Config) -> None:
    """Rank 0's writer is stopped, as by storage that hangs; the training goes on and changes everything."""
    from mpdit.train import checkpoint, checkpoints

    bench = Bench(config, world)
    assert bench.save(1).error is None  # the writer is there
    before, averages = bench.weights(), {name: value.clone() for name, value in bench.run.ema.values.items()}
    writer = bench.saver._writer
    assert writer is not None
    if rank == 0:
        os.kill(writer.pid, signal.SIGSTOP)
    bench.begin(2)
    for name, parameter in bench.run.ema.parameters.items():
        parameter.data.add_(1.0)
        bench.run.ema.values[name].add_(1.0)
    if rank != 0:
        until(lambda: bench.saver.done)
    for _ in range(5):
        assert bench.saver.poll() is None, "as long as one rank is not done, none is"
        assert bench.saver.busy
    assert bench.saver.done is (rank != 0)
    assert not (bench.folder / "checkpoints/step_2").exists()
    if rank == 0:
        os.kill(writer.pid, signal.SIGCONT)
    saved = bench.saver.wait()
    assert (saved.step, saved.error) == (2, None)
    assert saved.bytes == sum(p.stat().st_size for p in saved.path.iterdir() if p.name != checkpoints.MANIFEST)
    assert {"saved": 2}.items() <= bench.saver.news().items()
    assert bench.saver.news() == {}
    checkpoints.verify(saved.path)
    checkpoint.load(bench.run, saved.path, 2)
    for name, parameter in bench.run.ema.parameters.items():
        assert torch.equal(parameter, before[name]), name
        assert torch.equal(bench.run.ema.values[name], averages[name]), name
    bench.end()


@pytest.mark.dist
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (4, TP2)], ids=["alone", "TP2xDP2"])
def test_what_is_written_is_the_moment_of_begin(
    world: int, parallel: dict[str, Any], tiny_set: Path, tmp_path: Path
) -> None:
    ranks.run(world, frozen_writer, config=tiny.with_run_dir(tiny.config(tiny_set, parallel=parallel), tmp_path))
    assert names(tmp_path) == ["step_1", "step_2"]


# ---- trouble ---------------------------------------------------------------------------------------------------------


def troubled(rank: int, world: int, config: Config) -> list[str]:
    """One thing after another goes wrong, and each time the next save is fine."""
    from mpdit.parallel import groups

    bench = Bench(config, world)
    folder = bench.folder / "checkpoints"

    def writer() -> Any:
        assert bench.saver._writer
        return bench.saver._writer

    def fails(step: int, why: str) -> None:
        saved = bench.saver.wait()
        assert saved is not None
        assert why in (saved.error or ""), saved
        assert bench.saver.news()["save_failed"] == step
        assert bench.saver.failed is saved
        assert bench.save(step + 1).error is None, "tried again, it works"
        assert bench.saver.failed is None
        assert names(bench.folder) == [f"step_{step + 1}"], "nothing half written is left"
        groups.barrier()

    if rank == 0:  # the folder is gone, and its name taken
        folder.write_text("")
    groups.barrier()
    bench.begin(1)
    until(lambda: bench.saver.done)
    groups.barrier()
    if rank == 0:
        folder.unlink()
    groups.barrier()
    fails(1, "checkpoints")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):  # what Slurm sends to everyone
        os.kill(writer().pid, number)
    assert bench.save(3).error is None
    if rank == world - 1:  # the writer of one rank dies
        os.kill(writer().pid, signal.SIGKILL)
        until(lambda: writer().poll() is not None)
    bench.begin(4)
    fails(4, f"rank {world - 1}: the process that writes it has ended (exit code -9)")
    if rank == world - 1:  # storage that never answers
        os.kill(writer().pid, signal.SIGSTOP)
    bench.saver.patience_s = 2.0
    bench.begin(6)
    fails(6, f"rank {world - 1}: the storage took no byte for 2 s")
    bench.saver.close()
    create, lacking = os.memfd_create, OSError(24, "Too many open files")
    if rank == world - 1:  # while the state is made together, one has no memory to put it in
        os.memfd_create = lambda name: (_ for _ in ()).throw(lacking)
    bench.begin(8)
    os.memfd_create = create
    fails(8, f"rank {world - 1}: no memory for a copy of the state: Too many open files")
    bench.end()
    return bench.said


@pytest.mark.dist
def test_trouble_on_one_rank_gives_the_save_up_on_all_and_the_next_one_works(tiny_set: Path, tmp_path: Path) -> None:
    config = tiny.config(tiny_set, parallel={"distributed_optimizer": True}, train={"keep_last": 1})
    said = ranks.run(2, troubled, config=tiny.with_run_dir(config, tmp_path))
    assert said[1] == [], "the first rank speaks"
    assert len(said[0]) == 4
    assert said[0][0].startswith("checkpoint of step 1 could not be written (rank 0: ")
    assert said[0][0].endswith("there is no good one: all 1 steps are at risk.")
    assert said[0][1].endswith("the newest good one is step 3: 1 steps are at risk.")


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `folder`. Needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def train(rank: int, world: int, config: Config) -> str:
    """The rank's terminal."""
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loop.train(config)
    groups.stop()
    return out.getvalue()


def watched(rank: int, world: int, config: Config) -> tuple[str, list[tuple[int, bool]]]:
    """The terminal, and whenever the record was made durable: its last step, whether that step had its checkpoint."""
    from mpdit.train.metrics import Metrics

    plain, synced, folder = Metrics.sync, [], Path(config.run.dir)

    def sync(self: Metrics) -> None:
        plain(self)
        done = len(metrics(folder))
        synced.append((done, (folder / f"checkpoints/step_{done}").exists()))

    Metrics.sync = sync  # type: ignore[method-assign]
    return train(rank, world, config), synced


@pytest.mark.dist
def test_a_full_disk_stops_no_step_and_the_end_says_what_is_lost(tiny_set: Path, tmp_path: Path) -> None:
    """Room for one checkpoint and a half: the second can't be written until the first is gone, which it never is."""
    sections = {"train": {"steps": 8, "save_every": 3, "keep_last": 1}, **SHORT}
    config = tiny.with_run_dir(tiny.config(tiny_set, **sections), tmp_path)
    with small_disk(tmp_path / "checkpoints", 5_000_000):
        (code, out, error) = commands.run("train", write(tmp_path, config))
        assert code == 1, error
        assert "the checkpoint of the last step, 8, could not be written (rank 0: No space left on device" in error
        assert "the newest good one is step 3: 5 steps are lost" in error
        assert "checkpoint of step 6 could not be written (rank 0: No space left on device" in out
        assert "the newest good one is step 3: 3 steps are at risk" in out
        rows = metrics(tmp_path)
        assert [row["step"] for row in rows] == list(range(8)), "every step was taken"
        assert [row["saved"] for row in rows if "saved" in row] == [3]
        assert [row["save_failed"] for row in rows if "save_failed" in row] == [6]
        assert names(tmp_path) == ["step_3"]
        subprocess.run(["mount", "-o", "remount,size=20000000", str(tmp_path / "checkpoints")], check=True)
        ranks.run(2, train, config=config)
        assert names(tmp_path) == ["step_8"]


def write(folder: Path, config: Config) -> Path:
    from mpdit import config as configs

    path = folder / "asked.yaml"
    path.write_text(configs.dump(config))
    return path


@pytest.mark.dist
def test_the_next_save_waits_for_the_one_before(tiny_set: Path, tmp_path: Path) -> None:
    """With a save at every step none is left out, and each holds what its step left; the record of its steps is on the
    disk before it is."""
    settings: dict[str, Any] = {"train": {"steps": 4, "save_every": 1, "keep_last": 0}, **SHORT}
    out, synced = ranks.run(2, watched, config=tiny.with_run_dir(tiny.config(tiny_set, **settings), tmp_path))[0]
    assert synced[:4] == [(step, False) for step in (1, 2, 3, 4)]
    assert names(tmp_path) == ["step_1", "step_2", "step_3", "step_4"]
    assert "could not be written" not in out
    sync = {"train": {**settings["train"], "async_save": False}, **SHORT}
    other = tmp_path / "sync"
    ranks.run(2, train, config=tiny.with_run_dir(tiny.config(tiny_set, **sync), other))
    for step in (1, 4):
        files = [folder / f"checkpoints/step_{step}/__0_0.distcp" for folder in (tmp_path, other)]
        assert files[0].read_bytes() == files[1].read_bytes()


# ---- processes -------------------------------------------------------------------------------------------------------


def waits_for_ever(rank: int, world: int, config: Config) -> None:
    bench = Bench(config, world)
    assert bench.save(1).error is None
    assert bench.saver._writer
    os.kill(bench.saver._writer.pid, signal.SIGSTOP)  # storage that hangs: it will not see that its stdin ends
    bench.begin(2)
    (bench.folder / "writer").write_text(str(bench.saver._writer.pid))
    bench.saver.wait()


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's promise")
def test_a_killed_rank_leaves_no_writer(tiny_set: Path, tmp_path: Path) -> None:
    """One that goes on would write beside the rank's successor."""
    config = tiny.with_run_dir(tiny.config(tiny_set), tmp_path)
    world = ranks.start(1, waits_for_ever, config=config)
    try:
        until((tmp_path / "writer").exists)
        until(lambda: (tmp_path / "writer").read_text())
        writer = int((tmp_path / "writer").read_text())
        os.kill(world.pids[0], signal.SIGKILL)  # the rank alone, not its group

        def gone() -> bool:
            try:
                state = Path(f"/proc/{writer}/stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                return True
            return state == "Z"

        until(gone)
        # Left alone it would have gone on: the system continues what is stopped and has lost its rank.
        assert names(tmp_path) == ["step_1"]
    finally:
        world.close()


# ---- older formats ---------------------------------------------------------------------------------------------------


def write_format_2(rank: int, world: int, config: Config, to: Path) -> None:
    """Step 4's checkpoint of the run, as versions with format 2 wrote it: by megatron-core's own save."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from mpdit.parallel import groups, sharded
    from mpdit.train import checkpoint, checkpoints, preflight, session

    results: Any = queue.Queue()
    for name in ("_get_write_results_queue", "get_write_results_queue"):  # a server of its own, for no reason here
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, lambda *_: results)
    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run = session.build(config)
    path = Path(config.run.dir) / "checkpoints/step_4"
    checkpoint.load(run, path, 4)
    to.mkdir(parents=True)
    tensors = {key: sharded.tensor(key, value.clone(), p) for key, value, p in checkpoint.keyed(run)}
    dist_checkpointing.save(tensors, str(to))
    state = {key: value for key, value in checkpoints.state(path).items() if key not in ("written", "skipped")}
    (to / "state.json").write_text(json.dumps({**state, "format": "mpdit-checkpoint/2"}))
    manifest = {"format": "mpdit-checkpoint/2", "files": checkpoints.hashed(to)}
    (to / "manifest.json").write_text(json.dumps(manifest, indent=1))
    groups.stop()


@pytest.mark.dist
def test_a_checkpoint_of_format_2_goes_on(tiny_set: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"steps": 6, "save_every": 4}, **SHORT}
    config = tiny.with_run_dir(tiny.config(tiny_set, **settings), tmp_path / "run")
    ranks.run(1, train, config=config)
    old = tmp_path / "old"
    ranks.run(1, write_format_2, config=config, to=old / "checkpoints/step_4")
    shutil.copy(tmp_path / "run/metrics.jsonl", old)
    ranks.run(1, train, config=tiny.with_run_dir(config, old))
    assert [row["loss"] for row in metrics(old)] == [row["loss"] for row in metrics(tmp_path / "run")]
    assert metrics(old)[:4] == metrics(tmp_path / "run")[:4], "it went on, and did not start again"
