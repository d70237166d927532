"""Sharded checkpoints in Megatron's dist_checkpointing format, loadable into any layout. Loading runs no code (law 8)."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from mpdit.errors import InputError

# What torch's checkpoint metadata is made of. Everything else in the pickle is refused.
_METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_METADATA_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "slice"),
    ("builtins", "set"),
    ("_codecs", "encode"),
    ("pathlib", "PosixPath"),
    ("torch.utils._pytree", "TreeSpec"),
}


def tensor(key: str, value: Tensor, parameter: nn.Parameter) -> Any:
    """`value`, which lies in the layout as `parameter` does, under a name that is the same in every layout."""
    if getattr(parameter, "tensor_model_parallel", False):
        return make_tp_sharded_tensor_for_checkpoint(value, key, tp_axis=parameter.partition_dim)
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
        dtype = module == "torch" and (name.startswith(("float", "bfloat", "int", "uint")) or name == "bool")
        if module in _METADATA_MODULES or (module, name) in _METADATA_NAMES or dtype:
            return super().find_class(module, name)
        raise InputError(f"holds {module}.{name}, which is no checkpoint metadata; it may run code and is refused")


def refuse_code(path: Path) -> None:
    """torch reads .metadata with plain pickle; so it is read here first, with nothing allowed but its own classes."""
    try:
        _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except InputError as error:
        raise InputError(f"{path}: {error}.") from None
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: is no checkpoint metadata ({error}); use another checkpoint.") from error
