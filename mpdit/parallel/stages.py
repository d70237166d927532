"""Blocks onto pipeline stages, and the one packed tensor that crosses between them.

Megatron passes a single tensor. It holds all streams one after another along the sequence, for an MMDiT ``[image tokens
| text tokens | conditioning]``, so that the conditioning's gradients flow back through the pipeline and no embedder is
replicated over stages. Token streams are this rank's share under context and sequence parallelism; conditioning is
whole on every rank. Every boundary gets the size of the largest: Megatron's schedules know one. It follows the images'
shape, which is the same in all micro-batches of a step and may be another in the next.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.config import Config, Model, Parallel
from mpdit.errors import InputError
from mpdit.mup.roles import on_residual_branch
from mpdit.parallel import backend, fp8_rules
from mpdit.parallel.context import Context


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Tokens of the whole model that a block takes and gives. `split`: shared out under cp and sp; `skip`: on their way
    to a later block; `keys`: the config keys that say how many."""

    name: str
    tokens: int
    split: bool = True
    skip: bool = False
    keys: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Patches of an image. `keys`: the config keys that say how many."""

    rows: int
    columns: int
    keys: str

    @classmethod
    def of(cls, model: Model, height: int = 0, width: int = 0, keys: str = "") -> "Grid":
        """Of images of height x width pixels; by default the square of ``model.image_size``."""
        return cls(
            rows=(height or model.image_size) // model.patch,
            columns=(width or model.image_size) // model.patch,
            keys=keys or "(model.image_size / model.patch)^2",
        )

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


class Parts(Protocol):
    """What a network brings: modules without any idea of stages.

    embed(inputs) -> streams; block(*streams) -> streams; head(*streams) -> prediction [S, B, K] of this context rank's
    image tokens. ``streams(done, image)`` are those that leave the first `done` blocks for images of that grid.
    """

    def embed(self) -> nn.Module: ...

    def block(self, index: int) -> nn.Module: ...

    def head(self) -> nn.Module: ...

    def streams(self, done: int, image: Grid) -> list[Stream]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Auxiliary:
    """A loss beside the main one, on the streams that leave `block` (from 0), on whichever stage that is.

    What `build` makes is called with (streams, inputs) and returns its mean over this context rank's tokens, or None
    where the inputs have nothing to compare with.
    """

    block: int
    weight: float
    build: Callable[[], nn.Module]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """What stages, Megatron's schedules and the prediction's receivers have to know of images of one shape."""

    packed: int  # tokens of the packed tensor, which is padded to them
    received: dict[int, list[int]]  # tokens of each stream in it, by the first block of the chunk that it reaches
    sequence_length: int  # `packed` times cp, times tp under SP: Megatron divides by them
    rows: int  # image tokens of this context rank
    features: int  # of each in the prediction


def split(config: Config) -> list[range]:
    """Blocks of each of the pp * vpp chunks, in depth order. Raises InputError where the depth can't be split so."""
    depth, parallel = config.model.depth, config.parallel
    chunks = parallel.pp * parallel.vpp
    sizes = parallel.pp_split
    if sizes is None:
        if depth % chunks:
            small, large = divmod(depth, chunks)
            example = [small] * (chunks - large) + [small + 1] * large
            hint = f"give parallel.pp_split, for example {example}" if small else f"at least {chunks} blocks are needed"
            raise InputError(
                f"model.depth {depth} does not divide into parallel.pp {parallel.pp} x vpp {parallel.vpp} = {chunks} "
                f"equal stages; {hint}."
            )
        sizes = (depth // chunks,) * chunks
    if len(sizes) != chunks or sum(sizes) != depth or min(sizes) < 1:
        raise InputError(
            f"parallel.pp_split {list(sizes)} should be {chunks} numbers (pp {parallel.pp} x vpp {parallel.vpp}), each "
            f"at least 1, that add up to model.depth {depth}."
        )
    starts = [sum(sizes[:i]) for i in range(chunks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


class _Attach(torch.autograd.Function):
    """`x` as it is; when its gradient passes, that of `loss` sets out, times `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.gradient = torch.full_like(loss, scale)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.gradient, None


class Stage(MegatronModule):
    """One pipeline chunk. Parameter names carry the global block index, so they are the same in every layout."""

    share_embeddings_and_output_weights = False  # asked by finalize_model_grads
    model_type = ModelType.encoder_or_decoder  # asked by the schedules

    def __init__(
        self,
        ctx: Context,
        parts: Parts,
        blocks: range,
        *,
        first: bool,
        last: bool,
        vp_stage: int | None,
        auxiliary: Auxiliary | None = None,
    ) -> None:
        super().__init__(ctx.megatron)
        self.ctx = ctx
        self.pre_process, self.post_process, self.vp_stage = first, last, vp_stage
        self.first_block = blocks.start
        if first:
            self.embed = parts.embed()
        self.blocks = nn.ModuleDict({str(index): on_residual_branch(parts.block(index)) for index in blocks})
        for block in self.blocks.values() if ctx.config.parallel.compile else ():
            block.compile()
        if last:
            self.head = parts.head()
        self.auxiliary = auxiliary if auxiliary is not None and auxiliary.block in blocks else None
        if self.auxiliary is not None:
            self.repa = self.auxiliary.build()
        self.auxiliary_losses: list[Tensor] = []  # of the micro-batches so far, until whoever reads them clears them
        self._received: Tensor | None = None

    def set_input_tensor(self, tensors: Tensor | list[Tensor]) -> None:
        self._received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, inputs: object, crossing: Crossing | None = None, share: float = 0.0) -> Tensor:
        """`crossing`: of the images' shape; None will do on a single stage. `share`: of this micro-batch in the step's
        loss, by which an auxiliary loss is scaled; 0: it is left out."""
        with backend.forward_pass(self.ctx):
            streams = self.embed(inputs) if self.pre_process else self._unpack(crossing)
            for index, block in self.blocks.items():
                streams = self._run(block, streams)
                if self.auxiliary is not None and int(index) == self.auxiliary.block:
                    streams = self._attach_loss(streams, inputs, self.auxiliary.weight * share)
            return self.head(*streams) if self.post_process else self._pack(streams, crossing)

    def _attach_loss(self, streams: tuple[Tensor, ...], inputs: object, scale: float) -> tuple[Tensor, ...]:
        loss = self.repa(streams, inputs) if scale and torch.is_grad_enabled() else None
        if loss is None:
            return streams
        self.auxiliary_losses.append(loss.detach())
        return _Attach.apply(streams[0], loss, scale), *streams[1:]

    def _run(self, block: nn.Module, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.ctx.megatron.recompute_granularity == "full" and torch.is_grad_enabled():
            return backend.recomputed(self.ctx, block, streams)
        return block(*streams)

    def _pack(self, streams: tuple[Tensor, ...], crossing: Crossing | None) -> Tensor:
        assert crossing is not None
        packed = torch.cat(streams)
        return F.pad(packed, (0, 0, 0, 0, 0, crossing.packed - len(packed)))

    def _unpack(self, crossing: Crossing | None) -> tuple[Tensor, ...]:
        assert crossing is not None
        assert self._received is not None
        tokens = crossing.received[self.first_block]
        return self._received[: sum(tokens)].split(tokens)


def local_tokens(config: Config, streams: list[Stream]) -> list[int]:
    """Tokens of each stream that a rank holds between blocks. Raises InputError where a stream does not divide."""
    parallel = config.parallel
    ways = parallel.cp * (parallel.tp if parallel.sp else 1)
    for stream in streams:
        if stream.split and stream.tokens % ways:
            raise InputError(
                f"{stream.keys} is {stream.tokens} {stream.name} tokens, which do not divide by {ways} (parallel.cp "
                f"{parallel.cp}{f' x tp {parallel.tp} under sp' if parallel.sp else ''}); choose a multiple of {ways}."
            )
    return [stream.tokens // ways if stream.split else stream.tokens for stream in streams]


def crossing_note(config: Config, parts: Parts) -> str:
    """What crosses a stage boundary, and how much of it are long skips; empty without pipeline stages or skips."""
    image = Grid.of(config.model)
    fullest = max((parts.streams(blocks.stop, image) for blocks in split(config)[:-1]), key=len, default=[])
    skips = [stream for stream in fullest if stream.skip]
    if not skips:
        return ""
    tokens, of_skips = sum(local_tokens(config, fullest)), sum(local_tokens(config, skips))
    mb = tokens * config.model.width * (2 if fp8_rules.stored(config.parallel.precision) == "bf16" else 4) / 1e6
    return (
        f"long skips: each stage boundary carries {tokens} tokens a sample ({mb:.3g} MB), {of_skips} of them of "
        f"{len(skips)} open skips: {tokens / (tokens - of_skips):.0f} times what a network without skips sends."
    )


def crossing(config: Config, parts: Parts, features: int, image: Grid) -> Crossing:
    """The sizes of what crosses between stages and of the prediction. Raises InputError where tokens don't divide."""
    parallel = config.parallel
    # The first chunk receives nothing, but what it makes has to divide as well.
    received = {b.start: local_tokens(config, parts.streams(b.start, image)) for b in split(config)}
    if image.tokens % parallel.cp:
        raise InputError(
            f"{image.keys} is {image.tokens} image tokens, which do not divide by parallel.cp {parallel.cp}."
        )
    packed = max(sum(tokens) for start, tokens in received.items() if start or len(received) == 1)
    return Crossing(
        packed=packed,
        received=received,
        sequence_length=packed * parallel.cp * (parallel.tp if parallel.sp else 1),
        rows=image.tokens // parallel.cp,
        features=features,
    )


def _own_chunks(parallel: Parallel) -> list[int]:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return [v * parallel.pp + rank for v in range(parallel.vpp)]


def holds(config: Config, block: int) -> bool:
    """Whether this rank has the block, counted from 0."""
    chunks = split(config)
    return any(block in chunks[index] for index in _own_chunks(config.parallel))


def build(ctx: Context, parts: Parts, auxiliary: Auxiliary | None = None) -> list[Stage]:
    """This rank's chunks, uninitialised, on the CPU."""
    parallel = ctx.config.parallel
    chunks = split(ctx.config)
    return [
        Stage(
            ctx,
            parts,
            chunks[index],
            first=index == 0,
            last=index == len(chunks) - 1,
            vp_stage=v if parallel.vpp > 1 else None,
            auxiliary=auxiliary,
        )
        for v, index in enumerate(_own_chunks(parallel))
    ]
