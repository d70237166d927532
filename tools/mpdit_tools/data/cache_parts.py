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

from mpdit.config import Data, Objective
from mpdit.data import cache
from mpdit.data.buckets import nearest_bucket
from mpdit.data.decode import decode
from mpdit.data.encoders import Encoder
from mpdit.data.latents import Autoencoder
from mpdit.data.mixture import Mixture
from mpdit.data.shards import BadSample
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

    data: Data
    split: str
    shapes: tuple[tuple[int, int], ...]  # heights and widths in pixels, of the buckets
    channels: int
    mirror: bool

    def batches(self, first: int, count: int) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
        """(samples, [B, C, Y, X] in [-1, 1]) of one shape at a time; with `mirror`, the same mirrored beside them."""
        shards = _shards(self.data, self.split)
        bucket_N = nearest_bucket(shards.sizes[first : first + count], self.shapes)
        for start in range(0, count, _AT_ONCE):
            near = bucket_N[start : start + _AT_ONCE]
            for bucket in np.unique(near).tolist():
                samples = (first + start + np.flatnonzero(near == bucket)).tolist()
                yield samples, [self._decoded(shards, samples, bucket, flip) for flip in self._flips]

    @property
    def _flips(self) -> tuple[bool, ...]:
        return (False, True) if self.mirror else (False,)

    def _decoded(self, shards: Mixture, samples: list[int], bucket: int, mirrored: bool) -> torch.Tensor:
        try:
            encoded = [shards.read(sample)[0] for sample in samples]
        except BadSample as error:
            raise _unusable(error) from error
        return decode(
            encoded,
            *self.shapes[bucket],
            channels=self.channels,
            mirrored=np.full(len(samples), mirrored),
            names=[shards.where(sample) for sample in samples],
            device=accel.device(),
        )


def _unusable(error: BadSample) -> InputError:
    """The sentence for a damaged sample. Training takes another in its place, but a cache holds what each one gives."""
    return InputError(f"{error.where}: {error.reason}; copy the tar again or build the data set again.")


def _in_order(found: dict[int, list[Row]]) -> Iterator[Row]:
    for sample in sorted(found):
        yield from found[sample]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """Moments [M, H, W] of each picture."""

    pictures: Pictures
    folder: str

    def rows(self, first: int, count: int) -> Iterator[Row]:
        autoencoder, found = _autoencoder(self.folder), dict[int, list[Row]]()
        for samples, variants in self.pictures.batches(first, count):
            moments = [autoencoder.moments(images_BCYX).cpu().numpy() for images_BCYX in variants]
            for sample, *of_one in zip(samples, *moments, strict=True):
                found[sample] = [(moments_MHW, moments_MHW.shape) for moments_MHW in of_one]
        return _in_order(found)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """A teacher's features [S, F] of each picture, rounded to fp16."""

    pictures: Pictures
    objective: Objective
    patch: int  # pixels a side that a vector stands for

    def rows(self, first: int, count: int) -> Iterator[Row]:
        teacher, found = _teacher(self.objective, self.patch, self.pictures.channels), dict[int, list[Row]]()
        for samples, variants in self.pictures.batches(first, count):
            features = [teacher.features(images_BCYX).transpose(0, 1).half() for images_BCYX in variants]
            if not all(x.isfinite().all() for x in features):
                raise InputError(
                    f"objective.repa_teacher {self.objective.repa_teacher}: gives more than fp16 can hold."
                )
            for sample, *of_one in zip(samples, *(x.cpu().numpy() for x in features), strict=True):
                found[sample] = [(features_SF, features_SF.shape) for features_SF in of_one]
        return _in_order(found)


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


def captions_of(shards: Mixture) -> Iterator[str]:
    """Each sample's. Raises InputError for a damaged one."""
    try:
        yield from map(shards.caption, range(len(shards)))
    except BadSample as error:
        raise _unusable(error) from error


@functools.lru_cache(maxsize=1)
def _shards(data: Data, split: str) -> Mixture:
    return Mixture.open(data, split)


@functools.lru_cache(maxsize=1)
def _autoencoder(folder: str) -> Autoencoder:
    return Autoencoder.open(folder)


@functools.lru_cache(maxsize=1)
def _teacher(objective: Objective, patch: int, channels: int) -> Teacher:
    return Teacher.open(objective, patch, channels, accel.device())


@functools.lru_cache(maxsize=1)
def _encoder(kind: str, model: str | None) -> Encoder:
    return Encoder.open(kind, model)
