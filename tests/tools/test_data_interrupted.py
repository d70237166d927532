"""Builds that are stopped in the middle: killed, interrupted, out of room, or met by another build."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_sets import build, tree, write_folder
from PIL import Image


def slow_folder(folder: Path) -> Path:
    """Sixty captions of one picture that takes a good part of a second to decode."""
    folder.mkdir()
    image = Image.new("L", (6000, 6000))
    image.save(folder / "large.png", compress_level=1)
    image.resize((100, 100)).save(folder / "small.png")
    lines = [json.dumps({"file": "large.png", "text": f"large {number}"}) for number in range(60)]
    lines.insert(0, json.dumps({"file": "small.png", "text": "small"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def start_build(source: Path, out: Path, *, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "mpdit", "data", "build", "folder", source, "--out", out, "--size", "16"]
    command += ["--workers", workers]
    process = subprocess.Popen(
        [str(word) for word in command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: next(out.parent.glob(f"{out.name}.partial-*/spool.bin"), None))
    time.sleep(0.7)  # until the workers, when there are any, have something to do
    return process


def wait_for(found, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (value := found()) is not None:
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def group_members(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left-over processes in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_leaves_no_output_and_the_next_one_starts_clean(tmp_path, workers):
    out = tmp_path / "out"
    process = start_build(slow_folder(tmp_path / "slow"), out, workers=workers)
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: None if group_members(process.pid) else True, seconds=10)
    finally:
        for left in group_members(process.pid):
            os.kill(left, signal.SIGKILL)
        process.stderr.close()
    assert not out.exists()
    (stale,) = tmp_path.glob("out.partial-*")
    assert (stale / "spool.bin").is_file()
    source = write_folder(tmp_path / "mine", 6)
    assert build("folder", source, "--out", out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "slow"]
    assert build("folder", source, "--out", tmp_path / "clean") == 0
    assert tree(out) == tree(tmp_path / "clean")


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_nothing_behind(tmp_path, workers):
    out = tmp_path / "out"
    process = start_build(slow_folder(tmp_path / "slow"), out, workers=workers)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["slow"]


def test_two_builds_at_once_do_not_meet(tmp_path, capsys):
    out = tmp_path / "out"
    process = start_build(slow_folder(tmp_path / "slow"), out, workers=1)
    try:
        assert build("folder", write_folder(tmp_path / "mine", 6), "--out", out) == 2
        assert "another build" in capsys.readouterr().err
        assert list(tmp_path.glob("out.partial-*/spool.bin"))
    finally:
        process.kill()
        process.communicate()


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    source, out = write_folder(tmp_path / "mine", 40), tmp_path / "out"
    command = [sys.executable, "-m", "mpdit", "data", "build", "folder", source, "--out", out, "--size", "64"]
    command += ["--min-side", "1", "--workers", "1"]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 2
    assert "make room" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
