"""The write side of a sharded checkpoint: torch's distributed format, laid out without touching a disk.

`dist_checkpointing.save` plans, writes and finishes in one piece, on the training's own thread or through processes
that it forks. Here a rank lays its files out in memory, and who writes them is another matter. The result is read by
``dist_checkpointing.load`` of any megatron-core (0.16 and 0.19 write formats that differ; this one both read).

Of tensors that several data-parallel ranks hold, each rank writes a share of about the same size.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mpdit.parallel import groups, sharded

FILE_BYTES = 2**30  # a file is closed once it is larger: whoever verifies reads several at a time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box out of a tensor of the whole model."""

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a chunk lies: bytes `start` to `start + size` of a file of the checkpoint."""

    chunk: Chunk
    file: str
    start: int
    size: int


class Stream(Protocol):
    """What :func:`put` writes to: a file, or an :class:`Image`."""

    def write(self, data: Any, /) -> int: ...
    def tell(self) -> int: ...
    def flush(self) -> None: ...


class Image:
    """Files in memory, end to end in one anonymous file that another process can map. Its pages stay for the next time.

    Raises OSError when the machine has no memory for it.
    """

    def __init__(self) -> None:
        # Not in /dev/shm, which containers keep at 64 MB. Systems other than Linux have a file without a name for it.
        self.fd = os.memfd_create("checkpoint") if hasattr(os, "memfd_create") else _nameless_file()
        self.clear()

    def clear(self) -> None:
        """Forget the files, keep the memory."""
        self.files: dict[str, tuple[int, int]] = {}  # name: first byte, bytes
        self._name, self._start, self._end = "", 0, 0

    def open(self, name: str) -> None:
        """What is written from now on is the file `name`."""
        self._name, self._start = name, self._end
        self.files[name] = (self._start, 0)

    def add(self, name: str, data: bytes) -> None:
        self.open(name)
        self.write(data)

    def tell(self) -> int:
        return self._end - self._start

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        size, done = len(view), 0
        while done < size:
            done += os.pwrite(self.fd, view[done:], self._end + done)
        self._end += size
        self.files[self._name] = (self._start, self.tell())
        return size

    def flush(self) -> None:
        """torch.save calls it; nothing is held back."""

    def close(self) -> None:
        os.close(self.fd)


def _nameless_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Shares:
    """Who of `ranks` equals writes what: the next one goes to the one with least so far. The same on each of them."""

    def __init__(self, ranks: int) -> None:
        self._bytes = [0] * ranks

    def owner(self, size: int) -> int:
        rank = self._bytes.index(min(self._bytes))
        self._bytes[rank] += size
        return rank


def pack(tensors: Iterable[tuple[str, Tensor, Tensor]], rank: int, image: Image) -> list[Place]:
    """This rank's share of (key, value, what lies in the layout as it does), copied into `image`; where each lies.

    Collective if `tensors` is.

    Raises OSError when memory is out, after `tensors` is exhausted: the other ranks go through it too.
    """
    places: list[Place] = []
    shares, trouble, files = Shares(groups.replicas()), None, 0
    for key, value, like in tensors:
        described = sharded.tensor(key, value, like)
        *model_ranks, data_rank = described.replica_id
        if any(model_ranks) or shares.owner(value.nbytes) != data_rank or trouble is not None:
            continue
        chunk = Chunk(
            key=key, whole=described.global_shape, offset=described.global_offset, shape=described.local_shape
        )
        try:
            if not places or image.tell() >= FILE_BYTES:
                name, files = file_name(rank, files), files + 1
                image.open(name)
            places.append(put(image, name, chunk, value))
        except OSError as error:
            trouble = error
    if trouble is not None:
        raise trouble
    return places


def file_name(rank: int, index: int) -> str:
    return f"__{rank}_{index}.distcp"


def put(stream: Stream, file: str, chunk: Chunk, value: Tensor) -> Place:
    """Append `value` to `stream`, which is the file `file`."""
    value = value.detach()
    if value.is_cuda:  # torch keeps freed pinned memory for the next one
        value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
    if value.untyped_storage().nbytes() != value.nbytes or not value.is_contiguous():
        value = value.clone(memory_format=torch.contiguous_format)  # a view would take all that it is a view of along
    start = stream.tell()
    with _without_crc():
        torch.save(value, stream)  # type: ignore[arg-type]
    return Place(chunk=chunk, file=file, start=start, size=stream.tell() - start)


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """The manifest's SHA-256 covers every byte; torch's own CRC32 would make the copy several times slower."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def index_files(places: Sequence[Place]) -> dict[str, bytes]:
    """name -> bytes of the files that say what lies where, of all ranks' places.

    Raises ValueError if the chunks are not the whole of each tensor, once.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    left: dict[str, int] = {}
    for place in places:
        chunk = place.chunk
        if chunk.key not in tensors:
            properties = TensorProperties(dtype=torch.float32)
            tensors[chunk.key] = TensorStorageMetadata(properties, torch.Size(chunk.whole), [])
            left[chunk.key] = math.prod(chunk.whole)
        chunks = tensors[chunk.key].chunks
        index = MetadataIndex(chunk.key, chunk.offset, len(chunks))
        if index in storage:
            raise ValueError(f"{chunk.key} has two chunks at {chunk.offset}")
        chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)))
        storage[index] = _StorageInfo(place.file, place.start, place.size)
        left[chunk.key] -= math.prod(chunk.shape)
    wrong = [key for key, missing in left.items() if missing]
    if wrong:
        raise ValueError(f"the chunks of {wrong[0]} do not make up the whole")
    common = io.BytesIO()
    torch.save({}, common)
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{backend}_version": 1 for backend in backends}
    return {
        ".metadata": pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=storage)),  # type: ignore[arg-type]
        "common.pt": common.getvalue(),
        "metadata.json": json.dumps(backends | versions).encode(),
    }
