"""Megatron's pipeline schedules (none, 1F1B, interleaved) around this project's stages."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor, nn

from mpdit.config import Parallel
from mpdit.parallel import accel
from mpdit.parallel.context import Context
from mpdit.parallel.stages import Crossing, Stage

LossFunction = Callable[[Tensor, Any], Tensor]


class Task(NamedTuple):
    """A pass of one micro-batch through one chunk of the network; chunks are numbered in depth order."""

    kind: Literal["forward", "backward"]
    chunk: int
    micro_batch: int


def order(parallel: Parallel, stage: int, micro_batches: int) -> list[Task]:
    """What pipeline rank `stage` does, in turn, for `micro_batches` of a step, in Megatron's schedules.

    Some forward passes to fill the pipeline, then one forward and one backward in turns, then what is left of the
    backward passes (1F1B: Narayanan et al., arXiv 2104.04473; megatron-core pipeline_parallel/schedules.py).
    """
    pp, vpp = parallel.pp, parallel.vpp
    if vpp == 1:
        forward = [Task("forward", stage, m) for m in range(micro_batches)]
        backward = [Task("backward", stage, m) for m in range(micro_batches)]
        ahead = pp - stage - 1
    else:
        table = get_schedule_table(micro_batches, vpp, pp)
        forward = [Task("forward", v * pp + stage, m) for m, v in table]
        backward = [Task("backward", (vpp - 1 - v) * pp + stage, m) for m, v in table]
        ahead = (pp - stage - 1) * 2 + (vpp - 1) * pp
    ahead = min(ahead, len(forward))
    tasks = forward[:ahead]
    for pair in zip(forward[ahead:], backward, strict=False):
        tasks += pair
    return tasks + backward[len(forward) - ahead :]


def forward_backward(
    ctx: Context,
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[Any],
    loss_function: LossFunction,
    crossing: Crossing,
    *,
    forward_only: bool = False,
) -> float:
    """Run the micro-batches through the pipeline; gradients end in the chunks' buffers.

    A micro-batch has ``inputs`` for the network and whatever `loss_function(prediction, micro_batch)` needs: a mean
    over this context rank's tokens. `crossing` is that of the one shape that all their images have. Returns the mean
    loss over micro-batches, data and context ranks, on every rank.
    """
    # Megatron divides the main loss by the number of micro-batches; an auxiliary one never comes by there.
    share = 0.0 if forward_only else 1 / len(micro_batches)
    for chunk in chunks if share else ():
        _stage(chunk).auxiliary_losses.clear()
    return _mean(ctx, _losses(ctx, chunks, micro_batches, loss_function, crossing, share))


def each_loss(
    ctx: Context,
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[Any],
    loss_function: LossFunction,
    crossing: Crossing,
) -> Tensor:
    """The loss of each micro-batch, fp32 [data ranks, micro-batches], on every rank; without gradients, collective."""
    with torch.no_grad():
        losses = _losses(ctx, chunks, micro_batches, loss_function, crossing, 0.0)
    parallel = ctx.config.parallel
    group = parallel_state.get_data_parallel_group()
    found = torch.zeros(group.size(), len(micro_batches), device=accel.device())
    if losses:
        found[group.rank()] = torch.stack(losses).float() / (parallel.tp * parallel.cp)
    dist.all_reduce(found)
    return found


def _losses(
    ctx: Context,
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[Any],
    loss_function: LossFunction,
    crossing: Crossing,
    share: float,
) -> list[Tensor]:
    """Of this rank's micro-batches, on the last stage; none on others. `share` 0: without gradients."""

    def forward_step(iterator: Iterator[Any], stage: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        micro_batch = next(iterator)

        def loss(prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value = loss_function(prediction, micro_batch)
            # Megatron multiplies by cp and DDP averages over data x context ranks. It divides in place: so a clone.
            return value / ctx.config.parallel.cp, {"loss": value.detach().clone()}

        return stage(micro_batch.inputs, crossing, share=share), loss

    reported = _run(ctx, chunks, micro_batches, forward_step, crossing, forward_only=not share)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return [r["loss"] for r in reported] if last else []


def auxiliary_loss(ctx: Context, chunks: Sequence[nn.Module]) -> float:
    """The mean auxiliary loss, without its weight, of the last :func:`forward_backward` with gradients; collective.

    Over micro-batches, data and context ranks, on every rank; 0 if there is none.
    """
    return _mean(ctx, [loss for chunk in chunks for loss in _stage(chunk).auxiliary_losses])


def _stage(chunk: Any) -> Stage:
    """The stage under DDP, if it is."""
    return chunk if isinstance(chunk, Stage) else chunk.module


def _mean(ctx: Context, losses: list[Tensor]) -> float:
    """Of the losses that the ranks of one stage have; other stages have none."""
    mean = torch.stack(losses).mean() if losses else torch.zeros((), device=accel.device())
    mean = mean.float() / (dist.get_world_size() / ctx.config.parallel.pp)
    dist.all_reduce(mean)
    return mean.item()


@torch.no_grad()
def predict(
    ctx: Context, chunks: Sequence[nn.Module], micro_batches: Sequence[Any], crossing: Crossing
) -> list[Tensor]:
    """The network's prediction [S, B, K] for each micro-batch, whole, on every rank of the model."""

    def forward_step(iterator: Iterator[Any], stage: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        return stage(next(iterator).inputs, crossing), lambda prediction, non_loss_data: prediction

    outputs = _run(ctx, chunks, micro_batches, forward_step, crossing, True, collect_non_loss_data=True)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        shapes = [(crossing.rows, m.size, crossing.features) for m in micro_batches]
        outputs = [torch.empty(shape, dtype=ctx.dtype, device=accel.device()) for shape in shapes]
    for output in outputs:
        dist.broadcast(
            output,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
    return [_gather_context(output) for output in outputs]


def _gather_context(tokens_SBP: Tensor) -> Tensor:
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return tokens_SBP
    whole = [torch.empty_like(tokens_SBP) for _ in range(group.size())]
    dist.all_gather(whole, tokens_SBP.contiguous(), group=group)
    return torch.cat(whole)


def _run(
    ctx: Context,
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[Any],
    forward_step: Callable[..., Any],
    crossing: Crossing,
    forward_only: bool,
    **options: Any,
) -> list[Any]:
    # Each chunk of an interleaved schedule walks through the micro-batches on its own.
    iterators = [iter(micro_batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=crossing.sequence_length,
        micro_batch_size=micro_batches[0].size,
        forward_only=forward_only,
        **options,
    )
