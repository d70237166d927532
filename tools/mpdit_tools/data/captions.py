"""Captions as users write them: text files and JSON lines, cleaned, or dropped with a reason."""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mpdit_tools.data.images import Unusable
from mpdit_tools.data.samples import Drop

LIST = "captions.jsonl"
CAPTION_BYTES = 65_536
LINE_BYTES = 2**20  # of a line of the list: JSON may spell every letter in six


def clean_caption(data: bytes) -> str:
    """One line of text: white space and control characters become single spaces, a byte-order mark goes.

    Raises Unusable when it is not UTF-8, empty, or longer than `CAPTION_BYTES`.
    """
    if len(data) > CAPTION_BYTES:
        raise Unusable("caption too long", f"{len(data)} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("caption not UTF-8", str(error)) from error
    printable = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    caption = " ".join(printable.split())
    if not caption:
        raise Unusable("empty caption")
    return caption


def is_outside(name: str) -> bool:
    """Whether a name in a list or an archive points out of its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or path.parts[:1] == () or ":" in path.parts[0]


def read_list(path: Path) -> Iterator[tuple[str, str] | Drop]:
    """(file, caption) for each line of ``captions.jsonl``, or what is wrong with the line."""
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            origin = f"{path.name}:{number}"
            try:
                yield _entry(line)
            except Unusable as error:
                yield Drop(origin=origin, reason=error.reason, detail=error.detail)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Its lines; of one that is too long as much as shows that it is."""
    while line := file.readline(LINE_BYTES + 1):
        yield line
        while len(line) > LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES + 1)


def _entry(line: bytes) -> tuple[str, str]:
    if len(line) > LINE_BYTES:
        raise Unusable("caption too long", f"more than {LINE_BYTES} bytes")
    try:
        entry: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unusable("caption not UTF-8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise Unusable(f"bad line in {LIST}", f"not JSON: {error}") from error
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file", "text")):
        raise Unusable(f"bad line in {LIST}", 'needs the keys "file" and "text", both strings')
    if is_outside(entry["file"]):
        raise Unusable("path outside the folder", ascii(entry["file"]))
    try:
        text = entry["text"].encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise Unusable("caption not UTF-8", str(error)) from error
    return entry["file"], clean_caption(text)
