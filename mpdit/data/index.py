"""A shard's tar, its index and its table: that they belong together, and where in the tar each sample lies.

The index is the text of DALI's ``wds2idx`` v1.2: a line a sample, with name, offset and size of each member. The table
(``.npy``) has a row a sample: height and width of the image, CRC-32 of the image's bytes, CRC-32 of the caption's.
"""

import dataclasses
import hashlib
import io
import mmap
from pathlib import Path

import numpy as np

from mpdit.errors import InputError

IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
BLOCK = 512  # tar's block: a header, then the member's bytes, padded
LONGEST = 2**16  # pixels; no side of an image is longer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A tar, its index and its table, as the manifest has them."""

    tar: Path
    index: Path
    table: Path
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    table_sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file in a tar: `size` bytes at `offset`."""

    name: str
    offset: int
    size: int


def read(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Where the samples lie, int64 (samples, 4) image offset and size, caption offset and size; and the table.

    Raises InputError when a file is missing, is not the manifest's, or does not fit the others.
    """
    for path in (shard.tar, shard.index, shard.table):
        if not path.is_file():
            raise InputError(
                f"{path}: is in the manifest but not in the folder; copy it there or build the data set again."
            )
    if shard.samples < 1 or shard.bytes < BLOCK:
        raise InputError(
            f"{shard.tar}: has {shard.samples} samples and {shard.bytes} bytes, the manifest says, but should have "
            f"some; build the data set again."
        )
    if (found := shard.tar.stat().st_size) != shard.bytes:
        raise InputError(
            f"{shard.tar}: is {found} bytes long, but the manifest says {shard.bytes}: "
            f"it was cut short or replaced; copy it again or build the set anew."
        )
    return _spans(shard, _read_index(shard)), _read_table(shard)


def member_name(header: bytes) -> str:
    """The name in a member's tar header."""
    name = header[:100].rstrip(b"\0")
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].rstrip(b"\0") + b"/" + name
    return name.decode(errors="replace")


def _own(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(
            f"{path}: has another SHA-256 than the manifest's: it was changed or is another shard's; "
            f"copy it again or build the set anew."
        )
    return data


def _read_table(shard: Shard) -> np.ndarray:
    """int64 (samples, 4): height, width, CRC-32 of the image, CRC-32 of the caption."""
    data = _own(shard.table, shard.table_sha256)
    try:
        table = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy raises nearly anything on a damaged header
        raise InputError(f"{shard.table}: is not an array in NumPy's format; build the data set again.") from error
    if not isinstance(table, np.ndarray) or table.dtype != np.int64 or table.shape != (shard.samples, 4):
        found = f"{table.dtype} {table.shape}" if isinstance(table, np.ndarray) else "several arrays"
        raise InputError(
            f"{shard.table}: holds {found}, but should hold int64 {(shard.samples, 4)}; build the data set again."
        )
    sizes, sums = table[:, :2], table[:, 2:]
    if sizes.min() < 1 or sizes.max() > LONGEST or sums.min() < 0 or sums.max() >= 2**32:
        raise InputError(
            f"{shard.table}: has a height or width that is not from 1 to {LONGEST}, or a checksum that is not from 0 "
            f"to {2**32 - 1}; build the data set again."
        )
    return table


def _read_index(shard: Shard) -> list[dict[str, Member]]:
    """The members of each sample by extension. Raises InputError when the index is not the manifest's or not v1.2."""
    text = _own(shard.index, shard.index_sha256)
    try:
        head, *lines = text.decode().splitlines()
        version, count = head.split()
        rows = [line.split() for line in lines]
        samples = [
            {ext: Member(name=name, offset=int(offset), size=int(size)) for ext, offset, size, name in _fours(row)}
            for row in rows
        ]
        if version != "v1.2" or int(count) != len(samples) or sum(map(len, rows)) != 4 * sum(map(len, samples)):
            raise ValueError
    except ValueError as error:
        raise InputError(f"{shard.index}: is not an index in DALI's v1.2 format; build the data set again.") from error
    if len(samples) != shard.samples:
        raise InputError(
            f"{shard.index}: lists {len(samples)} samples, but the manifest says {shard.samples}; "
            f"build the data set again."
        )
    return samples


def _fours(row: list[str]) -> "zip[tuple[str, ...]]":
    if not row or len(row) % 4:
        raise ValueError
    return zip(*(row[i::4] for i in range(4)), strict=True)


def _spans(shard: Shard, samples: list[dict[str, Member]]) -> np.ndarray:
    """int64 (samples, 4): image offset and size, caption offset and size; every member's tar header is checked."""
    spans = np.empty((len(samples), 4), np.int64)
    with shard.tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        for row, members in enumerate(samples):
            images = [ext for ext in IMAGE_TYPES if ext in members]
            if len(images) != 1 or "txt" not in members:
                raise InputError(
                    f"{shard.index}: sample {row} has members {', '.join(members)}, but should have one image "
                    f"({', '.join(IMAGE_TYPES)}) and one txt; build the data set again."
                )
            key = members["txt"].name.removesuffix("txt")
            for ext, member in members.items():
                if member.name != key + ext or not _header_fits(tar, shard.bytes, member):
                    raise InputError(
                        f"{shard.index}: says that {member.name} is {member.size} bytes at {member.offset}, but in "
                        f"{shard.tar.name} it is not: the two don't belong together; build the data set again."
                    )
            image, text = members[images[0]], members["txt"]
            spans[row] = image.offset, image.size, text.offset, text.size
    return spans


def _header_fits(tar: mmap.mmap, length: int, member: Member) -> bool:
    start = member.offset - BLOCK
    if start < 0 or member.offset % BLOCK or member.size < 0 or member.offset + member.size > length:
        return False
    header = tar[start : member.offset]
    is_file = header[156:157] in (b"0", b"\0")
    return is_file and _octal(header[124:136]) == member.size and member_name(header) == member.name


def _octal(field: bytes) -> int:
    try:
        return int(field.rstrip(b"\0 "), 8)
    except ValueError:
        return -1
