"""A user's own pictures: files with captions beside them or in a list, and webdataset tars."""

import collections
import dataclasses
import hashlib
import os
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpdit.errors import InputError
from mpdit_tools.data.captions import CAPTION_BYTES, LIST, clean_caption, read_list
from mpdit_tools.data.images import FILE_BYTES, Shape, Unusable, render
from mpdit_tools.data.samples import Drop, Job, Provenance, Sample
from mpdit_tools.data.tars import PICTURES, tar_jobs

CLASSES = 10_000  # more different captions than this are free text
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileJob:
    """One picture file and its caption."""

    path: Path
    caption: str
    origin: str
    source: str
    shape: Shape

    def render(self) -> Sample | Drop:
        """The picture in its shape."""
        try:
            picture = render(_read(self.path, FILE_BYTES, "file too large"), self.shape)
        except Unusable as error:
            return Drop(origin=self.origin, reason=error.reason, detail=error.detail)
        return Sample(
            png=picture.png,
            height=picture.height,
            width=picture.width,
            cut=picture.cut,
            caption=self.caption,
            concept=self.caption.casefold(),
            meta={"file": self.origin, "width": picture.original_width, "height": picture.original_height},
            origin=self.origin,
            source=self.source,
        )


class Folder:
    """A folder as a source for `build`. Hidden files are left out; subfolders are read, links to folders are not.

    ``labelled``: captions are names of classes.
    Raises InputError when the folder is not there, holds nothing, or lies within ``out`` or around it.
    """

    repeats = True

    def __init__(self, folder: Path, *, shape: Shape, labelled: bool, seed: int, out: Path) -> None:
        self.size, self.aspect = shape.size, shape.aspect
        self._shape, self._labelled, self._seed = shape, labelled, seed
        self._root = Path(os.path.abspath(folder))
        self.name = _shown(self._root.resolve().name)
        if not self._root.is_dir():
            raise InputError(f"{folder}: there is no such folder; name the one that holds the pictures.")
        inside, other = self._root.resolve(), out.resolve()
        if inside == other or inside in other.parents or other in inside.parents:
            raise InputError(f"--out {out}: lies within the folder that is read, or around it; name a folder outside.")
        self._files = sorted(self._walk())
        if not self._files:
            raise InputError(f"{folder}: the folder holds no files; it should hold pictures with captions, or tars.")

    def arguments(self) -> Mapping[str, Any]:
        return {"min_side": self._shape.min_side, "classes": self._labelled, "seed": self._seed}

    def provenance(self) -> list[Provenance]:
        digest = hashlib.sha256()
        for name in self._files:
            path = self._root / name
            digest.update(os.fsencode(name) + f"\0{path.lstat().st_size}\0{_content_hash(path)}\n".encode())
        return [Provenance(name=self.name, version="", sha256=digest.hexdigest(), licence="unknown")]

    def classes(self, captions: Sequence[str]) -> list[str] | None:
        """The different captions, sorted. Raises InputError when they are too many for classes."""
        if not self._labelled:
            return None
        names = sorted(set(captions))
        if len(names) > CLASSES:
            raise InputError(
                f"--classes: {self.name} has {len(names)} different captions, but {CLASSES} classes are the most; "
                "captions should be the names of classes, or --classes be left out."
            )
        return names

    def jobs(self) -> list[Job]:
        jobs = list(self._jobs())
        if not jobs:
            raise InputError(f"{self.name}: the folder holds no pictures (.png, .jpg and such) and no .tar files.")
        random.Random(self._seed).shuffle(jobs)
        return jobs

    def _walk(self) -> Iterator[str]:
        """The plain files, by name relative to the folder."""
        for folder, folders, files in os.walk(self._root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = Path(folder, name)
                # A broken link is kept, to be counted; a pipe would block whoever opens it, by a link too.
                if not name.startswith(".") and (os.path.isfile(path) or not os.path.exists(path)):
                    yield path.relative_to(self._root).as_posix()

    def _jobs(self) -> Iterator[Job]:
        listed = yield from self._listed()
        texts = {_stem(name): name for name in self._files if name.lower().endswith(".txt")}
        used = set[str]()
        for name in self._files:
            lower = name.lower()
            origin = _shown(name)
            if lower.endswith(".tar"):
                path = self._root / name
                yield from tar_jobs(path, origin, source=self.name, shape=self._shape)
            elif lower.endswith(COMPRESSED):
                yield Drop(origin=origin, reason="compressed tar", detail="unpack it to a plain .tar first")
            elif listed.get(name):
                yield from (self._job(name, caption) for caption in listed[name])
            elif not lower.endswith((".txt", ".json", ".jsonl")) and (_is_picture(lower) or _stem(name) in texts):
                used.add(_stem(name))
                yield self._beside(name, texts.get(_stem(name)))
        if not listed:
            for stem in sorted(texts.keys() - used):
                yield Drop(origin=_shown(texts[stem]), reason="caption without a picture")

    def _listed(self) -> Generator[Job, None, Mapping[str, list[str]]]:
        """Yields what is wrong with the list of captions; returns the captions of each file."""
        captions: dict[str, list[str]] = collections.defaultdict(list)
        if LIST in self._files:
            there = set(self._files)
            for number, entry in enumerate(read_list(self._root / LIST), 1):
                if isinstance(entry, Drop):
                    yield entry
                    continue
                name = Path(entry[0]).as_posix()
                if name in there:
                    captions[name].append(entry[1])
                else:
                    yield Drop(
                        origin=f"{LIST}: {ascii(entry[0])[1:-1]}", reason="no such file", detail=f"entry {number}"
                    )
        return captions

    def _beside(self, name: str, text: str | None) -> Job:
        if text is None:
            return Drop(origin=_shown(name), reason="no caption")
        try:
            return self._job(name, clean_caption(_read(self._root / text, CAPTION_BYTES, "caption too long")))
        except Unusable as error:
            return Drop(origin=_shown(name), reason=error.reason, detail=error.detail)

    def _job(self, name: str, caption: str) -> Job:
        return FileJob(
            path=self._root / name,
            caption=caption,
            origin=_shown(name),
            source=self.name,
            shape=self._shape,
        )


def _shown(name: str) -> str:
    """A file name that can be written as UTF-8, which names on a disk need not be."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _is_picture(lower: str) -> bool:
    return lower.rpartition(".")[2] in PICTURES


def _read(path: Path, limit: int, reason: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Unusable("cannot be read", error.strerror or str(error)) from error
    if len(data) > limit:
        raise Unusable(reason, f"more than {limit} bytes")
    return data


def _content_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"
