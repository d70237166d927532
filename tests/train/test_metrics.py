"""metrics.jsonl is the truth: whole lines, each with the operating system at once, none lost to a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpdit.train import metrics as module
from mpdit.train.metrics import Metrics, read_metrics


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / (step + 1), "images_per_s": 8.5}


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_one_strict_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"nan": float("nan"), "inf": -float("inf"), "np": np.float32(0.5), "torch": torch.tensor(2), "s": "ö"}
    with Metrics(path) as metrics:
        metrics.log({"step": 0, **values, "list": [1.0, float("nan")]})
        with pytest.raises(ValueError, match="step"):
            metrics.log({"loss": 1.0})
    text = path.read_text()
    assert text.count("\n") == 1
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told == {"step": 0, "nan": None, "inf": None, "np": 0.5, "torch": 2, "s": "ö", "list": [1.0, None]}
    with pytest.raises(ValueError, match="closed"):
        metrics.log({"step": 1})


@pytest.mark.parametrize("torn", [b"", b'{"step": 10, "lo', b"\0\0\0\0\n\0\0", b'{"step": 10, "loss": 1.0}', b"5\n"])
def test_resumed_file_is_the_unbroken_runs(tmp_path: Path, torn: bytes) -> None:
    with Metrics(tmp_path / "unbroken.jsonl") as metrics:
        for step in range(20):
            metrics.log(row(step))
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        for step in range(10):
            metrics.log(row(step))
    with path.open("ab") as file:
        file.write(torn)
    assert steps(path)[:10] == list(range(10))
    said: list[str] = []
    with Metrics(path, 7, warn=said.append) as metrics:
        assert metrics.kept == 7
        assert metrics.removed == 3 + torn.count(b"\n") + (not torn.endswith(b"\n") and torn != b"")
        for step in range(7, 20):
            metrics.log(row(step))
    assert said == []
    assert path.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    with Metrics(path, 2) as metrics:
        metrics.log({"step": 2})
    assert steps(path) == [0, 1, 2]


def test_a_gap_before_the_start_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 4}\n')
    said: list[str] = []
    Metrics(path, 5, warn=said.append).close()
    assert said == [f"{path}: lacks 3 of the 5 steps before this start."]


def test_a_killed_process_has_every_line(tmp_path: Path) -> None:
    code = (
        "import os, sys; from mpdit.train.metrics import Metrics\n"
        "metrics = Metrics(sys.argv[1])\n"
        "for step in range(5): metrics.log({'step': step})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path / "m.jsonl") == list(range(5))


# ---- fsync -----------------------------------------------------------------------------------------------------------


class Fsync:
    """os.fsync, counted; it can be made to fail or to hang, as no disk here can."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: list[float] = []
        self.threads: set[int] = set()
        self.failing, self.open = False, threading.Event()
        self.open.set()
        real = os.fsync

        def fsync(file: int) -> None:
            self.at.append(time.monotonic())
            self.threads.add(threading.get_ident())
            assert self.open.wait(60)
            if self.failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(file)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(module, "_SYNC_EVERY_S", 0.1)

    def wait_for_another(self) -> None:
        before, end = len(self.at), time.monotonic() + 30
        while len(self.at) == before:
            assert time.monotonic() < end
            time.sleep(0.005)


def test_lines_get_to_the_disk_by_a_thread_that_leaves_it_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = Fsync(monkeypatch)
    with Metrics(tmp_path / "m.jsonl") as metrics:
        end, step = time.monotonic() + 0.5, 0
        while time.monotonic() < end:
            metrics.log(row(step := step + 1))
        fsync.wait_for_another()
        assert threading.get_ident() not in fsync.threads, "no step waits for a disk"
        assert all(later - sooner >= 0.1 for sooner, later in zip(fsync.at, fsync.at[1:], strict=False))
        count = len(fsync.at)
        metrics.log(row(step + 1))
        assert metrics.sync()
        assert len(fsync.at) > count
        assert not metrics._tail


def test_lines_that_a_failed_fsync_may_have_lost_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said, fsync = tmp_path / "m.jsonl", [], Fsync(monkeypatch)
    with Metrics(path, warn=said.append) as metrics:
        for step in range(3):
            metrics.log(row(step))
        assert metrics.sync()
        fsync.failing = True
        for step in range(3, 6):
            metrics.log(row(step))
        assert not metrics.sync()
        with path.open("r+b") as file:  # as a page cache does after it could not write
            file.truncate(path.stat().st_size - 5)
        for step in range(6, 9):
            metrics.log(row(step))
        fsync.failing = False
        assert metrics.sync()
        assert steps(path) == list(range(9))
        metrics.log(row(9))
    assert steps(path) == list(range(10))
    assert [line[: len(f"{path}") + 14] for line in said] == [f"{path}: can't be wri", f"{path} is written ag"]


def test_an_fsync_that_hangs_holds_nothing_up_and_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync = tmp_path / "m.jsonl", Fsync(monkeypatch)
    fsync.open.clear()
    metrics = Metrics(path, capacity=10_000)
    for step in range(2000):
        metrics.log(row(step))
    assert steps(path) == list(range(2000))
    assert metrics._bytes <= 10_000
    fsync.open.set()
    metrics.close()
    assert steps(path) == list(range(2000))


# ---- a full disk -----------------------------------------------------------------------------------------------------

# The limit on a file's size is a real write that fails, in the middle of a line; Python ignores its signal.
FULL = """
import os, resource, sys, time
from mpdit.train import metrics
metrics._SYNC_EVERY_S = 0.05
path, said = sys.argv[1], []
run = metrics.Metrics(path, warn=said.append, capacity=20_000)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
def room(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
def log(steps):
    for step in steps: run.log({"step": step, "loss": 0.5})
def whole():
    data = open(path, "rb").read()
    return data.endswith(b"\\n") and data.count(b"\\n")
"""


def in_full_disk(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FULL + code, str(tmp_path / "m.jsonl")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_full_disk_stops_nothing_and_when_there_is_room_nothing_is_missing(tmp_path: Path) -> None:
    code = """
log(range(10)); room(os.path.getsize(path) + 40); log(range(10, 60))
assert whole() == 11, whole()  # one line of some 27 bytes still fitted, half of the next is gone again
time.sleep(0.3); assert whole() == 11 and not run.sync()
assert len(said) == 1 and "can't be written (File too large)" in said[0], said
room(soft)
while len(said) < 2: time.sleep(0.01)
assert "is written again; the 49 lines" in said[1], said
assert whole() == 60
log(range(60, 70)); run.close(); assert len(said) == 2
"""
    done = in_full_disk(tmp_path, code)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(tmp_path / "m.jsonl") == list(range(70))


def test_a_process_killed_beside_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    code = "log(range(10)); room(os.path.getsize(path) + 40); log(range(10, 60)); os.kill(os.getpid(), 9)"
    assert in_full_disk(tmp_path, code).returncode == -signal.SIGKILL
    lines = (tmp_path / "m.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == list(range(11))
    assert all(line.endswith(b"\n") for line in lines)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("room(os.path.getsize(path)); log(range(5000))", "lines wait in memory for a disk that does not take them"),
        ("log(range(3)); room(os.path.getsize(path)); log(range(3, 9)); run.close()", "it lacks the 6 steps 3 to 8"),
        ("room(1)\nwith run: log([0])", "it lacks step 0"),
    ],
    ids=["memory is full", "closed", "left"],
)
def test_a_run_that_nobody_could_read_ends_with_an_error(tmp_path: Path, code: str, said: str) -> None:
    done = in_full_disk(tmp_path, code)
    assert done.returncode == 1
    assert f"CheckFailed: {tmp_path / 'm.jsonl'}: " in done.stderr
    assert said in done.stderr


def test_what_ended_the_run_is_told_before_the_full_disk(tmp_path: Path) -> None:
    done = in_full_disk(tmp_path, "room(1)\nwith run:\n    log([0])\n    raise KeyError('first')")
    assert done.stderr.strip().endswith("KeyError: 'first'")
    assert "CheckFailed" not in done.stderr
