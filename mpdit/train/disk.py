"""The process that writes checkpoints, beside a rank that trains: ``python -m mpdit.train.disk FD PARENT``.

The rank has laid the files out in memory, file descriptor FD; jobs come as lines of JSON on stdin, answers go to
stdout. Nothing here can slow the step or hurt a later run: no lock is shared with the training, priority is the
lowest, it takes no more of a core than it is given until it is told to hurry, it dies with the rank (Linux; elsewhere
when stdin ends), and it writes only into the folder that a job names, whose name no other try has.

A process of its own and not a thread: on slow storage a thread would keep the rank from ending, and one of low priority
that holds the interpreter's lock would stop the training. Started and not forked: CUDA, NCCL and DALI do not survive a
fork. It imports no torch.
"""

import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import mmap
import os
import select
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpdit.train import checkpoints

_BLOCK = 8 * 2**20  # bytes between two signs of life
_PIECE = 2**20  # bytes between two rests: a millisecond or two, which a step does not notice
SMALL = 64 * 2**20  # bytes that are written in no time: no low priority, no rests
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
_PR_SET_PDEATHSIG = 1
# Slurm and terminals send these to every process of a job: what they mean is the rank's to decide.
_NOT_MINE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(fd: int, parent: int) -> None:
    for number in _NOT_MINE:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # gone before the promise was made
            return
    orders = _Orders(sys.stdin.fileno())
    jobs: dict[str, Callable[..., Any]] = {
        "write": functools.partial(_write, fd, orders),
        "complete": _complete,
        "discard": _discard,
    }
    while (job := orders.next()) is not None:
        number, do = job.pop("job"), job.pop("do")
        try:
            answer = {"result": jobs[do](**job)}
        except Exception as error:  # whatever it is, the rank has to hear of it
            answer = {"error": _reason(error)}
        _say({"job": number, **answer})


class _Orders:
    """What comes in on a pipe: jobs, and ``{"do": "hurry"}``, at which no job before it rests any more."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._text, self._ended = pipe, b"", False
        self._jobs: deque[dict[str, Any]] = deque()
        self._share, self._used_s = 1.0, 0.0

    def next(self) -> dict[str, Any] | None:
        """The next job, waited for; None when no more will come."""
        while not self._jobs and not self._ended:
            self._read()
        return self._jobs.popleft() if self._jobs else None

    def work_at(self, share: float) -> None:
        """Of a core, what the job that begins may take."""
        self._share, self._used_s = share, time.process_time()

    def rest(self) -> None:
        """Until the CPU time since the last rest is the job's share of the time since then, or somebody hurries."""
        used_s, self._used_s = time.process_time() - self._used_s, time.process_time()
        until = time.monotonic() + used_s * (1 / self._share - 1)
        while self._share < 1 and not self._ended and (left := until - time.monotonic()) > 0:
            if select.select([self._pipe], [], [], left)[0]:
                self._read()

    def _read(self) -> None:
        data = os.read(self._pipe, 2**16)
        self._ended = not data
        *lines, self._text = (self._text + data).split(b"\n")
        for job in map(json.loads, lines):
            if job["do"] == "hurry":
                self._share = 1.0
                for waiting in self._jobs:
                    waiting |= {"share": 1.0} if "share" in waiting else {}
            else:
                self._jobs.append(job)


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _write(
    fd: int, orders: _Orders, folder: str, files: dict[str, tuple[int, int]], first: bool, share: float
) -> dict[str, dict[str, Any]]:
    """Write name -> (first byte, bytes) of the image; name -> {"bytes", "sha256"}. `first`: of rank 0; `share`: of a
    core, that it may take."""
    path = Path(folder)
    orders.work_at(share)
    if sum(size for _, size in files.values()) > SMALL:
        os.nice(19)
    path.mkdir(parents=True, exist_ok=True)
    if first:
        for old in checkpoints.unfinished(path.parent.parent, path.parent.name):
            if old.name != path.name:
                shutil.rmtree(old, ignore_errors=True)
    if not files:
        return {}
    done: list[Path] = []
    try:
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as image, memoryview(image) as view:
            written = {}
            for name, (start, size) in files.items():
                done.append(path / name)
                with view[start : start + size] as content:
                    written[name] = {"bytes": size, "sha256": _file(done[-1], content, orders.rest)}
        return written
    except OSError:
        for file in done:  # room for whatever else the run has to write
            file.unlink(missing_ok=True)
        raise


def _file(path: Path, content: memoryview, rest: Callable[[], None]) -> str:
    """Write and fsync; the SHA-256 of what was to be written, so that a disk which changes it is found out."""
    sha256, handle, aligned = hashlib.sha256(), _open(path), mmap.mmap(-1, _PIECE)
    try:
        for start in range(0, len(content), _PIECE):
            with content[start : start + _PIECE] as piece:
                sha256.update(piece)
                aligned[: len(piece)] = piece
                _put(handle, memoryview(aligned)[: len(piece)])
            rest()
            if start % _BLOCK == 0:
                _say({})
        os.fsync(handle)
    finally:
        os.close(handle)
    return sha256.hexdigest()


def _open(path: Path) -> int:
    """For writes past the page cache, where the file system has them: they take a third of the CPU time, and what the
    training has read stays in memory."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL or not _DIRECT:
            raise
        path.unlink(missing_ok=True)  # Linux makes the file before it refuses
        return os.open(path, flags, 0o644)


def _put(handle: int, data: memoryview) -> None:
    while data:
        try:
            data = data[os.write(handle, data) :]
        except OSError as error:  # the end of a file is no whole number of blocks; from there on through the cache
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~_DIRECT)


def _complete(folder: str, final: str, manifest: str, step: int, keep_last: int, keep_every: int) -> list[str]:
    checkpoints.complete(Path(folder), Path(final), manifest)
    place = Path(final).parent
    return checkpoints.prune(place.parent, step, keep_last, keep_every, lambda: _say({}), place.name)


def _discard(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
