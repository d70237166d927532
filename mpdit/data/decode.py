"""Encoded images to tensors, by NVIDIA DALI: on the CPU, or on the GPU when one is given.

Shapes: B images of a micro-batch, C channels, H x W pixels. Tensors are float32 in [-1, 1].
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from mpdit.data.plan import Batch, Plan
from mpdit.data.shards import Shards
from mpdit.errors import InputError

Mirror = Callable[[np.ndarray, np.ndarray], np.ndarray]  # sample ids, visits, both int64 (B,) -> bool (B,)
_Inputs = tuple[
    list[np.ndarray], np.ndarray, np.ndarray
]  # encoded; float32 (B, 2) heights, widths; int32 (B,) mirrored


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """What a rank trains on at once."""

    step: int
    images: torch.Tensor  # float32 (B, C, H, W) in [-1, 1], on the loader's device
    captions: list[str]
    sample_ids: torch.Tensor  # int64 (B,), on the CPU
    visits: torch.Tensor  # int64 (B,), on the CPU


class Loader:
    """The micro-batches of one data-parallel rank, step after step without end, decoded ahead in the background.

    The images are the same bits for any `workers`, `micro_batch` and `dp_size`. Where a run left off is `start_step`
    alone. Threads start in the constructor: build a loader in the process that uses it, not before a fork.
    """

    def __init__(
        self,
        shards: Shards,
        plan: Plan,
        *,
        micro_batch: int,
        image_size: int | tuple[int, int],
        dp_rank: int = 0,
        dp_size: int = 1,
        channels: int = 3,
        mirror: Mirror | None = None,
        workers: int = 1,
        device: torch.device | str | None = None,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        """`image_size`: pixels a side, or (height, width); `mirror`: which images to flip left to right; `device`: a
        CUDA device decodes there; `prefetch`: micro-batches decoded ahead.

        Raises InputError when `plan` does not divide over the ranks or for `channels` other than 1 (gray) and 3 (RGB),
        ValueError when it is not a plan of these shards.
        """
        if (plan.samples, plan.fingerprint) != (len(shards), shards.fingerprint):
            raise ValueError("the plan is of other shards")
        plan.share(dp_size, micro_batch)
        self._shards, self._plan, self._mirror = shards, plan, mirror
        self._layout = (dp_rank, dp_size, micro_batch)
        self._height_width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._positions = self._walk(start_step)
        self._pending: collections.deque[_Pending] = collections.deque()
        self._pid = os.getpid()
        self._decoder = _Decoder(
            self._feed, micro_batch, self._height_width, channels, workers, device, max(prefetch, 1) + 1
        )

    def next(self) -> MicroBatch:
        """The next micro-batch. Raises InputError that names sample and shard when an image can't be decoded."""
        if os.getpid() != self._pid:
            raise RuntimeError("this loader was built in another process; its threads did not survive the fork")
        try:
            images_BCHW = self._decoder.run()
        except RuntimeError as error:
            self._blame(error)
            raise
        pending = self._pending.popleft()
        return MicroBatch(
            step=pending.step,
            images=images_BCHW,
            captions=pending.captions,
            sample_ids=torch.from_numpy(pending.batch.sample_ids.copy()),
            visits=torch.from_numpy(pending.batch.visits.copy()),
        )

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

    def _walk(self, step: int) -> Iterator[tuple[int, Batch]]:
        while True:
            for batch in self._plan.local(step, *self._layout):
                yield step, batch
            step += 1

    def _feed(self) -> _Inputs:
        """DALI's source: called in the caller's thread, some micro-batches ahead of the one that comes out."""
        step, batch = next(self._positions)
        encoded, captions = zip(*(self._shards.read(sample) for sample in batch.sample_ids.tolist()), strict=True)
        self._pending.append(_Pending(step=step, batch=batch, captions=list(captions)))
        mirrored_B = (
            np.zeros(len(batch), bool) if self._mirror is None else self._mirror(batch.sample_ids, batch.visits)
        )
        return _inputs(encoded, self._height_width, mirrored_B)

    def _blame(self, error: RuntimeError) -> None:
        """Raise InputError for the image that made DALI give up; return when every image is fine by itself."""
        for pending in self._pending:
            for sample in pending.batch.sample_ids.tolist():
                encoded, _ = self._shards.read(sample)
                if _is_damaged(encoded):
                    raise InputError(
                        f"{self._shards.where(sample)}: the image of sample {sample} is damaged or no image; "
                        f"rebuild the data set."
                    ) from error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pending:
    """A micro-batch that DALI has been given and has not given back."""

    step: int
    batch: Batch
    captions: list[str]


def decode(
    encoded: Sequence[bytes],
    height: int,
    width: int,
    *,
    channels: int = 3,
    mirrored: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    workers: int = 1,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Decode a list of images as :class:`Loader` does: float32 (B, C, H, W) in [-1, 1], on `device`.

    `mirrored`: bool (B,), images to flip; `names`: what to call them in messages. Raises InputError for an image that
    can't be decoded.
    """
    if not encoded:
        return torch.empty((0, channels, height, width), device=device)
    mirrored_B = np.zeros(len(encoded), bool) if mirrored is None else mirrored
    starts = range(0, len(encoded), most := min(len(encoded), 64))
    chunks = ((encoded[i : i + most], (height, width), mirrored_B[i : i + most]) for i in starts)
    decoder = _Decoder(lambda: _inputs(*next(chunks)), most, (height, width), channels, workers, device, 1)
    try:
        return torch.cat([decoder.run() for _ in starts])
    except RuntimeError as error:
        for number, image in enumerate(encoded):
            if _is_damaged(image):
                name = f"image {number} of {len(encoded)}" if names is None else names[number]
                raise InputError(f"{name}: is damaged or no image; it should be PNG, JPEG or WebP.") from error
        raise
    finally:
        decoder.close()


# ---- DALI ------------------------------------------------------------------------------------------------------------


@pipeline_def
def _graph(source: Callable[[], _Inputs], channels: int, decode_on: str) -> Any:
    """Decode, resize until both sides are large enough, cut out the middle, scale bytes to [-1, 1]."""
    encoded, height_width, mirrored = fn.external_source(
        source, num_outputs=3, batch=True, dtype=[types.UINT8, types.FLOAT, types.INT32], ndim=[1, 1, 0]
    )
    # never ANY_DATA: DALI 2.4 crashes on a grayscale JPEG then
    kind = {1: types.GRAY, 3: types.RGB}[channels]
    images = fn.decoders.image(encoded, device=decode_on, output_type=kind)
    images = fn.resize(images, size=height_width, mode="not_smaller", antialias=True)
    return fn.crop_mirror_normalize(
        images,
        crop=height_width,
        mirror=mirrored,
        mean=[127.5] * channels,
        std=[127.5] * channels,
        dtype=types.FLOAT,
        output_layout="CHW",
    )


class _Decoder:
    """A DALI pipeline that pulls from `source` and gives tensors; `depth` batches are under way at a time."""

    def __init__(
        self,
        source: Callable[[], _Inputs],
        batch: int,
        height_width: tuple[int, int],
        channels: int,
        threads: int,
        device: torch.device | str | None,
        depth: int,
    ) -> None:
        if channels not in (1, 3):
            raise InputError(f"model.channels is {channels}, but images are decoded to 1 (gray) or 3 (RGB) channels.")
        where = torch.device("cpu" if device is None else device)
        on_gpu = where.type == "cuda"
        if on_gpu and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        self._device = where
        self._pipeline = _graph(
            source,
            channels,
            "mixed" if on_gpu else "cpu",
            batch_size=batch,
            num_threads=max(threads, 1),
            device_id=where.index if on_gpu else None,  # with an id DALI looks for a GPU, even for CPU operators
            prefetch_queue_depth=depth,
        )
        self._pipeline.build()

    def run(self) -> torch.Tensor:
        """float32 (B, C, H, W), the caller's own copy. Raises RuntimeError when an image can't be decoded."""
        if self._pipeline is None:
            raise ValueError("the loader is closed")
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (outputs,) = self._pipeline.run(stream)
        dense = outputs.as_tensor()
        images_BCHW = torch.empty(dense.shape(), dtype=torch.float32, device=self._device)
        return feed_ndarray(dense, images_BCHW, cuda_stream=stream)

    def close(self) -> None:
        self._pipeline = None  # DALI joins its threads when the last reference goes


def _inputs(encoded: Sequence[bytes], height_width: tuple[int, int], mirrored_B: np.ndarray) -> _Inputs:
    size_B2 = np.tile(np.array(height_width, np.float32), (len(encoded), 1))
    return [np.frombuffer(image, np.uint8) for image in encoded], size_B2, mirrored_B.astype(np.int32)


def _is_damaged(image: bytes) -> bool:
    decoder = _Decoder(lambda: _inputs([image], (1, 1), np.zeros(1, bool)), 1, (1, 1), 3, 1, None, 1)
    try:
        decoder.run()
    except RuntimeError:
        return True
    finally:
        decoder.close()
    return False
