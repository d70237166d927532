"""Micro-batches without pictures, for ranks that have all they need of them in caches."""

import numpy as np
import torch

from mpdit.data.loader import MicroBatch, Reader, good, walk
from mpdit.data.mixture import Mixture
from mpdit.data.plan import Plan
from mpdit.data.quarantine import Bad

_NOTHING = torch.empty(0)


class Undecoded:
    """As mpdit.data.loader.Loader: the same samples step after step, but `images` is an empty tensor."""

    def __init__(
        self,
        shards: Mixture,
        plan: Plan,
        *,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        start_step: int,
        pictures: bool,
    ) -> None:
        """`pictures`: whether another rank decodes them, so that what it takes for a bad sample is one here too."""
        self._reader, self._plan = Reader(shards, pictures=pictures), plan
        self._positions = walk(plan, start_step, dp_rank, dp_size, micro_batch)

    def next(self) -> MicroBatch:
        """The next micro-batch. Raises InputError when a bad sample finds no good one to stand in for it."""
        step, batch = next(self._positions)
        read_ids, _, captions = good(self._reader, self._plan, batch)
        return MicroBatch(
            step=step,
            images=_NOTHING,
            captions=captions,
            sample_ids=torch.from_numpy(np.array(batch.sample_ids)),
            visits=torch.from_numpy(np.array(batch.visits)),
            read_ids=torch.tensor(read_ids),
        )

    def take_bad(self) -> list[Bad]:
        """As :meth:`Loader.take_bad`."""
        return self._reader.take_bad()

    def close(self) -> None:
        """Nothing is open."""
