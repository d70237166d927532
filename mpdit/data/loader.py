"""The micro-batches of a run: read, replaced where they are bad, and decoded ahead in the background.

Shapes: B images of a micro-batch, C channels, H x W pixels of the step's bucket.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from mpdit.data import decode
from mpdit.data.mixture import Mixture
from mpdit.data.plan import ROW_ATTEMPTS, Batch, Plan
from mpdit.data.quarantine import Bad
from mpdit.data.shards import BadSample, Shards
from mpdit.errors import InputError

Mirror = Callable[[np.ndarray, np.ndarray], np.ndarray]  # sample ids, visits, both int64 (B,) -> bool (B,)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """What a rank trains on at once.

    A sample that can't be used gives its place to another one's pixels and caption (`read_ids`), but its id and visit
    stay the key of all that is drawn for the place.
    """

    step: int
    images: torch.Tensor  # float32 (B, C, H, W) in [-1, 1], on the loader's device
    captions: list[str]
    sample_ids: torch.Tensor  # int64 (B,), on the CPU
    visits: torch.Tensor  # int64 (B,), on the CPU
    read_ids: torch.Tensor  # int64 (B,), on the CPU: whose pixels and captions these are


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pending:
    """A micro-batch that DALI has been given and has not given back."""

    step: int
    batch: Batch
    captions: list[str]
    read_ids: list[int]


class Loader:
    """The micro-batches of one data-parallel rank, step after step without end, decoded ahead in the background.

    The images are the same bits for any `workers`, `micro_batch` and `dp_size`, and so are the replacements of bad
    samples: the first good one of a row of candidates that (seed, sample id, visit) alone determine. Where a run left
    off is `start_step` alone. Threads start in the constructor: build a loader in the process that uses it, not before
    a fork.
    """

    def __init__(
        self,
        shards: Shards | Mixture,
        plan: Plan,
        *,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        factor: int = 1,
        channels: int = 3,
        mirror: Mirror | None = None,
        workers: int = 1,
        device: torch.device | str | None = None,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        """`factor`: pixels a side of what the plan counts as one; `mirror`: which images to flip left to right;
        `device`: a CUDA device decodes there; `prefetch`: how many micro-batches are decoded ahead.

        Raises InputError when `plan` does not divide over the ranks or for `channels` other than 1 (gray) and 3 (RGB),
        ValueError when it is not a plan of these shards.
        """
        if (plan.samples, plan.fingerprint) != (len(shards), shards.fingerprint):
            raise ValueError("the plan is of other shards")
        plan.share(dp_size, micro_batch)
        self._reader, self._plan, self._mirror = Reader(shards), plan, mirror
        self._micro_batch, self._factor = micro_batch, factor
        self._channels, self._workers, self._device, self._depth = channels, workers, device, max(prefetch, 1) + 1
        self._positions = walk(plan, start_step, dp_rank, dp_size, micro_batch)
        self._pending: collections.deque[_Pending] = collections.deque()
        self._pid = os.getpid()
        self._decoder = self._start()

    def next(self) -> MicroBatch:
        """The next micro-batch.

        Raises InputError when a bad sample finds no good one to stand in for it, and the decoder's RuntimeError where
        no sample is to blame.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("this loader was built in another process; its threads did not survive the fork")
        while True:
            try:
                images_BCHW = self._decoder.run()
                break
            except RuntimeError:
                if not self._set_aside():
                    raise
        pending = self._pending.popleft()
        return MicroBatch(
            step=pending.step,
            images=images_BCHW,
            captions=pending.captions,
            sample_ids=torch.from_numpy(pending.batch.sample_ids.copy()),
            visits=torch.from_numpy(pending.batch.visits.copy()),
            read_ids=torch.tensor(pending.read_ids),
        )

    def take_bad(self) -> list[Bad]:
        """The bad samples found since the last call, each once; some are of micro-batches still to come."""
        return self._reader.take_bad()

    def close(self) -> None:
        """Stop the threads and free the buffers; may be called twice."""
        self._decoder.close()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    __next__ = next

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> decode.Decoder:
        return decode.Decoder(self._feed, self._micro_batch, self._channels, self._workers, self._device, self._depth)

    def _feed(self) -> decode.Inputs:
        """DALI's source: called in the caller's thread, some micro-batches ahead of the one that comes out."""
        step, batch = next(self._positions)
        read_ids, encoded, captions = good(self._reader, self._plan, batch)
        self._pending.append(_Pending(step=step, batch=batch, captions=captions, read_ids=read_ids))
        mirrored_B = (
            np.zeros(len(batch), bool) if self._mirror is None else self._mirror(batch.sample_ids, batch.visits)
        )
        height, width = self._plan.shapes[batch.bucket]
        return decode.inputs(encoded, (height * self._factor, width * self._factor), mirrored_B)

    def _set_aside(self) -> bool:
        """Find the images that made DALI give up, and feed it once more, without them; False if every image is fine."""
        samples = [sample for pending in self._pending for sample in pending.read_ids]
        if not self._reader.set_aside(samples, self._channels, self._device):
            return False
        again = [(pending.step, pending.batch) for pending in self._pending]
        self._positions = itertools.chain(again, self._positions)
        self._pending.clear()
        self._decoder.close()
        self._decoder = self._start()
        return True


def walk(plan: Plan, step: int, dp_rank: int, dp_size: int, micro_batch: int) -> Iterator[tuple[int, Batch]]:
    """(step, samples) of a rank's micro-batches from `step` on, without end."""
    while True:
        for batch in plan.local(step, dp_rank, dp_size, micro_batch):
            yield step, batch
        step += 1


def good(reader: "Reader", plan: Plan, batch: Batch) -> tuple[list[int], list[bytes], list[str]]:
    """Ids, encoded images and captions of a micro-batch's samples, or of the first stand-in that is good.

    Raises InputError when a bad sample finds none.
    """
    pairs = zip(batch.sample_ids.tolist(), batch.visits.tolist(), strict=True)
    ids, encoded, captions = zip(*(_good(reader, plan, batch.bucket, *pair) for pair in pairs), strict=True)
    return list(ids), list(encoded), list(captions)


def _good(reader: "Reader", plan: Plan, bucket: int, sample: int, visit: int) -> tuple[int, bytes, str]:
    if (found := reader.read(sample)) is not None:
        return sample, *found
    for attempt in range(2 * ROW_ATTEMPTS):
        other = plan.stand_in(bucket, sample, visit, attempt)
        if (found := reader.read(other)) is not None:
            return other, *found
    raise InputError(reader.despair(sample, f"none of {2 * ROW_ATTEMPTS} others"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fixed:
    """What :func:`fixed` has found."""

    images: torch.Tensor  # float32 (B, C, H, W) in [-1, 1]; empty where no pictures are wanted
    captions: list[str]
    read_ids: np.ndarray  # int64 (B,)
    bad: list[Bad]


def fixed(
    shards: Shards | Mixture,
    samples: Sequence[int],
    height_width: tuple[int, int] | None,
    *,
    channels: int = 3,
    device: torch.device | str | None = None,
) -> Fixed:
    """Images and captions of certain samples, as :class:`Loader` decodes them, and the bad ones that were met.

    In the place of a bad sample comes the next good one of the set: the same whenever and wherever it is asked.
    `height_width` None: captions alone. Raises InputError when there is no good sample.
    """
    reader, images_BCHW = Reader(shards, pictures=height_width is not None), torch.empty(0)
    while True:
        found = [reader.next_good(sample) for sample in samples]
        ids, captions = [sample for sample, *_ in found], [caption for *_, caption in found]
        try:
            if height_width is not None:
                encoded = [image for _, image, _ in found]
                images_BCHW = decode.decode(encoded, *height_width, channels=channels, device=device)
        except InputError:
            if not reader.set_aside(ids, channels, device):
                raise
        else:
            return Fixed(images=images_BCHW, captions=captions, read_ids=np.array(ids), bad=reader.take_bad())


class Reader:
    """Reads samples and keeps account of the bad ones. It spares a second look: what is good never depends on it."""

    def __init__(self, shards: Shards | Mixture, *, pictures: bool = True) -> None:
        """`pictures`: whether images are read, and a sample with a damaged one is bad."""
        self._shards, self._pictures = shards, pictures
        self._bad: dict[int, Bad] = {}
        self._untold: list[Bad] = []

    def read(self, sample: int) -> tuple[bytes, str] | None:
        """Encoded image (empty without pictures) and caption; None for a sample that can't be used."""
        if sample in self._bad:
            return None
        try:
            if not self._pictures:
                return b"", self._shards.caption(sample)
            encoded, caption = self._shards.read(sample)
        except BadSample as error:
            self._note(sample, error.where, error.reason)
            return None
        height, width = self._shards.sizes[sample].tolist()
        if (fault := decode.header_fault(encoded, (height, width))) is not None:
            self._note(sample, self._shards.where(sample), fault)
            return None
        return encoded, caption

    def next_good(self, sample: int) -> tuple[int, bytes, str]:
        """The sample or the first after it, and after the last the first, that is not known to be bad."""
        for other in itertools.chain(range(sample, len(self._shards)), range(sample)):
            if (found := self.read(other)) is not None:
                return other, *found
        raise self.despair(sample, "no other")

    def set_aside(self, samples: Iterable[int], channels: int, device: torch.device | str | None) -> bool:
        """Whether any of these samples is bad, or can't be decoded and from now on is."""
        samples = list(dict.fromkeys(samples))
        readable = [(sample, found[0]) for sample in samples if (found := self.read(sample)) is not None]
        for number in decode.damaged([encoded for _, encoded in readable], channels, device):
            sample, _ = readable[number]
            self._note(sample, self._shards.where(sample), "image can't be decoded")
        return not self._bad.keys().isdisjoint(samples)

    def take_bad(self) -> list[Bad]:
        """The bad samples found since the last call, each once."""
        told, self._untold = self._untold, []
        return told

    def despair(self, sample: int, others: str) -> InputError:
        """The sentence for a bad sample that nothing can stand in for."""
        bad = self._bad[sample]
        return InputError(
            f"{bad.where}: sample {sample} can't be used ({bad.reason}), and {others} can stand in for it; "
            f"{len(self._bad)} bad samples were met. Copy the tars again or build the data set again."
        )

    def _note(self, sample: int, where: str, reason: str) -> None:
        self._bad[sample] = Bad(sample=sample, where=where, reason=reason)
        self._untold.append(self._bad[sample])
