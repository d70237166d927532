"""Megatron's data parallelism, AdamW and schedule, with one parameter group for each rule of the muP table."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from mpdit.config import Optim
from mpdit.errors import InputError
from mpdit.mup import rules
from mpdit.mup.table import Table, optimizer_groups
from mpdit.parallel import backend
from mpdit.parallel.context import Context
from mpdit.parallel.timers import Timers

_STATES = ("exp_avg", "exp_avg_sq")


class Alone(nn.Module):
    """A stage in fp32 that no other data rank has, in the place of one under DDP: its gradients stay where autograd
    puts them. DDP would clear buffers and add to them, which costs a small step on a CPU 5 to 10 %."""

    def __init__(self, megatron: Any, settings: DistributedDataParallelConfig, stage: nn.Module) -> None:
        super().__init__()
        self.config, self.ddp_config, self.module = megatron, settings, stage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def finish_grad_sync(self, force_all_reduce: bool | None = None) -> None:
        """Megatron asks for it at a step's end; there is nobody to wait for."""


def wrap(ctx: Context, stages: Sequence[nn.Module]) -> list[Any]:
    """The stages under Megatron's DDP, and the hooks of its schedules (gradient and parameter synchronisation)."""
    parallel, megatron = ctx.config.parallel, ctx.megatron
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.timers = Timers() if parallel.pp > 1 else None
    data_ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    if data_ranks == 1 and ctx.dtype is torch.float32 and not parallel.distributed_optimizer:
        return [Alone(megatron, DistributedDataParallelConfig(), stage) for stage in stages]
    overlap, fetch = bool(parallel.overlap_grad_reduce), bool(parallel.overlap_param_gather)
    # Interleaved chunks fetch their parameters when the schedule says so, all stages at the same time; otherwise each
    # bucket does it in its own forward pass.
    align_param_gather = fetch and parallel.vpp > 1
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=fetch,
        align_param_gather=align_param_gather,
        grad_reduce_in_fp32=True,
    )
    chunks = [
        DistributedDataParallel(megatron, settings, stage, disable_bucketing=index > 0)
        for index, stage in enumerate(stages)
    ]
    backend.accumulate_in_buffers(ctx, stages)
    if overlap:
        megatron.no_sync_func = _each(chunks, "no_sync")
        megatron.grad_sync_func = _each(chunks, "start_grad_sync")
        if align_param_gather:
            megatron.param_sync_func = _each(chunks, "start_param_sync")
    return chunks


def gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's sum over the micro-batches so far, of a parameter of a wrapped stage; zeros where it is unused."""
    if hasattr(parameter, "main_grad"):
        return parameter.main_grad
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _each(chunks: list[Any], method: str) -> Any:
    bound = [getattr(chunk, method) for chunk in chunks]
    return bound if len(bound) > 1 else bound[0]


@contextlib.contextmanager
def settled(ctx: Context, chunks: Sequence[Any]) -> Iterator[None]:
    """Within, every rank's parameters are those after the last step, and no forward pass will fetch them again.

    With ``overlap_param_gather`` they arrive only in the next forward pass: whoever reads or replaces them needs this.
    """
    overlap = ctx.config.parallel.overlap_param_gather
    for chunk in chunks if overlap else ():
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in chunks if overlap else ():
            chunk.enable_forward_pre_hook()


def build(ctx: Context, chunks: Sequence[Any], table: Table) -> tuple[Any, OptimizerParamScheduler]:
    """Megatron's optimizer and schedule for wrapped stages.

    Raises InputError for a parameter that is not in the table.
    """
    optim, parallel = ctx.config.optim, ctx.config.parallel
    for chunk in chunks:
        for name, _ in chunk.module.named_parameters():
            if name not in table:
                raise InputError(f"parameter {name} is not in the muP table; the optimizer refuses to guess its rule.")
    beta1, beta2 = rules.betas(ctx.config)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.lr * optim.final_lr_ratio,
            weight_decay=optim.weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip,
            bf16=ctx.dtype is torch.bfloat16,
            params_dtype=ctx.dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_param_gather=bool(parallel.overlap_param_gather),
        ),
        list(chunks),
        config_overrides=_overrides(optim, table),
    )
    for inner in _inner(optimizer):
        _fill_state(inner)
    return optimizer, schedule(ctx.config.optim, ctx.config.train.steps, optimizer)


def _overrides(optim: Optim, table: Table) -> dict[ParamKey, dict[str, float]]:
    """One override a rule. lr_mult multiplies nothing in megatron-core 0.16-0.19: it keeps groups apart by identity."""
    overrides = {}
    for index, (rule, names) in enumerate(optimizer_groups(table).items()):
        members = frozenset(names)
        predicate = ParamWithNamePredicate(
            name=f"rule {index}",
            fn=lambda _, name, members=members: name.removeprefix("module.") in members,
        )
        overrides[ParamKey(with_name_predicate=predicate)] = {
            "max_lr": rule.lr,
            "min_lr": rule.lr * optim.final_lr_ratio,
            "eps": rule.eps,
            "wd_mult": rule.weight_decay / optim.weight_decay if optim.weight_decay else 1.0,
            "lr_mult": 1.0 + index,
        }
    return overrides


def schedule(optim: Optim, steps: int, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron's schedule: linear warm-up from 0, then the style; it scales every group's own peak and final LR."""
    style = {"constant": "constant", "linear": "linear", "cosine": "cosine", "wsd": "WSD"}[optim.schedule]
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.lr * optim.final_lr_ratio,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=max(steps, optim.warmup_steps + 1),
        lr_decay_style=style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=optim.decay_steps,
        lr_wsd_decay_style="linear",
    )


# ---- a step in two halves: whoever looks at the norm may leave the second one out -----------------------------------


def gradient_norm(optimizer: Any) -> Any:
    """The norm of the whole model's reduced gradients, before clipping; collective.

    A float, or a tensor of one number where Megatron leaves it on the device.
    """
    optimizer.prepare_grads()
    return optimizer.get_grad_norm()


def update(optimizer: Any, norm: Any) -> None:
    """Clip by the `norm` that :func:`gradient_norm` has just given, and step: what Megatron's ``step()`` does then."""
    for inner in _inner(optimizer):
        parameters = inner.get_parameters()
        if parameters and inner.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=inner.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()


# ---- state in model space --------------------------------------------------------------------------------------------
# Checkpoints hold fp32 master weights and moments in the shape of the parameters, whatever optimizer, precision or
# data-parallel sharding wrote them; Megatron's own formats tie them to the kind of optimizer.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where a parameter's optimizer state lives. `span`: this data rank's part of the flattened parameter, or None."""

    main: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    span: slice | None
    shards: dist.ProcessGroup | None


def _inner(optimizer: Any) -> list[Any]:
    return [
        o for o in getattr(optimizer, "chained_optimizers", [optimizer]) if getattr(o, "optimizer", None) is not None
    ]


def _fill_state(inner: Any) -> None:
    """AdamW's lazy state, filled now: checkpoints can be written before the first step, loads never allocate."""
    adam = inner.optimizer
    if not isinstance(adam, torch.optim.AdamW):
        inner.init_state_fn(adam, inner.config)
        return
    for group in adam.param_groups:
        # torch's fused AdamW is the faster one on CPU and CUDA; Megatron's fallback does not ask for it.
        group["fused"], group["foreach"] = True, False
        for p in group["params"]:
            state = adam.state[p]
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in _STATES:
                state[key] = torch.zeros_like(p.data)


def slots(optimizer: Any) -> dict[nn.Parameter, Slot]:
    """The optimizer's state by model parameter. Parameters without a part on this data rank are absent."""
    found: dict[nn.Parameter, Slot] = {}
    for inner in _inner(optimizer):
        adam = inner.optimizer
        group_of = {id(p): group for group in adam.param_groups for p in group["params"]}

        def slot(
            main: Tensor, span: slice | None = None, shards: Any = None, adam: Any = adam, of: Any = group_of
        ) -> Slot:
            return Slot(main=main, state=adam.state[main], group=of[id(main)], span=span, shards=shards)

        if hasattr(inner, "model_param_group_index_map"):
            for parameter, (group, order) in inner.model_param_group_index_map.items():
                part = inner._get_model_param_range_map(parameter)["param"]
                main = adam.param_groups[group]["params"][order]
                found[parameter] = slot(main, slice(part.start, part.end), inner.data_parallel_group)
        elif hasattr(inner, "float16_groups"):
            for halves, masters in zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True):
                found.update({half: slot(master) for half, master in zip(halves, masters, strict=True)})
            found.update({p: slot(p) for group in inner.fp32_from_fp32_groups for p in group})
        else:
            found.update({p: slot(p) for group in adam.param_groups for p in group["params"]})
    return found


def _shard_group(ctx: Context) -> dist.ProcessGroup | None:
    if not ctx.config.parallel.distributed_optimizer:
        return None
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def whole_state(
    ctx: Context, chunks: Sequence[Any], optimizer: Any
) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor]]]:
    """(name, parameter, {"param", "exp_avg", "exp_avg_sq"} in its shape, fp32) for every parameter of this rank.

    Collective: under the distributed optimizer the data ranks' parts are summed together. Take one parameter at a
    time: all of them whole are what the optimizer's sharding keeps off the device.
    """
    by_parameter, group = slots(optimizer), _shard_group(ctx)
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            slot = by_parameter.get(parameter)
            tensors = {}
            for key in ("param", *_STATES):
                part = None if slot is None else slot.main if key == "param" else slot.state[key]
                tensors[key] = _join(parameter, part, slot.span if slot else None, group)
            yield name, parameter, tensors


def _join(parameter: nn.Parameter, part: Tensor | None, span: slice | None, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        assert part is not None
        return part.detach().float()
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if part is not None:
        whole[span] = part.detach().float()
    if group.size() > 1:
        dist.all_reduce(whole, group=group)
    return whole.view(parameter.shape)


@torch.no_grad()
def restore(chunks: Sequence[Any], optimizer: Any, tensors: dict[str, dict[str, Tensor]], steps: int) -> None:
    """The inverse of :func:`whole_state`: put name -> tensors back, as they are after `steps` optimizer steps."""
    by_parameter = slots(optimizer)
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            loaded = tensors[name]
            parameter.copy_(loaded["param"])
            slot = by_parameter.get(parameter)
            if slot is None:
                continue
            for key, target in (("param", slot.main), *((k, slot.state[k]) for k in _STATES)):
                source = loaded[key] if slot.span is None else loaded[key].flatten()[slot.span]
                target.copy_(source.view(target.shape))
            if "step" in slot.state:
                slot.state["step"].fill_(steps)
            else:
                slot.group["step"] = steps
