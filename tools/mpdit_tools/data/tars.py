"""Webdataset tars of unknown origin, read where they lie: nothing is unpacked, every lost member is told."""

import dataclasses
import json
import os
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
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise Unusable("bad JSON", str(error)) from error
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
            raise Unusable("damaged tar", "ends within a member")
        return data


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
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                origin = f"{shown}:{ascii(member.name)[1:-1]}"
                if is_outside(member.name):
                    yield Drop(origin=origin, reason="unsafe path in a tar")
                elif member.isreg() and not member.issparse():
                    yield member.name, Span(offset=member.offset_data, size=member.size)
                elif not member.isdir():
                    yield Drop(origin=origin, reason="not a plain file in a tar")
            end = archive.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        yield Drop(origin=shown, reason="damaged tar", detail=str(error))
        return
    # tarfile takes a damaged header for the end of the archive and says nothing.
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            yield Drop(origin=shown, reason="damaged tar", detail=f"no header at byte {end}")


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
