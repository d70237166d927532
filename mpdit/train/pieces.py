"""What each piece of the network costs a rank in a layout: the network's own code, run once on fake tensors.

Pieces are the embedder, each kind of block, REPA's projector, and the head with the loss. A rank's place along the
tensor and context axes does not matter (all hold equally much), along the pipeline it does.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpdit import models
from mpdit.config import Config, Parallel
from mpdit.data import buckets
from mpdit.data.buckets import Size
from mpdit.models import repa
from mpdit.models.layers import Inputs
from mpdit.parallel import context, fp8_rules, imagined, imagined_fp8, stages
from mpdit.parallel.record import Saved, Work, recorded
from mpdit.parallel.stages import Grid, Parts, Stage, Stream
from mpdit.train import batches
from mpdit.train.batches import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Costs for one micro-batch. Streams in and out are numbered as the network has them.

    `own_saved_bytes` are kept for the backward pass beside streams and parameters; `saved_in`, `saved_out`: whether a
    stream is kept too; `passed`: the number of the stream in that comes out here unchanged, or None; `first`: the
    number of the first stream out that is the same tensor (a U-ViT's skip is the stream beside it).
    """

    name: str  # embed | block | repa | head
    forward: Work
    backward: Work
    own_saved_bytes: int
    in_bytes: tuple[int, ...]
    saved_in: tuple[bool, ...]
    out_bytes: tuple[int, ...]
    saved_out: tuple[bool, ...]
    passed: tuple[int | None, ...]
    first: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A piece in its place, with the learned numbers of this rank by name. `block`: its index, for a block or REPA;
    `copies_bytes`: of FP8 weights beside them."""

    piece: Piece
    parameters: dict[str, int]
    block: int | None = None
    copies_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What a pipeline rank holds of the network in one place, in order."""

    index: int
    parts: tuple[Part, ...]
    received_bytes: int  # of the tensor from the chunk before; 0 for the first
    sent_bytes: int  # of the tensor for the chunk after; 0 for the last

    @property
    def parameters(self) -> int:
        return sum(sum(part.parameters.values()) for part in self.parts)

    @property
    def copies_bytes(self) -> int:
        return sum(part.copies_bytes for part in self.parts)


def measure(config: Config, size: Size | None = None) -> list[Part]:
    """The network's parts in depth order, as a rank of `config`'s tensor and context layout has them, for images of
    `size`, by default the largest bucket's.

    `config` has its micro-batch and vocabulary (mpdit.train.preflight). No memory is taken, no rank started. How the
    parts lie on pipeline stages changes nothing in them: see :func:`on_stages`. Of Transformer Engine's FP8 linears the
    costs are estimated (mpdit.parallel.imagined_fp8), of all else counted.
    """
    flat = dataclasses.replace(config.parallel, pp=1, vpp=1, pp_split=None, recompute="none")
    config = imagined.with_own_layers(dataclasses.replace(config, parallel=flat))
    with imagined.rank_of(config.parallel) as mode:
        ctx = context.build(config)
        network = models.parts(ctx)
        (stage,) = stages.build(ctx, network, repa.auxiliary(ctx, network))
        imagined_fp8.take_place(config, stage)
        return list(_Runner(config, stage, _batch(config, mode, size or buckets.largest(config))).parts(network))


def measure_whole(config: Config, size: Size | None = None) -> list[Part]:
    """:func:`measure` on a single rank with the same micro-batch: what has to be done, whatever a layout adds."""
    precision = fp8_rules.stored(config.parallel.precision)
    alone = Parallel(micro_batch=config.parallel.micro_batch, precision=precision)
    return measure(dataclasses.replace(config, parallel=alone), size)


def flops_per_image(config: Config, whole: Sequence[Part]) -> int:
    """Forward and backward of one image in parts of :func:`measure_whole`, nothing computed twice."""
    work = sum(part.piece.forward.flops + part.piece.backward.flops for part in whole)
    return work // config.parallel.micro_batch


def on_stages(config: Config, parts: Sequence[Part]) -> list[Chunk]:
    """The chunks of `config`'s pipeline, in depth order, for its largest bucket. Raises InputError where the depth
    can't be split so."""
    ranges = stages.split(config)
    ctx = context.build(config)
    packed = models.crossing(ctx, *buckets.largest(config)).packed
    packed_bytes = packed * config.parallel.micro_batch * config.model.width * ctx.dtype.itemsize
    last = len(ranges) - 1
    return [
        Chunk(
            index=index,
            parts=tuple(
                part
                for part in parts
                if part.block in blocks
                or (part.piece.name == "embed" and index == 0)
                or (part.piece.name == "head" and index == last)
            ),
            received_bytes=packed_bytes if index else 0,
            sent_bytes=packed_bytes if index < last else 0,
        )
        for index, blocks in enumerate(ranges)
    ]


def _batch(config: Config, mode: Any, image: Size) -> Batch:
    """A micro-batch of the right shapes and types, its numbers never looked at."""
    model, size = config.model, config.parallel.micro_batch
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        images_BCHW = torch.zeros(size, model.channels, *image)
        text = torch.zeros((size, model.text_tokens), dtype=torch.long)
        if model.text_dim and model.arch != "dit":
            text = torch.zeros(size, model.text_tokens, model.text_dim, dtype=torch.float16)  # as encoders give it
        pooled_BP = torch.zeros(size, model.pooled_dim, dtype=torch.float16) if model.pooled_dim else None
        ids, visits = np.arange(size), np.zeros(size, dtype=np.int64)
        real = batches.noised_batch(config, images_BCHW, text, ids, visits, pooled_BP)
    assert real.inputs is not None
    assert real.target_SBP is not None
    teacher_SBF = None
    if config.objective.repa_weight:
        tokens = Grid.of(model, *image).tokens // config.parallel.cp
        teacher_SBF = torch.zeros(tokens, size, repa.teacher_features(config.objective))
    return dataclasses.replace(
        real,
        inputs=Inputs(
            image_BCHW=mode.from_tensor(real.inputs.image_BCHW),
            time_B=mode.from_tensor(real.inputs.time_B),
            text_BL=mode.from_tensor(real.inputs.text_BL),
            pooled_BP=None if pooled_BP is None else mode.from_tensor(pooled_BP),
            teacher_SBF=teacher_SBF,
        ),
        target_SBP={name: mode.from_tensor(x) for name, x in real.target_SBP.items()},
    )


class _Runner:
    """Runs the pieces of a network, each kind once."""

    def __init__(self, config: Config, stage: Stage, batch: Batch) -> None:
        self.config, self.stage, self.batch = config, stage, batch
        self.seen: dict[Any, Piece] = {}
        self.group_names = imagined.group_names()
        lasting = (*stage.parameters(), *stage.buffers(), *imagined_fp8.copies(stage))
        self.weights = {id(t.untyped_storage()) for t in lasting}
        for parameter in stage.parameters():  # as DDP does: a gradient goes into its buffer at once
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def parts(self, network: Parts) -> Iterator[Part]:
        stage, inputs, depth = self.stage, self.batch.inputs, self.config.model.depth
        image = Grid.of(self.config.model, self.batch.height, self.batch.width)

        def loss(*streams: Tensor) -> tuple[Tensor]:
            return (batches.loss(self.config, stage.head(*streams), self.batch),)

        yield self._part("embed", stage.embed, lambda: stage.embed(inputs), [])
        for name, block in stage.blocks.items():
            yield self._part("block", block, block, network.streams(int(name), image), int(name))
            if stage.auxiliary is not None and int(name) == stage.auxiliary.block:
                streams = network.streams(int(name) + 1, image)
                yield self._part("repa", stage.repa, lambda *s: (stage.repa(s, inputs),), streams, int(name))
        yield self._part("head", stage.head, loss, network.streams(depth, image))

    def _part(
        self, name: str, module: nn.Module, run: Callable[..., Any], streams: list[Stream], block: int | None = None
    ) -> Part:
        ctx, size = self.stage.ctx, self.batch.size
        shapes = tuple((t, size, ctx.config.model.width) for t in stages.local_tokens(self.config, streams))
        fp8 = fp8_rules.quantised(self.config, block)
        kind = (name, shapes, fp8, tuple((n, tuple(p.shape)) for n, p in module.named_parameters()))
        if kind not in self.seen:
            given = [torch.zeros(shape, dtype=ctx.dtype, requires_grad=True) for shape in shapes]
            self.seen[kind] = self._run(name, run, given)
        prefix = name if block is None or name == "repa" else f"blocks.{block}"
        parameters = {f"{prefix}.{n}": p.numel() for n, p in module.named_parameters()}
        copies = sum(copy.nbytes for copy in imagined_fp8.copies(module))
        return Part(piece=self.seen[kind], parameters=parameters, block=block, copies_bytes=copies)

    def _run(self, name: str, run: Callable[..., Any], streams: list[Tensor]) -> Piece:
        with recorded(self.group_names) as forward, Saved() as saved:
            made = run(*streams)
        with recorded(self.group_names) as backward:
            learned = [x for x in made if x.requires_grad and not any(x is given for given in streams)]
            torch.autograd.backward(learned, [torch.zeros_like(x) for x in learned])
        given = [id(x.untyped_storage()) for x in streams]
        out = [id(x.untyped_storage()) for x in made]
        apart = self.weights.union(given, out)
        return Piece(
            name=name,
            forward=forward[0],
            backward=backward[0],
            own_saved_bytes=sum(size for storage, size in saved.sizes.items() if storage not in apart),
            in_bytes=tuple(x.untyped_storage().nbytes() for x in streams),
            saved_in=tuple(storage in saved.sizes for storage in given),
            out_bytes=tuple(x.untyped_storage().nbytes() for x in made),
            saved_out=tuple(storage in saved.sizes for storage in out),
            passed=tuple(given.index(storage) if storage in given else None for storage in out),
            first=tuple(map(out.index, out)),
        )
