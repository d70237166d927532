"""Webdataset shards that come out the same, byte for byte, whenever the samples do, with index and table beside each.

A shard is an uncompressed USTAR archive whose members are ``KEY.png``, ``KEY.txt`` and ``KEY.json``, in that order. The
index is the text format of DALI's ``wds2idx`` (v1.2): a line a sample, with the offset of each member's data. The table
is what ``mpdit.data.index`` reads: height, width, CRC-32 of the picture's bytes and of the caption's.
"""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from mpdit.data.shards import FORMAT

INDEX_VERSION = "v1.2"  # of nvidia.dali's wds2idx
RECORD = tarfile.RECORDSIZE  # archives are padded to this many bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A finished shard, as the manifest lists it."""

    tar: str
    index: str
    table: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    table_sha256: str


class _Tar:
    """One open archive; hashes what it writes, remembers where each member's data begins."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.lines = path, 0, list[str]()
        self.table = list[tuple[int, int, int, int]]()
        self._digest = hashlib.sha256()
        self._file: IO[bytes] = path.open("wb")

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.offset += len(data)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        entries = []
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # owner, group and mtime are 0 by default
            info.size = len(data)
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            entries.append(f"{extension} {self.offset} {info.size} {info.name}")
            self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        self.lines.append(" ".join(entries))

    def finish(self) -> Shard:
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.offset + end) % RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index, table = self.path.with_suffix(".idx"), self.path.with_suffix(".npy")
        text = "\n".join([f"{INDEX_VERSION} {len(self.lines)}", *self.lines, ""]).encode()
        write_durably(index, text)
        rows = io.BytesIO()
        np.save(rows, np.array(self.table, "<i8"))
        write_durably(table, rows.getvalue())
        return Shard(
            tar=self.path.name,
            index=index.name,
            table=table.name,
            samples=len(self.lines),
            bytes=self.offset,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(text).hexdigest(),
            table_sha256=hashlib.sha256(rows.getvalue()).hexdigest(),
        )

    def abandon(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes one split's samples as ``SPLIT-00000.tar``, ``SPLIT-00001.tar``, … A context manager.

    ``per_shard`` is the number of samples in every shard but the last. ``shards`` is complete once the context is left.
    """

    def __init__(self, folder: Path, split: str, *, per_shard: int) -> None:
        self.shards: list[Shard] = []
        self._folder, self._split, self._per_shard = folder, split, per_shard
        self._count = 0
        self._tar: _Tar | None = None

    def add(self, *, png: bytes, height: int, width: int, caption: str, meta: Mapping[str, Any]) -> None:
        """Appends one sample, whose picture is ``height`` x ``width``; its key is its number within the split."""
        if self._tar is None:
            self._tar = _Tar(self._folder / f"{self._split}-{len(self.shards):05d}.tar")
        text, extra = caption.encode(), json.dumps(meta, ensure_ascii=False).encode()
        self._tar.add(f"{self._count:09d}", {"png": png, "txt": text, "json": extra})
        self._tar.table.append((height, width, zlib.crc32(png), zlib.crc32(text)))
        self._count += 1
        if len(self._tar.lines) == self._per_shard:
            self._close()

    def _close(self) -> None:
        if self._tar is not None:
            self.shards.append(self._tar.finish())
            self._tar = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()
        elif self._tar is not None:
            self._tar.abandon()


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it is written to ``manifest.json``."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def build_hash(arguments: Mapping[str, Any], sources: list[str]) -> str:
    """What identifies a build: the format, the arguments that matter and the hashes of the inputs."""
    text = json.dumps([FORMAT, dict(arguments), sorted(sources)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
