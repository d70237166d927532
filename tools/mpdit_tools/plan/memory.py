"""Bytes that each pipeline rank of a layout holds: what lies there all the time, and what the schedule piles up."""

import dataclasses
from collections.abc import Iterator, Sequence

from mpdit.config import Config
from mpdit.parallel import fp8_rules
from mpdit.parallel.schedule import Task, order
from mpdit.train.pieces import Chunk, Part

OTHER_BYTES = 3 * 2**30  # assumed: CUDA context, NCCL's and cuBLAS's buffers, what the allocator can't use


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Of one pipeline rank, in bytes.

    `weights` has FP8 copies of them in it, `saved` is what autograd keeps for backward passes when most micro-batches
    are under way, `received` the tensors between stages that are kept beside it, `working` what the passes themselves
    need on top at the peak.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    saved: int
    received: int
    working: int
    averaging: int  # of the averaged weights' update, after the passes
    other: int = OTHER_BYTES

    @property
    def peak(self) -> int:
        """Passes and update follow one another: the larger counts."""
        lasting = self.weights + self.gradients + self.optimizer + self.ema + self.other
        return lasting + max(self.saved + self.received + self.working, self.averaging)


def of_rank(config: Config, chunks: Sequence[Chunk], stage: int, micro_batches: int, data_ranks: int) -> Memory:
    """What pipeline rank `stage` holds; `chunks` are the whole pipeline's, `data_ranks` the copies of the model."""
    parallel = config.parallel
    mine = {chunk.index: chunk for chunk in chunks if chunk.index % parallel.pp == stage}
    count = sum(chunk.parameters for chunk in mine.values())
    half = fp8_rules.stored(parallel.precision) == "bf16"
    shards = data_ranks * parallel.cp if parallel.distributed_optimizer else 1
    saved, received, working = _schedule(config, mine, order(parallel, stage, micro_batches))
    return Memory(
        weights=count * (2 if half else 4) + sum(chunk.copies_bytes for chunk in mine.values()),
        gradients=count * 4,  # Megatron's buffer, whose sums are fp32
        optimizer=count * (12 if half else 8) // shards,  # two moments, and under bf16 the fp32 weights
        ema=count * 4 + len(config.train.posthoc_ema) * count * 4 // shards,
        saved=saved,
        received=received,
        working=working,
        averaging=count * 4 if half else 0,
    )


def _schedule(config: Config, chunks: dict[int, Chunk], tasks: list[Task]) -> tuple[int, int, int]:
    """(saved, received, working) when their sum is largest."""
    recompute = config.parallel.recompute == "full"
    # Megatron frees what was sent, but not under interleaving (mpdit.parallel.context says why).
    keeps_sent = config.parallel.vpp > 1
    kept = {index: saved_bytes(chunk, recompute=recompute) for index, chunk in chunks.items()}
    between = {
        index: (0 if _keeps_received(chunk, recompute) else chunk.received_bytes)
        + (chunk.sent_bytes if keeps_sent else 0)
        for index, chunk in chunks.items()
    }
    forward = {index: _forward_peak(chunk, recompute) for index, chunk in chunks.items()}
    backward = {index: _backward_peak(chunk, recompute) for index, chunk in chunks.items()}
    best, saved, received = (0, 0, 0), 0, 0
    for task in tasks:
        index = task.chunk
        if task.kind == "forward":
            saved, received = saved + kept[index], received + between[index]
            working = max(0, forward[index] - kept[index])
        else:
            working = backward[index]
        best = max(best, (saved, received, working), key=sum)
        if task.kind == "backward":
            saved, received = saved - kept[index], received - between[index]
    return best


def most_saved_bytes(config: Config, chunks: Sequence[Chunk], stage: int, micro_batches: int) -> int:
    """The most that autograd's saved tensors hold at once on pipeline rank `stage`."""
    recompute = config.parallel.recompute == "full"
    now = most = 0
    for task in order(config.parallel, stage, micro_batches):
        size = saved_bytes(chunks[task.chunk], recompute=recompute)
        if task.kind == "forward":
            now += size
            most = max(most, now)
        else:
            again = _backward_peak(chunks[task.chunk], recompute, saved_only=True)
            most = max(most, now + again)
            now -= size
    return most


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A part in its place: what is kept for it alone, and the streams, by a name of their own, that it keeps."""

    part: Part
    own_bytes: int
    streams: dict[str, int]


def _steps(chunk: Chunk, *, recompute: bool) -> Iterator[_Step]:
    """Streams that a part passes on unchanged keep their name; those that crossed lie in one tensor."""
    count = len(next((p.piece.in_bytes for p in chunk.parts if p.piece.in_bytes), ()))
    names = ["received"] * count
    sizes = {"received": chunk.received_bytes}
    for number, part in enumerate(chunk.parts):
        piece = part.piece
        again = recompute and piece.name == "block"
        kept = {n for n, saved in zip(names, piece.saved_in, strict=False) if saved or again}
        if piece.name == "repa":  # a side branch: the streams go on as they are
            yield _Step(part=part, own_bytes=piece.own_saved_bytes, streams={n: sizes[n] for n in kept})
            continue
        after = [f"{number}.{i}" if p is None else names[p] for i, p in zip(piece.first, piece.passed, strict=True)]
        sizes.update({n: size for n, size in zip(after, piece.out_bytes, strict=True) if n not in sizes})
        if not again:
            kept |= {n for n, saved in zip(after, piece.saved_out, strict=True) if saved}
        yield _Step(part=part, own_bytes=0 if again else piece.own_saved_bytes, streams={n: sizes[n] for n in kept})
        names = after


def saved_bytes(chunk: Chunk, *, recompute: bool) -> int:
    """What autograd keeps from a micro-batch's forward pass through the chunk until its backward pass.

    `recompute`: of each block only its inputs.
    """
    streams: dict[str, int] = {}
    own = 0
    for step in _steps(chunk, recompute=recompute):
        streams |= step.streams
        own += step.own_bytes
    return own + sum(streams.values())


def _keeps_received(chunk: Chunk, recompute: bool) -> bool:
    return any("received" in step.streams for step in _steps(chunk, recompute=recompute))


def _forward_peak(chunk: Chunk, recompute: bool) -> int:
    """The most that a forward pass holds at once, what it leaves behind counted in."""
    streams: dict[str, int] = {}
    own = most = 0
    for step in _steps(chunk, recompute=recompute):
        most = max(most, own + sum(streams.values()) + step.part.piece.forward.peak_bytes)
        streams |= step.streams
        own += step.own_bytes
    return max(most, own + sum(streams.values()))


def _backward_peak(chunk: Chunk, recompute: bool, *, saved_only: bool = False) -> int:
    """The most that a backward pass holds at once over what its forward pass left (which shrinks on the way).

    `saved_only`: of that, what a recomputed block saves again.
    """
    steps = list(_steps(chunk, recompute=recompute))
    freed, most = 0, 0
    for number, step in reversed(list(enumerate(steps))):
        piece = step.part.piece
        again = piece.own_saved_bytes if recompute and piece.name == "block" else 0
        if saved_only:
            most = max(most, again - freed)
        else:
            forward = piece.forward.peak_bytes if again else 0
            most = max(most, max(forward, again + piece.backward.peak_bytes) - freed)
        earlier = {name for step in steps[:number] for name in step.streams}
        freed += step.own_bytes + sum(size for name, size in step.streams.items() if name not in earlier)
    return most
