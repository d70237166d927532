"""The parts of a cache: what a process computes at a time. The same bytes for any number of processes.

Shapes: B samples, Y x X pixels, M moments of a latent pixel, S tokens, F features.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mpdit.config import Objective
from mpdit.data import cache
from mpdit.data.decode import decode
from mpdit.data.encoders import Encoder
from mpdit.data.latents import Autoencoder
from mpdit.data.shards import Shards
from mpdit.errors import InputError
from mpdit.objective.repa import Teacher
from mpdit.parallel import accel

_AT_ONCE = 16  # pictures decoded and looked at together: part of what makes a cache's bytes

Row = tuple[np.ndarray, tuple[int, ...]]  # numbers, and the dimensions they are found with


class Work(Protocol):
    """How the rows of a cache come about; it can be sent to another process."""

    def rows(self, first: int, count: int) -> Iterator[Row]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Part `number` of a cache that is built in `folder`."""

    folder: Path
    number: int
    first: int  # sample or caption
    count: int
    work: Work

    def run(self) -> int:
        """Write it. Raises InputError for a picture that can't be decoded or a number that fp16 can't hold."""
        torch.set_num_threads(1)  # sums of several threads may be rounded in another order
        rows, dimensions = zip(*self.work.rows(self.first, self.count), strict=True)
        cache.write_part(self.folder, self.number, rows, dimensions)
        return self.count


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Pictures of a split as training decodes them."""

    path: str
    split: str
    side: int  # pixels
    channels: int
    mirror: bool

    def batches(self, first: int, count: int) -> Iterator[list[torch.Tensor]]:
        """[B, C, Y, X] in [-1, 1], some samples at a time; with `mirror`, the same mirrored beside them."""
        shards = _shards(self.path, self.split)
        for start in range(first, first + count, _AT_ONCE):
            samples = range(start, min(start + _AT_ONCE, first + count))
            encoded = [shards.read(sample)[0] for sample in samples]
            names = [shards.where(sample) for sample in samples]
            yield [
                decode(
                    encoded,
                    self.side,
                    self.side,
                    channels=self.channels,
                    mirrored=np.full(len(samples), mirrored),
                    names=names,
                    device=accel.device(),
                )
                for mirrored in ((False, True) if self.mirror else (False,))
            ]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """Moments [M, H, W] of each picture."""

    pictures: Pictures
    folder: str

    def rows(self, first: int, count: int) -> Iterator[Row]:
        autoencoder = _autoencoder(self.folder)
        for variants in self.pictures.batches(first, count):
            moments = [autoencoder.moments(images_BCYX).cpu().numpy() for images_BCYX in variants]
            for of_one in zip(*moments, strict=True):
                yield from ((moments_MHW, moments_MHW.shape) for moments_MHW in of_one)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """A teacher's features [S, F] of each picture, rounded to fp16."""

    pictures: Pictures
    objective: Objective
    grid: int

    def rows(self, first: int, count: int) -> Iterator[Row]:
        teacher = _teacher(self.objective, self.grid, self.pictures.channels)
        for variants in self.pictures.batches(first, count):
            features = [teacher.features(images_BCYX).transpose(0, 1).half() for images_BCYX in variants]
            if not all(x.isfinite().all() for x in features):
                raise InputError(
                    f"objective.repa_teacher {self.objective.repa_teacher}: gives more than fp16 can hold."
                )
            for of_one in zip(*(x.cpu().numpy() for x in features), strict=True):
                yield from ((features_SF, features_SF.shape) for features_SF in of_one)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The states of each caption's tokens, without padding, and its pooled vector behind them; found with (tokens,)."""

    captions: Sequence[str]  # of this part
    kind: str
    model: str | None
    tokens: int

    def rows(self, first: int, count: int) -> Iterator[Row]:
        """`first` and `count` say which these captions are among all."""
        given = _encoder(self.kind, self.model).text(self.captions, self.tokens)
        pooled_BP = np.empty((count, 0), np.float16) if given.pooled_BP is None else given.pooled_BP
        for states_LF, pooled_P in zip(given.tokens_BL, pooled_BP, strict=True):
            real = states_LF[(states_LF != 0).any(-1)]
            yield np.concatenate([real.reshape(-1), pooled_P]), (len(real),)


@functools.lru_cache(maxsize=1)
def _shards(path: str, split: str) -> Shards:
    return Shards.open(path, split)


@functools.lru_cache(maxsize=1)
def _autoencoder(folder: str) -> Autoencoder:
    return Autoencoder.open(folder)


@functools.lru_cache(maxsize=1)
def _teacher(objective: Objective, grid: int, channels: int) -> Teacher:
    return Teacher.open(objective, grid, channels, accel.device())


@functools.lru_cache(maxsize=1)
def _encoder(kind: str, model: str | None) -> Encoder:
    return Encoder.open(kind, model)
