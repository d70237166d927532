"""Real ranks for tests: torch, DALI and megatron-core are imported once, then every test forks its processes.

Importing costs seconds a process, a fork milliseconds. What makes a fork safe here: the parent only imports (one
thread, no process group, no kernels); ranks meet through a FileStore in a fresh folder; a rank leaves by os._exit; a
failing rank sends its traceback and the others are ended at once, with whatever processes they started.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

layouts_run: set[str] = set()  # ranks and Parallel of every run, for the session's closing line


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time; the message holds its traceback."""


def warm() -> None:
    """Import what ranks need; safe to call often."""
    torch.set_num_threads(1)
    import nvidia.dali  # noqa: F401

    from mpdit.parallel import accel

    accel.enter()


@dataclasses.dataclass
class World:
    """Running ranks, and the folder where they leave their results."""

    pids: dict[int, int]
    folder: Path
    timeout_s: float
    began: float = dataclasses.field(default_factory=time.monotonic)

    def kill(self, ranks: tuple[int, ...] | None = None) -> None:
        """SIGKILL to some ranks, or all, and to what they started."""
        for rank in self.pids if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pids[rank], signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        for pid in self.pids.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def results(self) -> list[Any]:
        """Wait for all ranks; what they returned, in rank order. Raises RankFailed."""
        left, bad = dict(self.pids), None
        while left and bad is None:
            for rank, pid in list(left.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del left[rank]
                    bad = rank if status else bad
            if left and time.monotonic() - self.began > self.timeout_s:
                raise RankFailed(f"ranks {sorted(left)} did not end within {self.timeout_s} s")
            time.sleep(0.005)
        values, errors = [], []
        for rank in self.pids:
            path = self.folder / f"{rank}.done"
            kind, value = pickle.loads(path.read_bytes()) if path.exists() else ("error", "ended without a word")
            values.append(value)
            errors += [f"rank {rank}: {value}"] if kind == "error" else []
        if bad is not None:
            echoes = ("Connection closed", "ended without a word", "Connection reset")
            errors.sort(key=lambda e: any(echo in e for echo in echoes))
            raise RankFailed("\n".join(errors) or f"rank {bad} failed")
        return values


def start(world: int, function: Callable[..., Any], timeout_s: float = 180, **arguments: Any) -> World:
    """`function(rank, world, **arguments)` in `world` forked processes that form a gloo world."""
    warm()
    if "config" in arguments:
        layouts_run.add(f"{world} {arguments['config'].parallel}")
    folder = Path(tempfile.mkdtemp(prefix="ranks_"))
    sys.stdout.flush(), sys.stderr.flush()
    pids = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            _end_with_parent()
            _rank(rank, world, folder, timeout_s, function, arguments)
        with contextlib.suppress(OSError):  # the child does it too: whoever comes first
            os.setpgid(pid, pid)
        pids[rank] = pid
    return World(pids=pids, folder=folder, timeout_s=timeout_s)


def run(world: int, function: Callable[..., Any], timeout_s: float = 180, **arguments: Any) -> list[Any]:
    """Start, wait, and return what each rank returned; the first traceback otherwise."""
    ranks = start(world, function, timeout_s, **arguments)
    try:
        return ranks.results()
    finally:
        ranks.close()


def _end_with_parent() -> None:
    """A killed pytest leaves no ranks behind, where the system can promise that (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _rank(rank: int, world: int, folder: Path, timeout_s: float, function: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    code = 1
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        outcome, code = ("value", function(rank, world, **arguments)), 0
    except BaseException:
        outcome = ("error", traceback.format_exc())
    partial = folder / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(folder / f"{rank}.done")
    if code == 0 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
