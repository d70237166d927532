"""Sharded checkpoints in Megatron's dist_checkpointing format, loadable into any layout. Loading runs no code."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from mpdit.errors import InputError
from mpdit.parallel.init import sharded_dim

# What the metadata of a checkpoint of tensors is made of: data classes and enums. Everything else is refused, also the
# entries for bytes, which torch would load with plain pickle.
_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
}


def tensor(key: str, value: Tensor, parameter: nn.Parameter) -> Any:
    """`value`, which lies in the layout as `parameter` does, under a name that is the same in every layout."""
    dim = sharded_dim(parameter)
    if dim is not None:
        return make_tp_sharded_tensor_for_checkpoint(value, key, tp_axis=dim)
    return make_sharded_tensor_for_checkpoint(value, key)


def save(tensors: Mapping[str, Any], folder: Path) -> None:
    """Write sharded tensors into an empty folder; collective."""
    dist_checkpointing.save(dict(tensors), str(folder))


def load(tensors: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Read what `tensors` names, in this layout; collective.

    Raises InputError for a metadata file that holds anything but metadata.
    """
    refuse_code(folder / ".metadata")
    return dist_checkpointing.load(dict(tensors), str(folder))


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
