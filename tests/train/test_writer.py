"""The process that writes checkpoints: it writes what it was given, and takes its time until somebody waits."""

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpdit.parallel.packed import Image
from mpdit.train import disk
from mpdit.train.writer import Writer

SIZES = (0, 1, 511, disk._PIECE - 1, disk._PIECE, 2 * disk._PIECE + 4099)
NEVER = 1e-9  # of a core: a millisecond's work is followed by a rest of ten days


@pytest.fixture
def image() -> Iterator[Image]:
    image = Image()
    for size in SIZES:
        image.add(f"file_{size}", content(size))
    yield image
    image.close()


@pytest.fixture
def writer(image: Image) -> Iterator[Writer]:
    writer = Writer(image.fd)
    yield writer
    writer.close()


def content(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


def answer_of(writer: Writer) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while (answer := writer.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return answer


def check(folder: Path, answer: dict[str, Any]) -> None:
    for size in SIZES:
        assert (folder / f"file_{size}").read_bytes() == content(size)
    sums = {f"file_{size}": hashlib.sha256(content(size)).hexdigest() for size in SIZES}
    assert {name: file["sha256"] for name, file in answer["result"].items()} == sums
    assert {name: file["bytes"] for name, file in answer["result"].items()} == {f"file_{size}": size for size in SIZES}


def submit(writer: Writer, image: Image, folder: Path, share: float) -> None:
    writer.submit("write", folder=str(folder), files=image.files, first=True, share=share)


def test_files_of_any_size(writer: Writer, image: Image, tmp_path: Path) -> None:
    """Whole blocks go past the page cache, the rest of a file through it."""
    submit(writer, image, tmp_path / "step_1", share=1.0)
    check(tmp_path / "step_1", answer_of(writer))


def test_it_rests_until_somebody_waits(writer: Writer, image: Image, tmp_path: Path) -> None:
    submit(writer, image, tmp_path / "step_1", share=NEVER)
    time.sleep(0.3)
    assert writer.poll() is None
    writer.hurry()
    check(tmp_path / "step_1", answer_of(writer))


def test_whoever_hurries_before_it_has_begun_is_heard(writer: Writer, image: Image, tmp_path: Path) -> None:
    for step in (1, 2):  # the second is submitted while the first rests, and both are hurried at once
        submit(writer, image, tmp_path / f"step_{step}", share=NEVER)
    writer.hurry()
    check(tmp_path / "step_2", answer_of(writer))
    submit(writer, image, tmp_path / "step_3", share=NEVER)
    time.sleep(0.3)
    assert writer.poll() is None, "what came after it rests again"


def test_closing_ends_a_rest(image: Image, tmp_path: Path) -> None:
    writer = Writer(image.fd)
    submit(writer, image, tmp_path / "step_1", share=NEVER)
    writer.close()
    for size in SIZES:
        assert (tmp_path / "step_1" / f"file_{size}").read_bytes() == content(size)


@pytest.mark.skipif(not disk._DIRECT, reason="this system has no O_DIRECT, and so no file system without it")
def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.open, []

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        handle = real(path, flags & ~disk._DIRECT, mode)
        if flags & disk._DIRECT:
            os.close(handle)
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return handle

    monkeypatch.setattr(os, "open", refusing)
    for size in SIZES:
        path = tmp_path / f"file_{size}"
        with memoryview(content(size)) as view:
            disk._file(path, view, lambda: None)
        assert path.read_bytes() == content(size)
        assert refused[-1] == path
