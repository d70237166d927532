"""Captioned icons out of npm packages: five drawing styles of the same emoji, some 18,000 pictures at any size."""

import dataclasses
import difflib
import io
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mpdit.errors import InputError
from mpdit_tools.data.emoji import Emoji, code_key, emojibase, openmoji, slug, unnamed
from mpdit_tools.data.npm import Package, fetch, read_members
from mpdit_tools.data.samples import Aspect, Drop, Job, Provenance, Sample


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """A set of icons drawn by one hand."""

    name: str  # as in captions: "red heart, noto style"
    licence: str
    package: Package
    layout: Literal["iconify", "openmoji"]
    names: Package | None = None  # whose ``chars.json`` tells the code points; None: the package itself


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """The styles there are, and the package with the words for them."""

    words: Package
    styles: tuple[Style, ...]


def _iconify(name: str, version: str, sha256: str) -> Package:
    return Package(name=f"@iconify-json/{name}", version=version, sha256=sha256)


_FLAT = _iconify("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175")

CATALOGUE = Catalogue(
    words=Package(
        name="emojibase-data",
        version="17.0.0",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    styles=(
        Style(
            name="noto",
            licence="Apache-2.0",
            package=_iconify("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
            layout="iconify",
        ),
        Style(
            name="twemoji",
            licence="CC-BY-4.0",
            package=_iconify("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
            layout="iconify",
        ),
        Style(
            name="fluent",
            licence="MIT",
            package=_iconify(
                "fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
            ),
            layout="iconify",
            names=_FLAT,  # its own is empty; the two sets name their icons alike
        ),
        Style(name="fluent flat", licence="MIT", package=_FLAT, layout="iconify"),
        Style(
            name="openmoji",
            licence="CC-BY-SA-4.0",
            package=Package(
                name="openmoji",
                version="17.0.0",
                sha256="55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
            ),
            layout="openmoji",
        ),
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IconJob:
    """One icon to be drawn."""

    svg: str
    size: int  # pixels a side
    style: str
    licence: str
    source: str
    origin: str
    emoji: Emoji

    def render(self) -> Sample | Drop:
        """The icon on white."""
        import resvg_py
        from PIL import Image

        from mpdit_tools.data.images import encode_png, flatten

        try:
            drawn = resvg_py.svg_to_bytes(
                svg_string=self.svg, width=self.size, height=self.size, background="#ffffff", skip_system_fonts=True
            )
            image = flatten(Image.open(io.BytesIO(bytes(drawn))))
        except (ValueError, OSError) as error:
            return Drop(origin=self.origin, reason="cannot be drawn", detail=str(error))
        if image.size != (self.size, self.size):
            return Drop(origin=self.origin, reason="not square", detail=f"drawn as {image.width} x {image.height}")
        return Sample(
            png=encode_png(image),
            height=self.size,
            width=self.size,
            caption=f"{self.emoji.label}, {self.style} style",
            concept=self.emoji.concept,
            meta={
                "label": self.emoji.label,
                "style": self.style,
                "tags": list(self.emoji.tags),
                "group": self.emoji.group,
                "subgroup": self.emoji.subgroup,
                "code": self.emoji.code,
                "license": self.licence,
            },
            origin=self.origin,
            source=self.source,
            style=self.style,
            licence=self.licence,
        )


class Icons:
    """The icons of a catalogue as a source for `build`.

    ``match`` selects by label, see `matcher`; ``limit`` takes the first so many after the shuffle. Raises InputError
    for a style or a word that selects nothing.
    """

    name = "icons"
    aspect: Aspect = "square"
    repeats = False

    def __init__(
        self,
        *,
        size: int,
        styles: Sequence[str],
        match: str,
        limit: int | None,
        seed: int,
        cache: Path,
        catalogue: Catalogue,
    ) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"--limit {limit}: out of range; 1 or more would be right.")
        self.size, self._match, self._limit, self._seed = size, match, limit, seed
        self._cache, self._catalogue = cache, catalogue
        self._styles = _choose(catalogue, styles)

    def arguments(self) -> Mapping[str, Any]:
        styles = [style.name for style in self._styles]
        return {"styles": styles, "match": self._match, "limit": self._limit, "seed": self._seed}

    def provenance(self) -> list[Provenance]:
        licences: dict[Package, str] = {}
        for style in self._styles:
            licences.setdefault(style.package, style.licence)
        for style in self._styles:
            licences.setdefault(style.names or style.package, style.licence)
        licences.setdefault(self._catalogue.words, "MIT")
        return [
            Provenance(name=package.name, version=package.version, sha256=package.sha256, licence=licence)
            for package, licence in licences.items()
        ]

    def classes(self, captions: Sequence[str]) -> None:
        return None

    def jobs(self) -> list[Job]:
        """Every selected icon, in an order that only the seed decides."""
        words = emojibase(self._read(self._catalogue.words, lambda name: name in ("en/data.json", "en/messages.json")))
        jobs = [job for style in self._styles for job in self._style(style, words)]
        jobs = _select(jobs, self._match)
        random.Random(self._seed).shuffle(jobs)
        return list(jobs[: self._limit])

    def _read(self, package: Package, wanted: Callable[[str], bool]) -> dict[str, bytes]:
        return read_members(fetch(package, self._cache), wanted)

    def _style(self, style: Style, words: Mapping[str, Emoji]) -> list[IconJob]:
        pairs = self._openmoji(style, words) if style.layout == "openmoji" else self._iconify(style, words)
        return [
            IconJob(
                svg=svg,
                size=self.size,
                style=style.name,
                licence=style.licence,
                source=style.package.name,
                origin=f"{style.package.name}:{name}",
                emoji=emoji,
            )
            for name, svg, emoji in pairs
        ]

    def _iconify(self, style: Style, words: Mapping[str, Emoji]) -> list[tuple[str, str, Emoji]]:
        files = self._read(style.package, lambda name: name in ("icons.json", "chars.json"))
        if style.names is not None:
            files |= self._read(style.names, lambda name: name == "chars.json")
        codes = {name: code_key(code) for code, name in sorted(json.loads(files["chars.json"]).items(), reverse=True)}
        by_slug = {slug(emoji.label): emoji for emoji in words.values()}
        icons = json.loads(files["icons.json"])
        found = []
        for name, icon in sorted(icons["icons"].items()):
            if icon.get("hidden"):
                continue
            emoji = words.get(codes.get(name, "")) or by_slug.get(name) or unnamed(name)
            box = [icon.get(key, icons.get(key, 16)) for key in ("width", "height")]
            found.append((name, _svg(icon["body"], *box), emoji))
        return found

    def _openmoji(self, style: Style, words: Mapping[str, Emoji]) -> list[tuple[str, str, Emoji]]:
        folder = "color/svg/"
        files = self._read(style.package, lambda name: name == "data/openmoji.json" or name.startswith(folder))
        found = []
        for entry in json.loads(files["data/openmoji.json"]):
            svg = files[f"{folder}{entry['hexcode']}.svg"].decode()
            found.append((entry["hexcode"], svg, words.get(code_key(entry["hexcode"])) or openmoji(entry)))
        return found


def _svg(body: str, width: float, height: float) -> str:
    # Width equal to height: a drawing that is not square is centred, not stretched.
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="64" height="64" viewBox="0 0 {width} {height}">{body}</svg>'
    )


def _choose(catalogue: Catalogue, wanted: Sequence[str]) -> list[Style]:
    styles = {slug(style.name): style for style in catalogue.styles}
    for name in wanted:
        if slug(name) not in styles:
            close = difflib.get_close_matches(slug(name), styles, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"--styles: there is no style {name!r}; {hint}the styles are {', '.join(styles)}.")
    chosen = {slug(name) for name in wanted} or set(styles)
    return [style for key, style in styles.items() if key in chosen]


def _select(jobs: list[IconJob], match: str) -> list[IconJob]:
    """The jobs that a term of ``match`` selects; all when it is empty."""
    terms = [term.strip() for term in match.split(",") if term.strip()]
    if not terms:
        return jobs
    chosen: set[int] = set()
    for term in terms:
        wanted = matcher(term)
        hits = {number for number, job in enumerate(jobs) if wanted(job.emoji)}
        if not hits:
            raise InputError(f"--match: {term!r} selects no icon{_suggest(term, [job.emoji for job in jobs])}.")
        chosen |= hits
    return [jobs[number] for number in sorted(chosen)]


def matcher(term: str) -> Callable[[Emoji], bool]:
    """A test for one term: ``group:NAME``, ``subgroup:NAME``, or whole words of the label, in any case."""
    kind, colon, name = term.partition(":")
    if colon and kind in ("group", "subgroup"):
        wanted = slug(name)
        return lambda emoji: slug(getattr(emoji, kind)) == wanted
    words = re.compile(rf"(?<!\w){re.escape(term)}(?!\w)", re.IGNORECASE)
    return lambda emoji: words.search(emoji.label) is not None


def _suggest(term: str, emojis: Sequence[Emoji]) -> str:
    kind, colon, name = term.partition(":")
    if colon and kind in ("group", "subgroup"):
        there = sorted({slug(getattr(emoji, kind)) for emoji in emojis if getattr(emoji, kind)})
        close = difflib.get_close_matches(slug(name), there, n=3) or there[:10]
        return f"; there is {kind}:" + f", {kind}:".join(close) if close else ""
    words = sorted({word for emoji in emojis for word in re.findall(r"\w+", emoji.label.lower())})
    close = difflib.get_close_matches(term.lower(), words, n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
