"""Captioned images in tar shards: opened, checked against manifest, index and table, read by sample number.

A data set is a folder with ``manifest.json``, webdataset tars (``KEY.png KEY.txt KEY.json`` a sample) and, beside each
tar, an index that says where in it each member's bytes are and a table of the images' sizes and of checksums
(``mpdit.data.index``). The manifest has the SHA-256 of each of them, of the tokenizer, and of itself.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mpdit.data import index
from mpdit.data.index import Shard
from mpdit.errors import InputError

FORMAT = "mpdit-shards/2"
_OPEN_TARS = 128  # more than a node's shards of a small set, well under the usual limit of 1024 open files
_BUILD_HINT = "`mpdit data build icons --out FOLDER` makes one"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFile:
    """The data set's tokenizer; ``mpdit.data.text.SentencePiece.open(path, sha256)`` loads and checks it."""

    path: Path
    sha256: str
    vocab_size: int


class BadSample(Exception):
    """One sample of a sound set can't be used, although its shard was whole when it was opened: a bit has flipped."""

    def __init__(self, sample: int, where: str, reason: str) -> None:
        """`where`: its tar and member, for people; `reason`: a short phrase out of a small set, to count by."""
        super().__init__(sample, where, reason)
        self.sample, self.where, self.reason = sample, where, reason

    def __str__(self) -> str:
        return f"{self.where}: sample {self.sample}: {self.reason}"


class Shards:
    """The samples of one split, numbered 0 … len - 1 in the manifest's order. Reading is thread-safe and fork-safe."""

    def __init__(
        self,
        folder: Path,
        split: str,
        manifest: dict[str, Any],
        shards: list[Shard],
        spans: np.ndarray,
        table: np.ndarray,
    ) -> None:
        """`spans`, `table`: int64 (samples, 4), as ``mpdit.data.index.read`` gives them. Use :meth:`open`."""
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.size: int = manifest["size"]  # pixels a side of square images; of others, of a square of about their area
        self.shards = shards
        self.tokenizer = _tokenizer(folder, manifest)
        self.classes = _classes(folder, manifest)
        self.fingerprint = hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()
        self.sizes = table[:, :2]  # int64 (samples, 2): height, width of the stored image
        self._spans, self._sums = spans, table[:, 2:]
        self._firsts = np.cumsum([0] + [shard.samples for shard in shards])
        self._tar = functools.lru_cache(maxsize=_OPEN_TARS)(lambda number: _File(shards[number].tar))

    @classmethod
    def open(cls, path: str | Path, split: str) -> "Shards":
        """Open a split of the data set in folder `path` and check manifest, indices, tables and tar headers.

        Raises InputError for a folder that is no data set, a split that is not there, and a tar, index or table that
        is missing, cut short or not the one the manifest was written for. Only :meth:`verify` reads all of the tars.
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
        spans, tables = zip(*map(index.read, shards), strict=True)
        return cls(folder, split, manifest, shards, np.concatenate(spans), np.concatenate(tables))

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, sample: int) -> tuple[bytes, str]:
        """The encoded image and the caption.

        Raises IndexError out of range, and BadSample when the bytes are not those that were built: a bit has flipped,
        or the tar was cut short or replaced while in use. What the disk itself refuses is an OSError.
        """
        offset, size, _, _ = self._span(sample)
        return self._bytes(sample, 0, offset, size), self.caption(sample)

    def caption(self, sample: int) -> str:
        """The caption, without the white space around it. Raises as :meth:`read` does."""
        _, _, offset, size = self._span(sample)
        try:
            return self._bytes(sample, 1, offset, size).decode().strip()
        except UnicodeDecodeError as error:
            raise BadSample(sample, self.where(sample), "caption not UTF-8") from error

    def where(self, sample: int) -> str:
        """The sample's tar and member name, for messages."""
        number = self._number(sample)
        header = self._tar(number).pread(index.BLOCK, self._span(sample)[0] - index.BLOCK)
        return ": ".join(filter(None, (str(self.shards[number].tar), index.member_name(header))))

    def verify(self) -> None:
        """Read every tar and compare its SHA-256 with the manifest's. Raises InputError for the first that differs."""
        for shard in self.shards:
            with shard.tar.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise InputError(
                    f"{shard.tar}: has SHA-256 {found[:16]}…, but the manifest says {shard.sha256[:16]}…: "
                    f"it is damaged; copy it again or build the set anew."
                )

    def _span(self, sample: int) -> list[int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return self._spans[sample].tolist()

    def _number(self, sample: int) -> int:
        return int(np.searchsorted(self._firsts, sample, side="right")) - 1

    def _bytes(self, sample: int, what: int, offset: int, size: int) -> bytes:
        """`what`: 0 the image's, 1 the caption's."""
        data = self._tar(self._number(sample)).pread(size, offset)
        if len(data) != size:
            raise BadSample(sample, self.where(sample), "tar cut short")
        if zlib.crc32(data) != self._sums[sample, what]:
            raise BadSample(sample, self.where(sample), ("image damaged", "caption damaged")[what])
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
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error}); build the data set again.") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path}: format is {_short(found)}, but this version reads {FORMAT!r}; build the data set again."
        )
    for key, kind in (("name", str), ("size", int), ("splits", dict), ("manifest_sha256", str)):
        _get(manifest, key, kind, str(path))
    if manifest["manifest_sha256"] != manifest_sha256(manifest):
        raise InputError(
            f"{path}: has another SHA-256 than it says itself: it was changed; copy it again or build the set anew."
        )
    return manifest


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """What ``manifest_sha256`` in a manifest should be: the hash of all else in it, however it is written down."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _get(tree: Any, key: str, kind: type, where: str) -> Any:
    value = tree.get(key) if isinstance(tree, dict) else None
    if type(value) is not kind:
        wanted = {int: "a whole number", str: "a text", list: "a list", dict: "an object"}[kind]
        raise InputError(f"{where}: {key} is {_short(value)}, but should be {wanted}; build the data set again.")
    return value


def _plain(folder: Path, tree: Any, key: str, where: str) -> Path:
    """The file named by `key`: a bare name, so that a manifest can't reach outside its folder."""
    name = _get(tree, key, str, where)
    odd = "\\" in name or "\0" in name or len(name.encode(errors="replace")) > 255
    if name in ("", ".", "..") or Path(name).name != name or odd:
        raise InputError(f"{where}: {key} is {_short(name)}, but should be the plain name of a file in {folder}.")
    return folder / name


def _shard(folder: Path, tree: Any, where: str) -> Shard:
    return Shard(
        tar=_plain(folder, tree, "tar", where),
        index=_plain(folder, tree, "index", where),
        table=_plain(folder, tree, "table", where),
        samples=_get(tree, "samples", int, where),
        bytes=_get(tree, "bytes", int, where),
        sha256=_get(tree, "sha256", str, where),
        index_sha256=_get(tree, "index_sha256", str, where),
        table_sha256=_get(tree, "table_sha256", str, where),
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
