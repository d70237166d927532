"""A layout's step on a machine: memory, time, bubble, traffic, MFU. Pure arithmetic over what pieces.py measured."""

import dataclasses
from collections.abc import Sequence

from mpdit.config import Config
from mpdit.data.buckets import Size
from mpdit.parallel import fp8_rules
from mpdit.parallel.record import Work
from mpdit.train.pieces import Chunk, Part
from mpdit_tools.plan import memory, timeline
from mpdit_tools.plan.gpus import Machine
from mpdit_tools.plan.memory import Memory
from mpdit_tools.plan.timeline import Timeline

# Bytes of a parameter's own numbers that AdamW reads and writes in a step, under fp32 and bf16: gradient, weight, two
# moments (each read and written), and under bf16 the fp32 weight beside them.
_ADAM_BYTES = {"fp32": 4 + 8 + 16, "bf16": 4 + 8 + 16 + 2}
_AVERAGE_BYTES = {
    "fp32": 4 + 8,
    "bf16": 2 + 4 + 4 + 8,
}  # the weight read (a fp32 copy made), the average read and written


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that the busiest GPU sends in a step, by the kind of parallelism."""

    tensor: int
    context: int
    pipeline: int
    data: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Of one training step. FLOPs count a multiply-add as two."""

    gpus: int
    data_ranks: int
    micro_batches: int  # a data-parallel rank's
    parameters: int  # of the whole model
    rank_parameters: tuple[int, ...]  # a GPU's, by pipeline rank
    model_flops: int  # forward and backward of the whole batch, nothing computed twice
    rank_flops: tuple[int, ...]  # a GPU's, by pipeline rank: with recompute, and what every tensor rank repeats
    memory: tuple[Memory, ...]  # a GPU's, by pipeline rank
    timeline: Timeline
    traffic: Traffic
    data_s: float  # of gradients' and weights' exchange, what no computing hides
    update_s: float  # of the optimizer, the averaged weights, and weights' FP8 copies
    peak_flops_s: float
    bucket_flops: dict[Size, int] = dataclasses.field(default_factory=dict)  # an image's; all else is the largest's

    @property
    def step_s(self) -> float:
        return self.timeline.seconds + self.data_s + self.update_s

    @property
    def flops_s(self) -> float:
        """Model FLOPs a second and GPU, as papers and NeMo report them."""
        return self.model_flops / self.step_s / self.gpus

    @property
    def mfu(self) -> float:
        return self.flops_s / self.peak_flops_s

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs the most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].peak)


def estimate(config: Config, chunks: Sequence[Chunk], whole: Sequence[Part], gpus: int, machine: Machine) -> Estimate:
    """The step of `config`, resolved for `gpus` ranks. Its network is `chunks` in its layout, `whole` on one rank."""
    parallel = config.parallel
    model_ranks = parallel.tp * parallel.cp * parallel.pp
    data_ranks = gpus // model_ranks
    micro_batches = config.train.batch_size // data_ranks // parallel.micro_batch
    spans = {"tp": parallel.tp, "cp": parallel.tp * parallel.cp, "other": gpus}
    seconds = {
        (chunk.index, kind): sum(machine.seconds(work, spans) for work in _works(chunk, kind, config))
        for chunk in chunks
        for kind in ("forward", "backward")
    }
    packed = max(chunk.sent_bytes for chunk in chunks)
    hop_s = packed / machine.link_bytes_s(span=_pipeline_span(config, data_ranks)) if packed else 0.0
    line = timeline.simulate(parallel, micro_batches, lambda task: seconds[task.chunk, task.kind], hop_s)
    mine = [[chunk for chunk in chunks if chunk.index % parallel.pp == rank] for rank in range(parallel.pp)]
    counts = tuple(sum(chunk.parameters for chunk in own) for own in mine)
    return Estimate(
        gpus=gpus,
        data_ranks=data_ranks,
        micro_batches=micro_batches,
        parameters=sum(sum(part.parameters.values()) for part in whole),
        rank_parameters=counts,
        model_flops=data_ranks * micro_batches * sum(p.piece.forward.flops + p.piece.backward.flops for p in whole),
        rank_flops=tuple(
            micro_batches
            * sum(w.flops for chunk in own for k in ("forward", "backward") for w in _works(chunk, k, config))
            for own in mine
        ),
        memory=tuple(memory.of_rank(config, chunks, rank, micro_batches, data_ranks) for rank in range(parallel.pp)),
        timeline=line,
        traffic=_traffic(config, mine, micro_batches, data_ranks, max(counts)),
        data_s=_exposed(config, machine, line, max(counts), data_ranks),
        update_s=_update_s(config, machine, max(counts), data_ranks)
        + machine.memory_seconds(2 * max(sum(chunk.copies_bytes for chunk in own) for own in mine)),
        peak_flops_s=machine.peak_flops_s,
    )


def _works(chunk: Chunk, kind: str, config: Config) -> list[Work]:
    """What a pass through the chunk runs; under recompute a backward pass runs its blocks' forward passes again."""
    if kind == "forward":
        return [part.piece.forward for part in chunk.parts]
    again = [
        part.piece.forward for part in chunk.parts if part.piece.name == "block" and config.parallel.recompute == "full"
    ]
    return again + [part.piece.backward for part in chunk.parts]


def _pipeline_span(config: Config, data_ranks: int) -> int:
    """Megatron numbers stages slowest: neighbours lie a whole stage's ranks apart."""
    parallel = config.parallel
    return 2 * parallel.tp * parallel.cp * data_ranks


def _data_bytes(config: Config, parameters: int, data_ranks: int) -> int:
    """Sent by a GPU in a step: gradients summed in fp32, weights gathered where the optimizer is distributed."""
    ranks = data_ranks * config.parallel.cp
    sent = 1 - 1 / ranks
    if not config.parallel.distributed_optimizer:
        return round(2 * 4 * parameters * sent)
    return round((4 + (2 if fp8_rules.stored(config.parallel.precision) == "bf16" else 4)) * parameters * sent)


def _traffic(config: Config, mine: list[list[Chunk]], micro_batches: int, data_ranks: int, parameters: int) -> Traffic:
    def most(group: str) -> int:
        return max(
            micro_batches
            * sum(
                work.sent_bytes(group)
                for chunk in own
                for kind in ("forward", "backward")
                for work in _works(chunk, kind, config)
            )
            for own in mine
        )

    crossing = max(sum(chunk.sent_bytes + chunk.received_bytes for chunk in own) for own in mine)
    return Traffic(
        tensor=most("tp"),
        context=most("cp"),
        pipeline=micro_batches * crossing,  # activations on, gradients back
        data=_data_bytes(config, parameters, data_ranks),
    )


def _exposed(config: Config, machine: Machine, line: Timeline, parameters: int, data_ranks: int) -> float:
    """Seconds of the data-parallel exchange that nothing hides: with overlap, what a pass of computing leaves over."""
    parallel = config.parallel
    took = _data_bytes(config, parameters, data_ranks) / machine.link_bytes_s(
        span=parallel.tp * parallel.cp * data_ranks
    )
    last = line.ranks[0][-1]
    hidden = 0.0
    if parallel.overlap_grad_reduce:
        hidden += last.end_s - last.begin_s
    if parallel.overlap_param_gather:
        first = line.ranks[0][0]
        hidden += first.end_s - first.begin_s
    return max(0.0, took - hidden)


def _update_s(config: Config, machine: Machine, parameters: int, data_ranks: int) -> float:
    precision = fp8_rules.stored(config.parallel.precision)
    shards = data_ranks * config.parallel.cp if config.parallel.distributed_optimizer else 1
    return machine.memory_seconds(parameters * _ADAM_BYTES[precision] / shards + parameters * _AVERAGE_BYTES[precision])
