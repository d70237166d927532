"""A place in a job that is not there: Megatron's groups of any layout in this one process, tensors without memory.

For whoever wants to know what a rank would hold, compute and send, before there are ranks: collectives return at once
and move nothing (torch's "fake" backend), tensors have shapes and types but no numbers (FakeTensorMode).
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mpdit.config import Config, Parallel
from mpdit.errors import InputError


def with_own_layers(config: Config) -> Config:
    """`config` with this project's own layers, not compiled, in the place of Transformer Engine's, which GPUs alone can
    have. Names, shapes, shards and roles are the same."""
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, backend="local", compile=False))


@contextlib.contextmanager
def rank_of(parallel: Parallel, *, stage: int = 0, tensor: int = 0, context: int = 0) -> Iterator[FakeTensorMode]:
    """Within, this process is the rank with these coordinates in a job of one data-parallel rank, on fake tensors
    (what is yielded turns real ones into them).

    Raises InputError if this process is a rank of a real job.
    """
    if dist.is_initialized():
        raise InputError("a layout can be imagined only where no ranks have been started.")
    # Megatron numbers ranks with tensor parallelism fastest, then context, then stages.
    rank = (stage * parallel.cp + context) * parallel.tp + tensor
    world = parallel.tp * parallel.cp * parallel.pp
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tp,
            parallel.pp,
            parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        with FakeTensorMode() as mode:
            yield mode
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def group_names() -> dict[str, str]:
    """What torch calls the groups of this rank in the operators that it sees: name -> tp | cp."""
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
    }
    return {group.group_name: kind for kind, group in groups.items()}
