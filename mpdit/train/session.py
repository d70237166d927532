"""What a run is made of on this rank: stages, muP table, optimizer, schedule, EMA. Built the same for every layout."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mpdit import models
from mpdit.config import Config
from mpdit.data.text import Tokenizer
from mpdit.models import repa
from mpdit.mup.roles import collect
from mpdit.mup.table import Table, merge, resolve
from mpdit.parallel import accel, context, groups, init, optimizer, schedule, stages
from mpdit.parallel.context import Context
from mpdit.parallel.stages import Crossing
from mpdit.sample import draw as sampling
from mpdit.train import batches, cached
from mpdit.train.batches import Batch
from mpdit.train.ema import EMA


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """The stages of this rank with their weights; enough to draw pictures."""

    ctx: Context
    chunks: list[Any]  # Stage, or Stage under DDP
    table: Table  # of the whole model
    crossing: Crossing

    @property
    def note(self) -> str:
        """What a person should know of the network in this layout; often nothing."""
        return stages.crossing_note(self.ctx.config, models.parts(self.ctx))

    def loss(self, prediction_SBK: torch.Tensor, batch: Batch) -> torch.Tensor:
        return batches.loss(self.ctx.config, prediction_SBK, batch)

    def predict(self, micro_batches: list[Batch]) -> list[torch.Tensor]:
        return schedule.predict(self.ctx, self.chunks, micro_batches, self.crossing)

    def validate(self, micro_batches: list[Batch]) -> float:
        """The mean loss, without gradients, on every rank."""
        with torch.no_grad():
            return schedule.forward_backward(
                self.ctx, self.chunks, micro_batches, self.loss, self.crossing, forward_only=True
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    network: Network
    optimizer: Any
    scheduler: Any
    ema: EMA

    def forward_backward(self, micro_batches: list[Batch]) -> float:
        """Zero the gradients, run the micro-batches, leave reduced gradients; the mean loss, on every rank."""
        for chunk in self.network.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        network = self.network
        return schedule.forward_backward(network.ctx, network.chunks, micro_batches, network.loss, network.crossing)

    def repa_loss(self) -> float:
        """REPA's mean loss of the last :meth:`forward_backward`, without its weight, on every rank; collective."""
        return schedule.auxiliary_loss(self.network.ctx, self.network.chunks)

    def update(self) -> float:
        """Clip, step the optimizer and the schedule; the global gradient norm before clipping."""
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return float(norm) if norm is not None else 0.0

    def settled(self) -> Any:
        return optimizer.settled(self.network.ctx, self.network.chunks)


_PROMPTS_AT_ONCE = 32  # a data-parallel rank and micro-batch; guidance doubles it


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
            lambda inputs, size: Batch(inputs=inputs, size=size),
            first=first,
            decode=decode,
        )
        for first in range(0, len(prompts), at_once)
    ]
    return torch.cat(images)


def build_network(config: Config, *, training: bool = False) -> Network:
    """Stages with the initial weights of (seed, name, global shape), in eval order of the layout. Collective.

    `training`: with what only training needs, REPA's projector. Pictures can be drawn where its teacher is not.
    """
    ctx = context.build(config)
    parts = models.parts(ctx)
    chunks = stages.build(ctx, parts, repa.auxiliary(ctx, parts) if training else None)
    tags = merge(groups.gather_over_stages({n: t for chunk in chunks for n, t in collect(chunk).items()}))
    table = resolve(tags, config)
    for chunk in chunks:
        init.initialise(chunk, table, config.train.seed)
        chunk.to(accel.device())
    return Network(ctx=ctx, chunks=chunks, table=table, crossing=models.crossing(ctx))


def build(config: Config) -> Session:
    """A session at step 0. Collective. Raises InputError for an untagged parameter."""
    bare = build_network(config, training=True)
    chunks = optimizer.wrap(bare.ctx, bare.chunks)
    network = dataclasses.replace(bare, chunks=chunks)
    adam, scheduler = optimizer.build(bare.ctx, chunks, bare.table)
    return Session(network=network, optimizer=adam, scheduler=scheduler, ema=EMA(chunks, config.train.ema_decay))
