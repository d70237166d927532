"""Small files that are there whole or not at all."""

import os
from pathlib import Path

import pytest

from mpdit import files


def test_it_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for content in ("old", "new: é\n"):
        files.replace(path, content)
        assert path.read_bytes() == content.encode()
    with files.replaced(path) as file:
        file.write(b"newer")
        file.flush()
        assert path.read_bytes() == "new: é\n".encode()
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_was_there_stays_where_the_disk_does_not_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
