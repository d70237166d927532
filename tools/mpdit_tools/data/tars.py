"""Webdataset tars of unknown origin, read where they lie: nothing is unpacked, every lost member is told."""

import dataclasses
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpdit_tools.data.captions import CAPTION_BYTES, clean_caption, is_outside
from mpdit_tools.data.images import FILE_BYTES, Shape, Unusable, render
from mpdit_tools.data.samples import Drop, Job, Sample

DECODABLE = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm")
# What is meant as a picture but cannot be decoded is counted, not passed over.
PICTURES = frozenset([*DECODABLE, "avif", "heic", "heif", "jxl", "jp2", "svg", "ico", "tga"])
JSON_BYTES = 2**20
JSON_LEVELS = 50  # what is nested deeper may break whoever reads or copies it
NAME = 1000  # characters
HEADER_BYTES = 2**14  # of a long name or other attributes
AFTER_END = 2**20  # bytes looked at for members that follow the end of an archive
UNSAFE, NOT_PLAIN, DAMAGED = "unsafe path in a tar", "not a plain file in a tar", "damaged tar"
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")
_DIGITS = re.compile(rb"\d{200}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Where a member's data lies in its archive."""

    offset: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TarJob:
    """One sample of an archive."""

    tar: Path
    picture: Span
    text: Span
    extra: Span | None
    origin: str
    source: str
    shape: Shape

    def render(self) -> Sample | Drop:
        """The picture in its shape, with its caption; the sample's own JSON is kept under ``json``."""
        try:
            caption = clean_caption(self._read(self.text, CAPTION_BYTES, "caption too long"))
            picture = render(self._read(self.picture, FILE_BYTES, "file too large"), self.shape)
            extra = self._extra()
        except Unusable as error:
            return Drop(origin=self.origin, reason=error.reason, detail=error.detail)
        return Sample(
            png=picture.png,
            height=picture.height,
            width=picture.width,
            cut=picture.cut,
            caption=caption,
            concept=caption.casefold(),
            meta={
                "file": self.origin,
                "width": picture.original_width,
                "height": picture.original_height,
                **extra,
            },
            origin=self.origin,
            source=self.source,
        )

    def _extra(self) -> dict[str, Any]:
        if self.extra is None:
            return {}
        try:
            value = json.loads(self._read(self.extra, JSON_BYTES, "JSON too long"))
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            raise Unusable("bad JSON", str(error)) from error
        if not _is_flat(value, JSON_LEVELS):
            raise Unusable("bad JSON", f"nested more than {JSON_LEVELS} levels deep")
        return {"json": value}

    def _read(self, span: Span, limit: int, reason: str) -> bytes:
        if span.size > limit:
            raise Unusable(reason, f"{span.size} bytes")
        try:
            with self.tar.open("rb") as file:
                data = os.pread(file.fileno(), span.size, span.offset)
        except OSError as error:
            raise Unusable("cannot be read", str(error)) from error
        if len(data) != span.size:
            raise Unusable(DAMAGED, "ends within a member")
        return data


def _is_flat(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner)


def tar_jobs(path: Path, shown: str, *, source: str, shape: Shape) -> Iterator[Job]:
    """A job for each sample of an archive, or what is wrong with its members. ``shown`` is its name in reports."""
    group: list[tuple[str, Span]] = []
    last = ""
    for item in _members(path, shown):
        if isinstance(item, Drop):
            yield item
            continue
        name, span = item
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if f"{folder}{slash}{stem}" != last:
            yield from _sample_jobs(path, shown, last, group, source=source, shape=shape)
            group, last = [], f"{folder}{slash}{stem}"
        group.append((extension.lower(), span))
    yield from _sample_jobs(path, shown, last, group, source=source, shape=shape)


def _members(path: Path, shown: str) -> Iterator[tuple[str, Span] | Drop]:
    """The plain files of an archive in order."""
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as archive:
            for member in members(archive):
                origin = f"{shown}:{ascii(member.name[:NAME])[1:-1]}"
                if is_outside(member.name) or len(member.name) > NAME:
                    yield Drop(origin=origin, reason=UNSAFE)
                elif member.isreg() and not member.issparse():
                    yield member.name, Span(offset=member.offset_data, size=member.size)
                elif not member.isdir():
                    yield Drop(origin=origin, reason=NOT_PLAIN)
            end = archive.offset
        # tarfile takes a damaged header for the end of the archive and says nothing; nor does it of what comes after.
        with path.open("rb") as file:
            file.seek(end)
            if file.read(AFTER_END).strip(b"\0"):
                yield Drop(origin=shown, reason=DAMAGED, detail=f"no header at byte {end}, but more data")
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        yield Drop(origin=shown, reason=DAMAGED, detail=f"{type(error).__name__}: {error}"[:NAME])


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Those of an archive in order, each forgotten when the next is asked for: tarfile would keep all of them."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        yield member


class _Header(tarfile.TarInfo):
    """A header without the trust that tarfile of Python 3.11 has in it.

    It would go round in circles over a negative size (CVE-2025-8194), take a long name or a map of holes of any length
    into memory, and search a row of digits in quadratic time (CVE-2024-6232).
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """tarfile's hook: called for every header, before anything that follows it is read."""
        if self.type in _EXTENDED and 0 <= self.size <= HEADER_BYTES:
            where = archive.fileobj.tell()
            digits = _DIGITS.search(archive.fileobj.read(self.size))
            archive.fileobj.seek(where)
            if digits:
                raise tarfile.ReadError("a header holds no attributes but digits")
        elif self.type in _EXTENDED or self.type == tarfile.GNUTYPE_SPARSE or self.size < 0:
            raise tarfile.ReadError(f"a header of type {self.type!r} says that {self.size} bytes follow")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        if member.size < 0:  # which an extended header can say as well
            raise tarfile.ReadError(f"a header says that {member.size} bytes follow")
        return member

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("it holds a file with holes")


def _sample_jobs(
    path: Path, shown: str, key: str, group: Sequence[tuple[str, Span]], *, source: str, shape: Shape
) -> Iterator[Job]:
    origin = f"{shown}:{ascii(key)[1:-1]}"
    pictures = [(extension, span) for extension, span in group if extension in PICTURES]
    rest = dict(group)
    if not pictures:
        if group:
            yield Drop(origin=origin, reason="no picture", detail=", ".join(rest))
        return
    for extension, _ in pictures[1:]:
        yield Drop(origin=f"{origin}.{extension}", reason="second picture of a sample")
    for extension in ("txt", "json"):
        for _ in range(sum(name == extension for name, _ in group) - 1):
            yield Drop(origin=f"{origin}.{extension}", reason="second text of a sample")
    if "txt" not in rest:
        yield Drop(origin=origin, reason="no caption")
        return
    yield TarJob(
        tar=path,
        picture=pictures[0][1],
        text=rest["txt"],
        extra=rest.get("json"),
        origin=origin,
        source=source,
        shape=shape,
    )
