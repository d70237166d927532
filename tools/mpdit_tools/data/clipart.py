"""Captioned clip art out of Debian packages: some 6,400 pictures of every ratio of width to height.

openclipart-png has the pictures, openclipart-svg says in RDF what is on them, tuxpaint-stamps-default has pictures and
a sentence about each.
"""

import collections
import dataclasses
import html
import io
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from mpdit.errors import InputError
from mpdit_tools.data.captions import clean_caption
from mpdit_tools.data.deb import Package, fetch, read_members
from mpdit_tools.data.emoji import slug
from mpdit_tools.data.samples import Drop, Job, Provenance, Sample

if TYPE_CHECKING:
    from mpdit_tools.data.images import Shape

Part = Literal["pictures", "words", "stamps"]
PACKAGES: dict[Part, Package] = {
    "pictures": Package(
        name="openclipart-png",
        version="1:0.18+dfsg-19",
        sha256="f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    ),
    "words": Package(
        name="openclipart-svg",
        version="1:0.18+dfsg-19",
        sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
    "stamps": Package(
        name="tuxpaint-stamps-default",
        version="2022.06.04-1",
        sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    ),
}
LICENCES: dict[Part, str] = {"pictures": "public domain", "words": "public domain", "stamps": "GPL-2"}
FOLDERS: dict[Part, str] = {
    "pictures": "usr/share/openclipart/png/",
    "words": "usr/share/openclipart/svg/",
    "stamps": "usr/share/tuxpaint/stamps/",
}
SPIRAL, SPIRALS = "gramastar", 40  # the title of 1,375 spirals that a program drew, and how many of them are enough
SHARED = 12  # pictures; a title of more is that of a collection
GENERIC = re.compile(
    r"theme|icon collection|etiquette icons|road signs|symbol signs|clipart by|^unknown|untitled", re.I
)
NOISE = re.compile(r"unsorted|duplicates|special|hash|theme|www\.|http", re.I)
KEYWORDS = 6
DESCRIPTION = 120  # characters; what is longer tells a story


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What an SVG's metadata say of it."""

    title: str = ""
    description: str = ""
    keywords: tuple[str, ...] = ()
    creator: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClipJob:
    """One picture, PNG or SVG, and what is said of it."""

    data: bytes
    caption: str
    concept: str
    part: Part
    name: str  # in its folder
    shape: "Shape"

    def render(self) -> Sample | Drop:
        """The picture on white, in its shape."""
        from mpdit_tools.data import images

        origin = f"{PACKAGES[self.part].name}:{self.name}"
        try:
            data = self._drawn() if self.name.endswith(".svg") else self.data
            picture = images.render(data, self.shape)
        except images.Unusable as error:
            return Drop(origin=origin, reason=error.reason, detail=error.detail)
        return Sample(
            png=picture.png,
            height=picture.height,
            width=picture.width,
            cut=picture.cut,
            caption=self.caption,
            concept=self.concept,
            meta={
                "file": self.name,
                "width": picture.original_width,
                "height": picture.original_height,
                "license": LICENCES[self.part],
            },
            origin=origin,
            source=PACKAGES[self.part].name,
            licence=LICENCES[self.part],
        )

    def _drawn(self) -> bytes:
        """The SVG as PNG in a box of twice the size wanted, so that up to 4:1 it has the area and need not grow."""
        import resvg_py

        from mpdit_tools.data.images import Unusable

        side = 2 * self.shape.size
        try:
            drawn = resvg_py.svg_to_bytes(
                svg_string=self.data.decode(), width=side, height=side, skip_system_fonts=True, dpi=96
            )
            return bytes(drawn)
        except ValueError as error:
            raise Unusable("cannot be drawn", str(error)) from error


class Clipart:
    """The clip art as a source for `build`; `debs`: a folder with the packages, None: they come from the machine's apt.

    ``limit`` takes the first so many after the shuffle.
    """

    name = "clipart"
    repeats = False

    def __init__(self, *, shape: "Shape", seed: int, limit: int | None, cache: Path, debs: Path | None) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"--limit {limit}: out of range; 1 or more would be right.")
        self.size, self.aspect = shape.size, shape.aspect
        self._shape, self._seed, self._limit, self._cache, self._debs = shape, seed, limit, cache, debs

    def arguments(self) -> Mapping[str, Any]:
        return {"min_side": self._shape.min_side, "seed": self._seed, "limit": self._limit}

    def provenance(self) -> list[Provenance]:
        return [
            Provenance(name=package.name, version=package.version, sha256=package.sha256, licence=LICENCES[part])
            for part, package in PACKAGES.items()
        ]

    def classes(self, captions: Sequence[str]) -> None:
        return None

    def jobs(self) -> list[Job]:
        """Every picture, in an order that only the seed decides."""
        jobs = [*self._clips(), *self._stamps()]
        random.Random(self._seed).shuffle(jobs)
        return jobs[: self._limit]

    def _members(self, part: Part, *suffixes: str) -> Iterator[tuple[str, bytes] | Drop]:
        return read_members(fetch(PACKAGES[part], self._cache, self._debs), FOLDERS[part], suffixes)

    def _clips(self) -> Iterator[Job]:
        svgs = (item for item in self._members("words", ".svg") if not isinstance(item, Drop))
        words = {name.removesuffix(".svg"): words_of(svg) for name, svg in svgs}
        titles = collections.Counter(each.title for each in words.values())
        spirals = [name for name, each in words.items() if each.title == SPIRAL]
        enough = set(random.Random(self._seed).sample(sorted(spirals), max(0, len(spirals) - SPIRALS)))
        for item in self._members("pictures", ".png"):
            if isinstance(item, Drop):
                yield item
                continue
            name, data = item
            stem = name.removesuffix(".png")
            if stem in enough:
                origin = f"{PACKAGES['pictures'].name}:{name}"
                yield Drop(origin=origin, reason=f"one more {SPIRAL}", harmless=True)
                continue
            said = words.get(stem, Words())
            title = said.title
            if not title or GENERIC.search(title) or (titles[title] > SHARED and title != SPIRAL):
                title = file_title(PurePosixPath(name).stem, said.creator)
            yield self._job("pictures", name, data, clip_caption(title, said, PurePosixPath(name).parent.parts), title)

    def _stamps(self) -> Iterator[Job]:
        texts, pictures = dict[str, str](), list[tuple[str, bytes]]()
        for item in self._members("stamps", ".png", ".svg", ".txt"):
            if isinstance(item, Drop):
                yield item
            elif item[0].endswith(".txt"):
                first = next(io.BytesIO(item[1]), b"")  # translations follow
                texts[item[0].removesuffix(".txt")] = first.decode(errors="replace").strip().rstrip(".")
            else:
                pictures.append(item)
        for name, data in pictures:
            text = texts.get(name.rpartition(".")[0], "")
            if not text:
                yield Drop(origin=f"{PACKAGES['stamps'].name}:{name}", reason="no caption")
                continue
            folder = PurePosixPath(name).parent.name.replace("_", " ")
            caption = f"{text[0].lower()}{text[1:]}, {folder}"
            yield self._job("stamps", name, data, caption, text)

    def _job(self, part: Part, name: str, data: bytes, caption: str, title: str) -> Job:
        concept = slug(re.sub(r"\d+", " ", title)) or slug(name)
        return ClipJob(
            data=data,
            caption=clean_caption(caption.encode()),
            concept=f"{part} {concept}",
            part=part,
            name=name,
            shape=self._shape,
        )


def words_of(svg: bytes) -> Words:
    """What the RDF in an SVG says. By patterns, for these files are not all well-formed XML."""
    found = re.search(r"<metadata.*?</metadata>", svg.decode(errors="replace"), re.DOTALL)
    rdf = found.group() if found else ""
    subject = _inside(rdf, "dc:subject")
    return Words(
        title=_plain(_inside(rdf, "dc:title").replace("_", " ")),
        description=_plain(_inside(rdf, "dc:description")),
        keywords=tuple(filter(None, map(_plain, re.findall(r"<rdf:li>(.*?)</rdf:li>", subject, re.DOTALL)))),
        creator=_plain(_inside(_inside(rdf, "dc:creator"), "dc:title")),
    )


def _inside(text: str, tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found.group(1) if found else ""


def _plain(text: str) -> str:
    """Without tags; entities are escaped twice in some files."""
    return " ".join(html.unescape(html.unescape(re.sub(r"<.*?>", " ", text))).split())


def file_title(stem: str, creator: str) -> str:
    """Words out of a file name such as ``frog_lumen_desig_01``, without the number and the creator (cut short)."""
    words = re.sub(r"[\W_]+", " ", stem).split()
    while len(words) > 1 and words[-1].isdigit():
        words.pop()
    made_by = slug(creator)
    for first in range(1, len(words)):
        if made_by.startswith(slug(" ".join(words[first:]))):
            return " ".join(words[:first])
    return " ".join(words)


def clip_caption(title: str, said: Words, folders: Sequence[str]) -> str:
    """``clip art of TITLE, DESCRIPTION, KEYWORDS``, without what says nothing of the picture or says it again."""
    caption = title.lower()
    description = said.description.rstrip(". ").lower()
    if description not in caption and len(description) <= DESCRIPTION and not NOISE.search(description):
        caption += f", {description}"
    people = {said.creator.lower(), "architetto francesco rollandin", "francesco rollandin", "architetto"}
    for keyword in [*said.keywords, *reversed(folders)]:
        word = keyword.replace("_", " ").lower()
        if (
            word.removesuffix("s") not in caption
            and word not in people
            and not NOISE.search(word)
            and caption.count(",") < KEYWORDS
        ):
            caption += f", {word}"
    return f"clip art of {caption}"
