"""Small files that are there whole or not at all, whatever kills the process that writes them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write in, beside `path`; it becomes `path` when it is on disk, and is gone if writing fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # workers whose parent was killed may still write theirs
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def replace(path: Path, content: bytes | str) -> None:
    """`path` with this content, a text in UTF-8."""
    with replaced(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
