"""The read side of a sharded checkpoint: Megatron's dist_checkpointing, into any layout. Loading runs no code."""

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mpdit.errors import InputError
from mpdit.parallel.init import sharded_dim

# What a checkpoint's metadata is made of: data classes and enums. Everything else is refused.
_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        *(
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
        ),
        *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "BytesIOWriteData", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
}


def tensor(key: str, value: Tensor, like: Tensor) -> Any:
    """`value`, which lies in the layout as `like` does, under a name that is the same in every layout."""
    dim = sharded_dim(like)
    if dim is not None:
        return make_tp_sharded_tensor_for_checkpoint(value, key, tp_axis=dim)
    return make_sharded_tensor_for_checkpoint(value, key)


def load(tensors: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Read what `tensors` names, in this layout; collective.

    Raises InputError for a metadata file that holds anything but metadata. Code in the place of data is not run: torch
    raises its own CheckpointException then.
    """
    refuse_code(folder / ".metadata")
    with _bytes_run_no_code():
        return dist_checkpointing.load(dict(tensors), str(folder))


class Stored:
    """The tensors of a checkpoint, whole and one at a time, without a layout. Raises InputError as :func:`load`."""

    def __init__(self, folder: Path) -> None:
        refuse_code(folder / ".metadata")
        self.folder = folder
        self._reader = CachedMetadataFileSystemReader(str(folder))
        found = self._reader.read_metadata().state_dict_metadata
        self.shapes = {key: tuple(one.size) for key, one in found.items() if isinstance(one, TensorStorageMetadata)}

    def read(self, key: str) -> Tensor:
        """Any tensor of the checkpoint, fp32."""
        value = torch.empty(self.shapes[key])
        with _bytes_run_no_code(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist says
            checkpoint.load({key: value}, storage_reader=self._reader, no_dist=True)
        return value


@contextlib.contextmanager
def _bytes_run_no_code() -> Iterator[None]:
    """torch reads entries for bytes (megatron-core 0.19 has one) with plain pickle; within, as weights only."""

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        name, loaded = read_item.dest_index.fqn, torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    planner: Any = default_planner.DefaultLoadPlanner
    plain, planner.load_bytes = planner.load_bytes, load_bytes
    try:
        yield
    finally:
        planner.load_bytes = plain


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        raise InputError(f"holds {module}.{name}, which is no checkpoint metadata; it may run code and is refused")


def refuse_code(path: Path) -> None:
    """torch reads .metadata with plain pickle; so it is read here first, with nothing allowed but its own classes."""
    try:
        _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except InputError as error:
        raise InputError(f"{path}: {error}.") from None
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise InputError(f"{path}: is no checkpoint metadata ({error}); use another checkpoint.") from error
