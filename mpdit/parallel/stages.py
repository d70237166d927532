"""Blocks onto pipeline stages, and the one packed tensor that crosses between them.

Megatron passes a single tensor. It is ``[image tokens | text tokens | conditioning]`` along the sequence, so that the
conditioning's gradients flow back through the pipeline and no embedder is replicated over stages. Token streams are
this rank's share under context and sequence parallelism; conditioning is one token, whole on every rank.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from mpdit.config import Config
from mpdit.errors import InputError
from mpdit.parallel.context import Context


class Parts(Protocol):
    """What a network brings: modules without any idea of stages.

    embed(inputs) -> streams; block(*streams) -> the leading streams that it changes; head(*streams) -> prediction. The
    last stream is the conditioning. ``streams()`` says how many tokens each token stream has in the whole.
    """

    def embed(self) -> nn.Module: ...

    def block(self, index: int) -> nn.Module: ...

    def head(self) -> nn.Module: ...

    def streams(self) -> dict[str, int]: ...


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


class Stage(MegatronModule):
    """One pipeline chunk. Parameter names carry the global block index, so they are the same in every layout."""

    share_embeddings_and_output_weights = False  # asked by finalize_model_grads
    model_type = ModelType.encoder_or_decoder  # asked by the schedules

    def __init__(
        self, ctx: Context, parts: Parts, blocks: range, *, first: bool, last: bool, vp_stage: int | None
    ) -> None:
        super().__init__(ctx.megatron)
        self.ctx = ctx
        self.pre_process, self.post_process, self.vp_stage = first, last, vp_stage
        self.token_counts = local_tokens(ctx.config, parts.streams())
        if first:
            self.embed = parts.embed()
        self.blocks = nn.ModuleDict({str(index): parts.block(index) for index in blocks})
        if last:
            self.head = parts.head()
        self._received: Tensor | None = None

    def set_input_tensor(self, tensors: Tensor | list[Tensor]) -> None:
        self._received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, inputs: object) -> Tensor:
        streams = list(self.embed(inputs)) if self.pre_process else self._unpack()
        for block in self.blocks.values():
            changed = self._run(block, streams)
            streams[: len(changed)] = changed
        return self.head(*streams) if self.post_process else torch.cat(streams)

    def _run(self, block: nn.Module, streams: list[Tensor]) -> Sequence[Tensor]:
        if self.ctx.megatron.recompute_granularity == "full" and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(block, False, *streams)
        return block(*streams)

    def _unpack(self) -> list[Tensor]:
        assert self._received is not None
        return list(self._received.split([*self.token_counts, 1]))


def local_tokens(config: Config, streams: dict[str, int]) -> list[int]:
    """Tokens of each stream that a rank holds between blocks. Raises InputError where a stream does not divide."""
    parallel = config.parallel
    ways = parallel.cp * (parallel.tp if parallel.sp else 1)
    for name, count in streams.items():
        if count % ways:
            key = "model.text_tokens" if name == "text" else "(model.image_size / model.patch)^2"
            raise InputError(
                f"{key} is {count} {name} tokens, which do not divide by {ways} (parallel.cp {parallel.cp}"
                f"{f' x tp {parallel.tp} under sp' if parallel.sp else ''}); choose a multiple of {ways}."
            )
    return [count // ways for count in streams.values()]


def boundary_tokens(config: Config, streams: dict[str, int]) -> int:
    """The sequence length to tell Megatron's schedule: it divides by cp, and by tp under SP, to size its receives."""
    parallel = config.parallel
    return (sum(local_tokens(config, streams)) + 1) * parallel.cp * (parallel.tp if parallel.sp else 1)


def build(ctx: Context, parts: Parts) -> list[Stage]:
    """This rank's chunks, uninitialised, on the CPU."""
    parallel = ctx.config.parallel
    chunks = split(ctx.config)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    stages = []
    for v in range(parallel.vpp):
        index = v * parallel.pp + rank
        stages.append(
            Stage(
                ctx,
                parts,
                chunks[index],
                first=index == 0,
                last=index == len(chunks) - 1,
                vp_stage=v if parallel.vpp > 1 else None,
            )
        )
    return stages
