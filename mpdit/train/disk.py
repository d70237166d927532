"""The process that writes checkpoints, beside a rank that trains: ``python -m mpdit.train.disk FD PARENT``.

The rank has laid the files out in memory, file descriptor FD; jobs come as lines of JSON on stdin, answers go to
stdout. Nothing here can slow the step or hurt a later run: no lock is shared with the training, priority is the
lowest, it dies with the rank (Linux; elsewhere when stdin ends), and it writes only into the folder that a job names,
whose name no other try has.

A process of its own and not a thread: on slow storage a thread would keep the rank from ending, and one of low priority
that holds the interpreter's lock would stop the training. Started and not forked: CUDA, NCCL and DALI do not survive a
fork. It imports no torch.
"""

import ctypes
import hashlib
import json
import mmap
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpdit.train import checkpoints

_BLOCK = 8 * 2**20  # bytes between two signs of life
_SMALL = 64 * 2**20  # bytes that need no low priority
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
    jobs: dict[str, Callable[..., Any]] = {"write": _write, "complete": _complete, "discard": _discard}
    for line in sys.stdin:
        job = json.loads(line)
        number, do = job.pop("job"), job.pop("do")
        try:
            answer = {"result": jobs[do](**(job | ({"fd": fd} if do == "write" else {})))}
        except Exception as error:  # whatever it is, the rank has to hear of it
            answer = {"error": _reason(error)}
        _say({"job": number, **answer})


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _write(fd: int, folder: str, files: dict[str, tuple[int, int]], first: bool) -> dict[str, dict[str, Any]]:
    """Write name -> (first byte, bytes) of the image; name -> {"bytes", "sha256"}. `first`: of rank 0."""
    path = Path(folder)
    if sum(size for _, size in files.values()) > _SMALL:
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
                    written[name] = {"bytes": size, "sha256": _file(done[-1], content)}
        return written
    except OSError:
        for file in done:  # room for whatever else the run has to write
            file.unlink(missing_ok=True)
        raise


def _file(path: Path, content: memoryview) -> str:
    """Write and fsync; the SHA-256 of what was to be written, so that a disk which changes it is found out."""
    sha256 = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for start in range(0, len(content), _BLOCK):
            with content[start : start + _BLOCK] as block:
                sha256.update(block)
                done = 0
                while done < len(block):
                    with block[done:] as rest:
                        done += os.write(handle, rest)
            _say({})
        os.fsync(handle)
    finally:
        os.close(handle)
    return sha256.hexdigest()


def _complete(folder: str, final: str, manifest: str, step: int, keep_last: int, keep_every: int) -> list[str]:
    checkpoints.complete(Path(folder), Path(final), manifest)
    place = Path(final).parent
    return checkpoints.prune(place.parent, step, keep_last, keep_every, lambda: _say({}), place.name)


def _discard(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
