"""What a source of data hands to the builder: jobs that become samples or are dropped, and where they came from."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

LONGEST = 4  # times as long as wide, or the other way; pictures kept in their shape are cut to this
Aspect = Literal["square", "keep"]  # all pictures square, or each in its own ratio of width to height


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One picture, ready to be written."""

    png: bytes  # RGB or gray
    height: int  # of the picture in ``png``, in pixels
    width: int
    caption: str
    concept: str  # without classes, what is split between train and val: samples of one never end up in both
    meta: dict[str, Any]  # the JSON beside the picture
    origin: str  # the file or icon it was made from
    source: str  # a `Provenance.name`
    style: str = ""
    licence: str = "unknown"
    cut: bool = False  # for being too long for its width, or too wide for its height


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """A picture that cannot be used, and why. It is a job too: one that was lost before anything was decoded."""

    origin: str
    reason: str  # counted in the manifest: a short phrase out of a small set
    detail: str = ""  # what the decoder said; only in dropped.jsonl
    harmless: bool = False  # nothing is wrong with it: such as a copy of another

    def render(self) -> "Drop":
        return self


class Job(Protocol):
    """A picture still to be made. Jobs are pickled to worker processes."""

    def render(self) -> Sample | Drop: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where pictures came from, pinned by content."""

    name: str
    version: str
    sha256: str
    licence: str


class Source(Protocol):
    """A set of pictures that can be built."""

    name: str
    size: int  # pixels a side, or of a square of about the same area
    aspect: Aspect
    repeats: bool  # whether one picture may appear under several captions

    def arguments(self) -> Mapping[str, Any]:
        """The arguments that change what is built."""
        ...

    def provenance(self) -> list[Provenance]:
        """The inputs, pinned. Must not need the network."""
        ...

    def classes(self, captions: Sequence[str]) -> Sequence[str] | None:
        """The classes in order, when the captions (of all samples) are names of classes; None for free text."""
        ...

    def jobs(self) -> list[Job]:
        """All pictures in their final, shuffled order. Raises InputError when there is none."""
        ...
