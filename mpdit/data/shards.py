"""Captioned images in tar shards: opened, checked against manifest and index, read by sample number.

A data set is a folder with ``manifest.json``, webdataset tars (``KEY.png KEY.txt KEY.json`` a sample) and, beside each
tar, an index in the text format of DALI's ``wds2idx`` v1.2, which says where in the tar each member's bytes are.
"""

import dataclasses
import functools
import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from mpdit.errors import InputError

FORMAT = "mpdit-shards/1"
IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
_BLOCK = 512  # tar's block: a header, then the member's bytes, padded
_OPEN_TARS = 128  # more than a node's shards of a small set, well under the usual limit of 1024 open files
_BUILD_HINT = "`mpdit data build icons --out FOLDER` makes one"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A tar and its index, as the manifest has them."""

    tar: Path
    index: Path
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFile:
    """The data set's tokenizer; ``mpdit.data.text.SentencePiece.open(path, sha256)`` loads and checks it."""

    path: Path
    sha256: str
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file in a tar: `size` bytes at `offset`."""

    name: str
    offset: int
    size: int


class Shards:
    """The samples of one split, numbered 0 … len - 1 in the manifest's order. Reading is thread-safe and fork-safe."""

    def __init__(
        self, folder: Path, split: str, manifest: dict[str, Any], shards: list[Shard], spans: np.ndarray
    ) -> None:
        """`spans`: int64 (samples, 4) image offset and size, caption offset and size. Use :meth:`open`."""
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.size: int = manifest["size"]  # pixels a side of the stored images
        self.shards = shards
        self.tokenizer = _tokenizer(folder, manifest)
        self.classes = _classes(folder, manifest)
        self.fingerprint = hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()
        self._spans = spans
        self._firsts = np.cumsum([0] + [shard.samples for shard in shards])
        self._tar = functools.lru_cache(maxsize=_OPEN_TARS)(lambda number: _File(shards[number].tar))

    @classmethod
    def open(cls, path: str | Path, split: str) -> "Shards":
        """Open a split of the data set in folder `path` and check manifest, indices and every tar header.

        Raises InputError for a folder that is no data set, a split that is not there, and a tar or index that is
        missing, cut short or not the one the manifest was written for. Only :meth:`verify` reads the tars' contents.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        splits = manifest["splits"]
        if split not in splits:
            raise InputError(f"{folder / 'manifest.json'}: has no split {split!r}; it has {', '.join(sorted(splits))}.")
        where = f"{folder / 'manifest.json'}: splits.{split}"
        shards = [_shard(folder, tree, f"{where}.shards") for tree in _get(splits[split], "shards", list, where)]
        if not (total := _get(splits[split], "samples", int, where)) or total != sum(s.samples for s in shards):
            raise InputError(
                f"{where}.samples is {total}, but its shards add up to {sum(s.samples for s in shards)}: "
                f"they should be the same and more than 0."
            )
        for shard in shards:
            _check_files(shard)
        spans = np.concatenate([_spans(shard, _read_index(shard)) for shard in shards])
        return cls(folder, split, manifest, shards, spans)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, sample: int) -> tuple[bytes, str]:
        """The encoded image and the caption. Raises IndexError out of range, InputError when the tar changed since."""
        offset, size, _, _ = self._span(sample)
        return self._pread(sample, offset, size), self.caption(sample)

    def caption(self, sample: int) -> str:
        """The caption, without the white space around it. Raises as :meth:`read` does."""
        _, _, offset, size = self._span(sample)
        try:
            return self._pread(sample, offset, size).decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where(sample)}: the caption is not UTF-8; rebuild the data set.") from error

    def where(self, sample: int) -> str:
        """The sample's tar and member name, for messages."""
        number = self._number(sample)
        header = self._tar(number).pread(_BLOCK, self._span(sample)[0] - _BLOCK)
        return f"{self.shards[number].tar}: {_header_name(header)}"

    def verify(self) -> None:
        """Read every tar and compare its SHA-256 with the manifest's. Raises InputError for the first that differs."""
        for shard in self.shards:
            with shard.tar.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise InputError(
                    f"{shard.tar}: has SHA-256 {found[:16]}…, but the manifest says {shard.sha256[:16]}…: "
                    f"it is damaged; copy it again or rebuild the data set."
                )

    def _span(self, sample: int) -> list[int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return self._spans[sample].tolist()

    def _number(self, sample: int) -> int:
        return int(np.searchsorted(self._firsts, sample, side="right")) - 1

    def _pread(self, sample: int, offset: int, size: int) -> bytes:
        number = self._number(sample)
        data = self._tar(number).pread(size, offset)
        if len(data) != size:
            raise InputError(f"{self.shards[number].tar}: was cut short while in use; restore the file.")
        return data


class _File:
    """A file descriptor that is closed when nobody holds it: a reader may keep one that the cache has dropped."""

    __slots__ = ("_fd",)

    def __init__(self, path: Path) -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{path}: can't be opened: {error.strerror}; restore the file.") from error

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


# ---- manifest --------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        what = "has no manifest.json, so it is not a data set" if folder.is_dir() else "there is no such folder"
        raise InputError(f"{folder}: {what}; {_BUILD_HINT}.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error}); rebuild the data set.") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: format is {found!r}, but this version reads {FORMAT!r}; rebuild the data set.")
    for key, kind in (("name", str), ("size", int), ("splits", dict)):
        _get(manifest, key, kind, str(path))
    return manifest


def _get(tree: Any, key: str, kind: type, where: str) -> Any:
    value = tree.get(key) if isinstance(tree, dict) else None
    if type(value) is not kind:
        wanted = {int: "a whole number", str: "a text", list: "a list", dict: "an object"}[kind]
        raise InputError(f"{where}: {key} is {value!r}, but should be {wanted}; rebuild the data set.")
    return value


def _plain(folder: Path, tree: Any, key: str, where: str) -> Path:
    """The file named by `key`: a bare name, so that a manifest can't reach outside its folder."""
    name = _get(tree, key, str, where)
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise InputError(f"{where}: {key} is {name!r}, but should be the plain name of a file in {folder}.")
    return folder / name


def _shard(folder: Path, tree: Any, where: str) -> Shard:
    return Shard(
        tar=_plain(folder, tree, "tar", where),
        index=_plain(folder, tree, "index", where),
        samples=_get(tree, "samples", int, where),
        bytes=_get(tree, "bytes", int, where),
        sha256=_get(tree, "sha256", str, where),
        index_sha256=_get(tree, "index_sha256", str, where),
    )


def _tokenizer(folder: Path, manifest: dict[str, Any]) -> TokenizerFile | None:
    if manifest.get("tokenizer") is None:
        return None
    tree, where = manifest["tokenizer"], f"{folder / 'manifest.json'}: tokenizer"
    return TokenizerFile(
        path=_plain(folder, tree, "file", where),
        sha256=_get(tree, "sha256", str, where),
        vocab_size=_get(tree, "vocab_size", int, where),
    )


def _classes(folder: Path, manifest: dict[str, Any]) -> tuple[str, ...] | None:
    """The names that captions are, in the order of their numbers; None where captions are free text."""
    if manifest.get("classes") is None:
        return None
    return class_names(manifest["classes"], f"{folder / 'manifest.json'}: classes")


def class_names(value: Any, where: str) -> tuple[str, ...]:
    """`value`, a list of distinct names, as class names. Raises InputError, with `where` in the sentence, if it is not.

    A name is not empty, for that is "no class", and has no white space around it, as captions have none.
    """
    good = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if not good or any(name.strip() != name or not name for name in value) or len(set(value)) < len(value):
        raise InputError(
            f"{where} is {_short(value)}, but should be a list of distinct names without white space around them."
        )
    return tuple(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


# ---- tar and index ---------------------------------------------------------------------------------------------------


def _check_files(shard: Shard) -> None:
    for path in (shard.tar, shard.index):
        if not path.is_file():
            raise InputError(
                f"{path}: is in the manifest but not in the folder; copy it there or rebuild the data set."
            )
    if (found := shard.tar.stat().st_size) != shard.bytes:
        raise InputError(
            f"{shard.tar}: is {found} bytes long, but the manifest says {shard.bytes}: "
            f"it was cut short or replaced; copy it again or rebuild the data set."
        )


def _read_index(shard: Shard) -> list[dict[str, Member]]:
    """The members of each sample by extension. Raises InputError when the index is not the manifest's or not v1.2."""
    text = shard.index.read_bytes()
    if hashlib.sha256(text).hexdigest() != shard.index_sha256:
        raise InputError(
            f"{shard.index}: has another SHA-256 than the manifest's: it was changed or is another shard's; "
            f"copy it again or rebuild the data set."
        )
    try:
        head, *lines = text.decode().splitlines()
        version, count = head.split()
        rows = [line.split() for line in lines]
        samples = [
            {ext: Member(name=name, offset=int(offset), size=int(size)) for ext, offset, size, name in _fours(row)}
            for row in rows
        ]
        if version != "v1.2" or int(count) != len(samples):
            raise ValueError
    except ValueError as error:
        raise InputError(f"{shard.index}: is not an index in DALI's v1.2 format; rebuild the data set.") from error
    if len(samples) != shard.samples:
        raise InputError(
            f"{shard.index}: lists {len(samples)} samples, but the manifest says {shard.samples}; rebuild the data set."
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
                    f"({', '.join(IMAGE_TYPES)}) and one txt; rebuild the data set."
                )
            key = members["txt"].name.removesuffix("txt")
            for ext, member in members.items():
                if member.name != key + ext or not _header_fits(tar, shard.bytes, member):
                    raise InputError(
                        f"{shard.index}: says that {member.name} is {member.size} bytes at {member.offset}, but in "
                        f"{shard.tar.name} it is not: the two don't belong together; rebuild the data set."
                    )
            image, text = members[images[0]], members["txt"]
            spans[row] = image.offset, image.size, text.offset, text.size
    return spans


def _header_fits(tar: mmap.mmap, length: int, member: Member) -> bool:
    start = member.offset - _BLOCK
    if start < 0 or member.offset % _BLOCK or member.size < 0 or member.offset + member.size > length:
        return False
    header = tar[start : member.offset]
    is_file = header[156:157] in (b"0", b"\0")
    return is_file and _octal(header[124:136]) == member.size and _header_name(header) == member.name


def _header_name(header: bytes) -> str:
    name = header[:100].rstrip(b"\0")
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].rstrip(b"\0") + b"/" + name
    return name.decode(errors="replace")


def _octal(field: bytes) -> int:
    try:
        return int(field.rstrip(b"\0 "), 8)
    except ValueError:
        return -1
