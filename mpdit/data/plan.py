"""Which samples a step trains on: a pure function of the seed and the step, whatever the layout.

The order is one endless row: the permutation of epoch 0, then that of epoch 1, and so on. Step s takes the places
s·B … (s + 1)·B - 1, so every sample comes exactly once an epoch and batches may lie across the border of two epochs.

Shapes: B images of the global batch, b images of a micro-batch.
"""

import dataclasses
import hashlib
import json

import numpy as np

from mpdit.errors import InputError

VERSION = 1  # part of the hash: raise it when the same inputs give another order


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Samples in order, each with its visit: how often it was drawn before (the epoch, as each epoch has it once)."""

    sample_ids: np.ndarray  # int64 (B,)
    visits: np.ndarray  # int64 (B,)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def slice(self, start: int, stop: int) -> "Batch":
        return Batch(sample_ids=self.sample_ids[start:stop], visits=self.visits[start:stop])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The order of a run. Raises ValueError for a size below 1 or a seed that is no unsigned 64-bit number."""

    samples: int
    batch_size: int  # global
    seed: int
    fingerprint: str  # of the data, e.g. Shards.fingerprint
    _permutations: dict[int, np.ndarray] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1 or not 0 <= self.seed < 2**64:
            raise ValueError(f"no plan of {self.samples} samples, batch size {self.batch_size}, seed {self.seed}")

    @property
    def hash(self) -> str:
        """SHA-256 in hex over everything that the order depends on. (hash, step) is the position in the data."""
        inputs = [VERSION, self.samples, self.batch_size, self.seed, self.fingerprint]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def epoch(self, step: int) -> float:
        """How many times the data has been gone through before step `step`."""
        return step * self.batch_size / self.samples

    def batch(self, step: int) -> Batch:
        """The global batch of step `step` (from 0); needs no call for an earlier step."""
        if step < 0:
            raise ValueError(f"no batch of step {step}")
        places_B = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        visits_B, within_B = np.divmod(places_B, self.samples)
        epochs = range(int(visits_B[0]), int(visits_B[-1]) + 1)
        ids_B = np.concatenate([self._permutation(epoch)[within_B[visits_B == epoch]] for epoch in epochs])
        return Batch(sample_ids=ids_B, visits=visits_B)

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

    def _permutation(self, epoch: int) -> np.ndarray:
        """int64 (samples,). By sorting raw Philox output: numpy keeps that stream, but not Generator.permutation's."""
        cache = self._permutations
        found = cache.get(epoch)
        if found is None:
            raw = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.samples)
            found = np.argsort(raw, kind="stable").astype(np.int64, copy=False)
            for old in [*cache][:-1]:  # two stay, for batches that lie across the border
                cache.pop(old, None)
            cache[epoch] = found
        return found
