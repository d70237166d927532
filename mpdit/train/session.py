"""What a run is made of on this rank: stages, muP table, optimizer, schedule, EMA. Built the same for every layout."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mpdit import models
from mpdit.config import Config
from mpdit.data.text import Tokenizer
from mpdit.models import repa
from mpdit.models.layers import Inputs
from mpdit.mup.roles import collect
from mpdit.mup.table import Table, merge, resolve
from mpdit.parallel import accel, backend, context, groups, init, optimizer, schedule, stages
from mpdit.parallel.context import Context
from mpdit.parallel.stages import Crossing
from mpdit.parallel.timers import Timers
from mpdit.sample import draw as sampling
from mpdit.train import batches, cached
from mpdit.train.batches import Batch
from mpdit.train.ema import EMA
from mpdit_kernels import switch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """The stages of this rank with their weights; enough to draw pictures."""

    ctx: Context
    chunks: list[Any]  # Stage, or Stage under DDP
    table: Table  # of the whole model

    @property
    def timers(self) -> Timers | None:
        """Of a pipeline rank that trains."""
        timers: Timers | None = self.ctx.megatron.timers
        return timers

    @property
    def note(self) -> str:
        """What a person should know of the network in this layout; often nothing."""
        return stages.crossing_note(self.ctx.config, models.parts(self.ctx))

    def crossing(self, micro_batches: Sequence[Batch]) -> Crossing:
        """Of the one shape that the micro-batches of a step have. Raises ValueError where they have several."""
        shapes = {(m.height, m.width) for m in micro_batches}
        if len(shapes) != 1:
            raise ValueError(f"micro-batches of one step have images of {sorted(shapes)} pixels")
        return models.crossing(self.ctx, *shapes.pop())

    def loss(self, prediction_SBK: torch.Tensor, batch: Batch) -> torch.Tensor:
        return batches.loss(self.ctx.config, prediction_SBK, batch)

    def predict(self, micro_batches: list[Batch]) -> list[torch.Tensor]:
        return schedule.predict(self.ctx, self.chunks, micro_batches, self.crossing(micro_batches))

    def forward_backward(self, micro_batches: list[Batch], *, forward_only: bool = False) -> float:
        """Run the micro-batches, gradients add to their buffers; the mean loss, on every rank."""
        crossing = self.crossing(micro_batches)
        return schedule.forward_backward(
            self.ctx, self.chunks, micro_batches, self.loss, crossing, forward_only=forward_only
        )

    def each_loss(self, micro_batches: list[Batch]) -> torch.Tensor:
        """The loss of each micro-batch, without gradients: [data ranks, micro-batches], on every rank; collective."""
        return schedule.each_loss(self.ctx, self.chunks, micro_batches, self.loss, self.crossing(micro_batches))

    def validate(self, of_shapes: list[list[Batch]]) -> float:
        """The mean loss of batches.validation_batches, without gradients, on every rank."""
        with torch.no_grad():
            return sum(self.forward_backward(micro_batches, forward_only=True) for micro_batches in of_shapes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    network: Network
    optimizer: Any
    scheduler: Any
    ema: EMA
    undo: backend.Undo  # of what FP8 learnt of a step

    def forward_backward(self, micro_batches: list[Batch]) -> float:
        """Zero the gradients, run the micro-batches, leave reduced gradients; the mean loss, on every rank."""
        for chunk in self.network.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if (timers := self.network.timers) is not None:
            timers.clear()
        self.undo.mark()
        return self.network.forward_backward(micro_batches)

    def repa_loss(self) -> float:
        """REPA's mean loss of the last :meth:`forward_backward`, without its weight, on every rank; collective."""
        return schedule.auxiliary_loss(self.network.ctx, self.network.chunks)

    def gradient_norm(self) -> Any:
        """The global gradient norm before clipping, which ``float`` takes; collective."""
        return optimizer.gradient_norm(self.optimizer)

    def update(self, norm: Any = None) -> float:
        """Clip by `norm`, the :meth:`gradient_norm` (taken now if not given), step the optimizer and the schedule."""
        norm = self.gradient_norm() if norm is None else norm
        optimizer.update(self.optimizer, norm)
        self.scheduler.step(1)
        return float(norm)

    def skip(self) -> None:
        """Go on without an update: the schedule follows the step's number, Adam's count does not.

        What delayed scaling learnt of the step is forgotten: one amax that is not finite, or far too large, would spoil
        its scales for as many passes as the history is long.
        """
        self.undo.back()
        self.scheduler.step(1)

    def settled(self) -> Any:
        return optimizer.settled(self.network.ctx, self.network.chunks)


_PROMPTS_AT_ONCE = 32  # a data-parallel rank and micro-batch; guidance doubles it


def _question(inputs: Inputs) -> Batch:
    size, _, height, width = inputs.image_BCHW.shape
    return Batch(size=size, height=height, width=width, inputs=inputs)


def draw(network: Network, config: Config, prompts: Sequence[str], tokenizer: Tokenizer) -> torch.Tensor:
    """Images [N, C, H, W] in [-1, 1] with the network's present weights, on every rank; collective.

    Raises InputError if ``data.latents`` names an autoencoder that is not there to decode them.
    """
    decode = cached.open_autoencoder(config).pictures if config.data.latents else None
    at_once = _PROMPTS_AT_ONCE * groups.data_size() * config.parallel.pp
    images = [
        sampling.draw(
            config,
            prompts[first : first + at_once],
            lambda captions: batches.encode(config, tokenizer, captions),
            network.predict,
            _question,
            first=first,
            decode=decode,
        )
        for first in range(0, len(prompts), at_once)
    ]
    return torch.cat(images)


def build_network(config: Config, *, training: bool = False) -> Network:
    """Stages with the initial weights of (seed, name, global shape), in eval order of the layout. Collective.

    `training`: with what only training needs, REPA's projector. Pictures can be drawn where its teacher is not. The
    process takes the kernels of ``parallel.kernels``, which preflight has looked at.
    """
    switch.use(config.parallel.kernels)
    ctx = context.build(config)
    parts = models.parts(ctx)
    chunks = stages.build(ctx, parts, repa.auxiliary(ctx, parts) if training else None)
    tags = merge(groups.gather_over_stages({n: t for chunk in chunks for n, t in collect(chunk).items()}))
    table = resolve(tags, config)
    for chunk in chunks:
        init.initialise(chunk, table, config.train.seed)
        chunk.to(accel.device())
    return Network(ctx=ctx, chunks=chunks, table=table)


def build(config: Config) -> Session:
    """A session at step 0. Collective. Raises InputError for an untagged parameter."""
    bare = build_network(config, training=True)
    chunks = optimizer.wrap(bare.ctx, bare.chunks)
    network = dataclasses.replace(bare, chunks=chunks)
    adam, scheduler = optimizer.build(bare.ctx, chunks, bare.table)
    train, split = config.train, config.parallel.distributed_optimizer
    ema = EMA(chunks, train.ema_decay, train.posthoc_ema, split=split)
    undo = backend.Undo(bare.ctx, chunks)
    return Session(network=network, optimizer=adam, scheduler=scheduler, ema=ema, undo=undo)
