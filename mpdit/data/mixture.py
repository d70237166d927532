"""Several data sets as one: their samples numbered set after set, and the plan by which they are trained on."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from mpdit.config import Config, Data
from mpdit.data import buckets
from mpdit.data.plan import Plan, rows
from mpdit.data.shards import BadSample, Shards
from mpdit.errors import InputError


class Mixture:
    """One split of the data sets of a run; sample ids are 0 … len - 1, those of ``data.path`` first."""

    def __init__(self, sets: Sequence[Shards]) -> None:
        """`sets`: at least one. Use :meth:`open`."""
        self.sets = tuple(sets)
        self._firsts = np.cumsum([0] + [len(part) for part in sets])
        self.sizes = np.concatenate([part.sizes for part in sets])  # int64 (samples, 2): height, width as stored
        fingerprints = [part.fingerprint for part in sets]
        self.fingerprint = fingerprints[0]
        if len(sets) > 1:
            self.fingerprint = hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()

    @classmethod
    def open(cls, data: Data, split: str) -> "Mixture":
        """The split of ``data.path`` and of each folder of ``data.more``.

        Raises InputError as :func:`check` and :meth:`Shards.open` do, and under ``data.text`` labels for sets whose
        classes are not the same, in the same order.
        """
        check(data)
        sets = [Shards.open(folder, split) for folder in (data.path, *data.more)]
        for other in sets[1:]:
            if data.text == "labels" and other.classes != sets[0].classes:
                raise InputError(
                    f"data.more: {other.folder} has other classes than {sets[0].folder}, so that one number would mean "
                    "two things; build both with the same classes in the same order."
                )
        return cls(sets)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read(self, sample: int) -> tuple[bytes, str]:
        """The encoded image and the caption. Raises as :meth:`Shards.read` does, with the sample's number here."""
        part, own = self._place(sample)
        try:
            return part.read(own)
        except BadSample as error:
            raise BadSample(sample, error.where, error.reason) from error

    def caption(self, sample: int) -> str:
        """The caption, without the white space around it. Raises as :meth:`read` does."""
        part, own = self._place(sample)
        try:
            return part.caption(own)
        except BadSample as error:
            raise BadSample(sample, error.where, error.reason) from error

    def where(self, sample: int) -> str:
        """The sample's tar and member name, for messages."""
        part, own = self._place(sample)
        return part.where(own)

    def plan(self, config: Config) -> Plan:
        """The order in which a run of `config` goes through the samples."""
        shapes = buckets.of_config(config)
        bucket_N = buckets.nearest_bucket(self.sizes, shapes)
        return Plan(
            shapes=shapes,
            rows=rows(bucket_N, [len(part) for part in self.sets], config.data.weights),
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            fingerprint=self.fingerprint,
        )

    def _place(self, sample: int) -> tuple[Shards, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        number = int(np.searchsorted(self._firsts, sample, side="right")) - 1
        return self.sets[number], sample - int(self._firsts[number])


def check(data: Data) -> None:
    """Raises InputError when ``data.more`` and ``data.weights`` don't fit together; opens nothing."""
    sets = 1 + len(data.more)
    if data.weights and len(data.weights) != sets:
        raise InputError(
            f"data.weights has {len(data.weights)} numbers, but should have {sets}, one for data.path and each of "
            "data.more, or none."
        )
    for number, weight in enumerate(data.weights):
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"data.weights[{number}] is {weight}, but should be more than 0, or the set left out.")
