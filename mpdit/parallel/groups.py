"""Process groups: the world, and Megatron's tensor-, pipeline-, context- and data-parallel groups within it."""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mpdit.config import Parallel
from mpdit.errors import CheckFailed, InputError
from mpdit.parallel import accel, shared_gpu

T = TypeVar("T")
U = TypeVar("U")


def world_size() -> int:
    """Ranks of this job, as torchrun says; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def data_parallel_size(parallel: Parallel, world: int) -> int:
    """Ranks left for data parallelism. Raises InputError if the layout does not divide the world."""
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if world % model_ranks:
        raise InputError(
            f"parallel: tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = {model_ranks} ranks do not divide the "
            f"{world} that were started; start a multiple of {model_ranks}, or change the layout."
        )
    return world // model_ranks


def start(parallel: Parallel, seed: int, timeout_s: float = 600.0) -> None:
    """Join the world (unless the caller already did) and make Megatron's groups for this layout."""
    if parallel.share_gpu:
        shared_gpu.use()
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        backend = accel.collective_backend(parallel.share_gpu)
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:  # not under torchrun: a world of one, without a port
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def started() -> bool:
    """Whether this process is in the groups of a layout."""
    return bool(parallel_state.is_initialized())


def leave_layout() -> None:
    """Leave this layout's groups but not the world: :func:`start` may then make another's."""
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leave the groups and the world."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def barrier() -> None:
    dist.barrier()


def agree(values: Sequence[int]) -> list[int]:
    """The largest of each of some small whole numbers over all ranks, on every rank."""
    flags = torch.tensor(values, dtype=torch.int64, device=accel.device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [int(flag) for flag in flags.tolist()]


def meeting_place() -> Any:
    """A connection of its own to the world's key-value store, for another thread than the one that trains."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def sum_over_data(value: int) -> int:
    """The sum of a whole number (below 2^48) over the data-parallel ranks of this place in the model."""
    total = torch.tensor([value], dtype=torch.int64, device=accel.device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return int(total.item())


def data_rank() -> int:
    return int(parallel_state.get_data_parallel_rank())


def data_size() -> int:
    return int(parallel_state.get_data_parallel_world_size())


def replica_rank() -> int:
    """This rank's number among those that hold the same parameters: of data and context parallelism."""
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def replicas() -> int:
    """Ranks that hold the same part of the model as this one."""
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def join_replicas(part: torch.Tensor) -> torch.Tensor:
    """Flat parts of equal size of the ranks that hold the same parameters, joined, on every one of them."""
    whole = part.new_empty(part.numel() * replicas())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_gather_into_tensor(whole, part, group=group)
    return whole


def is_first_stage() -> bool:
    return bool(parallel_state.is_pipeline_first_stage(ignore_virtual=True))


def is_last_stage() -> bool:
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def gather_over_stages(value: Any) -> list[Any]:
    """`value` of every pipeline rank that shares this rank's place in its stage, in stage order."""
    group = parallel_state.get_pipeline_model_parallel_group()
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_objects_over_data(value: Any) -> list[Any]:
    """`value` of every data-parallel rank of this place in the model, in rank order."""
    group = parallel_state.get_data_parallel_group()
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def decided_by_rank_0(decide: Callable[[], Any]) -> Any:
    """What `decide()` returns on rank 0, on every rank; an InputError or CheckFailed there is raised on all."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [decide()]
        except (InputError, CheckFailed) as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], InputError | CheckFailed):
        raise box[0]
    return box[0]


def decided_together(value: T, decide: Callable[[list[T]], U]) -> U:
    """What `decide` makes of every rank's `value`, in rank order, on rank 0; on every rank."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return decided_by_rank_0(lambda: decide(values or []))


def gather_over_data(value: torch.Tensor) -> torch.Tensor:
    """Tensors of equal shape from all data-parallel ranks, joined along dim 0, on every rank."""
    group = parallel_state.get_data_parallel_group()
    parts = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts)
