"""Which samples a step trains on: a pure function of the seed and the step, whatever the layout.

A row is the samples of one data set in one bucket, in an endless order: the permutation of epoch 0, then that of epoch
1, and so on. So every sample comes exactly once a pass, and batches may lie across the border of two epochs. Steps take
turns among the buckets, so that all images of a step have one shape, and the places of a bucket's batches among its
rows (:class:`mpdit.data.turns.Turns`). With one row, step s takes its places s·B … (s + 1)·B - 1.

Shapes: B images of the global batch, b images of a micro-batch, N samples.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from mpdit.data.turns import Turns
from mpdit.errors import InputError

VERSION = 1  # part of the hash: raise it when the same inputs give another order


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Samples in order, each with its visit: how often it was drawn before (the epoch, as each epoch has it once)."""

    bucket: int
    sample_ids: np.ndarray  # int64 (B,)
    visits: np.ndarray  # int64 (B,)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def slice(self, start: int, stop: int) -> "Batch":
        return dataclasses.replace(self, sample_ids=self.sample_ids[start:stop], visits=self.visits[start:stop])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """Samples that come equally often."""

    bucket: int
    set: int
    ids: np.ndarray  # int64 (N,), rising
    weight: int  # its part in all places of all batches, beside the other rows' weights


class Plan:
    """The order of a run."""

    def __init__(
        self,
        *,
        shapes: Sequence[tuple[int, int]],
        rows: Sequence[Row],
        batch_size: int,
        seed: int,
        fingerprint: str,
    ) -> None:
        """`shapes`: height and width in pixels of each bucket; `rows`: as :func:`rows` makes them; `batch_size`:
        global; `fingerprint`: of the data, e.g. Shards.fingerprint.

        Raises ValueError without a sample, for a size below 1 or a seed that is no unsigned 64-bit number.
        """
        self.samples = sum(len(row.ids) for row in rows)
        self.batch_size, self.seed, self.fingerprint = batch_size, seed, fingerprint
        if self.samples < 1 or batch_size < 1 or not 0 <= seed < 2**64:
            raise ValueError(f"no plan of {self.samples} samples, batch size {batch_size}, seed {seed}")
        self.shapes = [(int(height), int(width)) for height, width in shapes]  # of the buckets, in pixels
        self._rows = {bucket: [r for r in rows if r.bucket == bucket] for bucket in sorted({r.bucket for r in rows})}
        self._of_steps = Turns([sum(row.weight for row in part) for part in self._rows.values()])
        self._of_places = {bucket: Turns([row.weight for row in part]) for bucket, part in self._rows.items()}
        self._permutations: dict[tuple[int, int], dict[int, np.ndarray]] = {}

    @property
    def hash(self) -> str:
        """SHA-256 in hex over everything that the order depends on. (hash, step) is the position in the data."""
        inputs: list[object] = [VERSION, self.samples, self.batch_size, self.seed, self.fingerprint]
        rows = [row for part in self._rows.values() for row in part]
        if [(row.bucket, row.set) for row in rows] != [(0, 0)]:
            inputs += [[row.bucket, row.set, row.weight, _hash_ids(row)] for row in rows]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def epoch(self, step: int) -> float:
        """How many times as many images as there are samples were trained on before step `step`."""
        return step * self.batch_size / self.samples

    def bucket(self, step: int) -> int:
        """The number of the bucket that all samples of step `step` are of."""
        return self._turn(step)[0]

    def height_width(self, step: int) -> tuple[int, int]:
        """In pixels, of every image of step `step`."""
        return self.shapes[self.bucket(step)]

    def batch(self, step: int) -> Batch:
        """The global batch of step `step` (from 0); needs no call for an earlier step."""
        bucket, nth = self._turn(step)
        row_B, place_B = self._of_places[bucket].take(nth * self.batch_size, self.batch_size)
        ids_B, visits_B = np.empty_like(place_B), np.empty_like(place_B)
        for number, row in enumerate(self._rows[bucket]):
            mine_B = row_B == number
            if mine_B.any():
                ids_B[mine_B], visits_B[mine_B] = self._draw(row, place_B[mine_B])
        return Batch(bucket=bucket, sample_ids=ids_B, visits=visits_B)

    def local(self, step: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[Batch]:
        """The micro-batches (b = `micro_batch`) of a data-parallel rank: rows r·B/dp … (r + 1)·B/dp - 1, in order.

        Raises InputError when the global batch does not divide evenly, ValueError for a rank that is not there.
        """
        share = self.share(dp_size, micro_batch)
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"no data-parallel rank {dp_rank} of {dp_size}")
        batch, start = self.batch(step), dp_rank * share
        return [batch.slice(first, first + micro_batch) for first in range(start, start + share, micro_batch)]

    def share(self, dp_size: int, micro_batch: int) -> int:
        """Images a rank gets of each batch. Raises InputError when the global batch does not divide evenly."""
        if dp_size < 1 or self.batch_size % dp_size:
            raise InputError(
                f"train.batch_size is {self.batch_size}, which {dp_size} data-parallel ranks can't share equally: "
                f"it should be a multiple of {dp_size}."
            )
        share = self.batch_size // dp_size
        if micro_batch < 1 or share % micro_batch:
            raise InputError(
                f"parallel.micro_batch is {micro_batch}, but should divide the {share} images that a rank has "
                f"(train.batch_size {self.batch_size} over {dp_size} data-parallel ranks)."
            )
        return share

    def stand_in(self, bucket: int, sample: int, visit: int, attempt: int) -> int:
        """A sample to read in the place of one that is bad: of its row, evenly drawn by (seed, sample, visit, attempt).

        From attempt `ROW_ATTEMPTS` on (its row seems to be bad altogether) any sample of the data.
        """
        name = f"{self.seed}/stand-in/{sample}/{visit}/{attempt}"
        drawn = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        if attempt >= ROW_ATTEMPTS:
            return drawn % self.samples
        (ids,) = (row.ids for row in self._rows[bucket] if _holds(row.ids, sample))
        return int(ids[drawn % len(ids)])

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps it had before."""
        if step < 0:
            raise ValueError(f"no batch of step {step}")
        numbers, nths = self._of_steps.take(step, 1)
        return [*self._rows][numbers[0]], int(nths[0])

    def _draw(self, row: Row, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and visits at rising places of a row."""
        visits, within = np.divmod(places, len(row.ids))
        epochs = range(int(visits[0]), int(visits[-1]) + 1)
        order = np.concatenate([self._permutation(row, epoch)[within[visits == epoch]] for epoch in epochs])
        return row.ids[order], visits

    def _permutation(self, row: Row, epoch: int) -> np.ndarray:
        """int64 (N,). By sorting raw Philox output: numpy keeps that stream, but not Generator.permutation's."""
        cache = self._permutations.setdefault((row.bucket, row.set), {})
        found = cache.get(epoch)
        if found is None:
            key, counter = [self.seed, epoch], [0, 0, row.set, row.bucket]
            stream = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))
            found = np.argsort(stream.random_raw(len(row.ids)), kind="stable").astype(np.int64, copy=False)
            for old in [*cache][:-1]:  # two stay, for batches that lie across the border
                cache.pop(old, None)
            cache[epoch] = found
        return found


ROW_ATTEMPTS = 32  # how many stand-ins are of the same row; half of it may be bad and 1 in 4 billion need more


def rows(bucket_N: np.ndarray, sets: Sequence[int], weights: Sequence[float] = ()) -> list[Row]:
    """The rows of samples that are numbered set after set: `bucket_N` their buckets, `sets` how many each set has.

    `weights`: each set's part in the batches, above 0; empty: as many as it has samples.
    """
    parts: list[tuple[int, int, np.ndarray, Fraction]] = []
    ends = np.cumsum([0, *sets]).tolist()
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        each = Fraction(weights[number]) / (end - start) if weights else Fraction(1)  # a sample's weight
        for bucket in np.unique(bucket_N[start:end]).tolist():
            ids = start + np.flatnonzero(bucket_N[start:end] == bucket)
            parts.append((bucket, number, ids, each * len(ids)))
    whole = math.lcm(*(weight.denominator for *_, weight in parts))
    common = math.gcd(*(int(weight * whole) for *_, weight in parts))
    return [
        Row(bucket=bucket, set=number, ids=ids, weight=int(weight * whole) // common)
        for bucket, number, ids, weight in parts
    ]


def _holds(ids: np.ndarray, sample: int) -> bool:
    place = int(np.searchsorted(ids, sample))
    return place < len(ids) and int(ids[place]) == sample


def _hash_ids(row: Row) -> str:
    return hashlib.sha256(row.ids.astype("<i8").tobytes()).hexdigest()
