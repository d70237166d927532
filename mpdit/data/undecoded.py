"""Micro-batches without pictures, for runs that have all they need of them in caches: only captions are read."""

from collections.abc import Iterator

import numpy as np
import torch

from mpdit.data.decode import MicroBatch
from mpdit.data.plan import Plan
from mpdit.data.shards import Shards

_NOTHING = torch.empty(0)


class Undecoded:
    """As mpdit.data.decode.Loader: the same samples step after step, but `images` is an empty tensor."""

    def __init__(
        self, shards: Shards, plan: Plan, *, micro_batch: int, dp_rank: int, dp_size: int, start_step: int
    ) -> None:
        self._shards, self._plan, self._layout = shards, plan, (dp_rank, dp_size, micro_batch)
        self._positions = self._walk(start_step)

    def next(self) -> MicroBatch:
        """The next micro-batch. Raises InputError when a caption can't be read."""
        return next(self._positions)

    def close(self) -> None:
        """Nothing is open."""

    def _walk(self, step: int) -> Iterator[MicroBatch]:
        while True:
            for batch in self._plan.local(step, *self._layout):
                yield MicroBatch(
                    step=step,
                    images=_NOTHING,
                    captions=[self._shards.caption(sample) for sample in batch.sample_ids.tolist()],
                    sample_ids=torch.from_numpy(np.array(batch.sample_ids)),
                    visits=torch.from_numpy(np.array(batch.visits)),
                )
            step += 1
