"""Do the shards of all ranks, side by side, make up the whole model? Built at full size on tensors without memory."""

import dataclasses
import math
from collections.abc import Iterator

from mpdit import models
from mpdit.config import Config, Parallel
from mpdit.errors import CheckFailed
from mpdit.models import repa
from mpdit.mup.roles import Role, Tag, collect
from mpdit.parallel import context, fp8_rules, imagined, stages
from mpdit.parallel.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A parameter as one rank has it. `dim`: along which tensor ranks share it; None: each has all of it."""

    shape: tuple[int, ...]
    dim: int | None
    tag: Tag


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What the rank at a place in the model holds."""

    stage: int
    tensor: int
    context: int
    blocks: tuple[int, ...]  # of each chunk, in depth order
    shards: dict[str, Shard]


def held(config: Config) -> Iterator[Held]:
    """Of every distinct rank of `config`'s layout. Data-parallel ranks are copies of these."""
    parallel, config = config.parallel, imagined.with_own_layers(config)
    for stage in range(parallel.pp):
        for tensor in range(parallel.tp):
            for place in range(parallel.cp):
                with imagined.rank_of(parallel, stage=stage, tensor=tensor, context=place):
                    ctx = context.build(config)
                    network = models.parts(ctx)
                    chunks = stages.build(ctx, network, repa.auxiliary(ctx, network))
                    yield Held(
                        stage=stage,
                        tensor=tensor,
                        context=place,
                        blocks=tuple(int(index) for chunk in chunks for index in chunk.blocks),
                        shards={name: shard for chunk in chunks for name, shard in _shards(chunk)},
                    )


def _shards(chunk: Stage) -> Iterator[tuple[str, Shard]]:
    tags = collect(chunk)
    for name, parameter in chunk.named_parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        dim = parameter.partition_dim if sharded else None
        yield name, Shard(shape=tuple(parameter.shape), dim=dim, tag=tags[name])


def whole(config: Config) -> dict[str, Tag]:
    """Every parameter of the model as one rank alone would build it."""
    alone = dataclasses.replace(config, parallel=Parallel(precision=fp8_rules.stored(config.parallel.precision)))
    (only,) = held(alone)
    return {name: shard.tag for name, shard in only.shards.items()}


def check(config: Config, everyone: list[Held], model: dict[str, Tag]) -> str:
    """What was found, in a sentence. Raises CheckFailed for the first parameter or stage that is wrong."""
    parallel = config.parallel
    _blocks(config, everyone)
    for stage in range(parallel.pp):
        for place in range(parallel.cp):
            row = [one for one in everyone if (one.stage, one.context) == (stage, place)]
            for name in row[0].shards:
                _tiles(name, [one.shards.get(name) for one in row], model.get(name), parallel)
    found = [name for one in everyone if (one.tensor, one.context) == (0, 0) for name in one.shards]
    missing, twice = sorted(set(model) - set(found)), sorted({name for name in found if found.count(name) > 1})
    if missing or twice:
        what = f"{missing[0]} is on no stage" if missing else f"{twice[0]} is on more than one stage"
        raise CheckFailed(f"parameter {what} (parallel.pp {parallel.pp}, vpp {parallel.vpp}).")
    count = sum(math.prod(tag.shape) for tag in model.values())
    return f"the shards of {len(everyone)} distinct ranks tile {count:,} parameters in {len(model):,} tensors exactly"


def _blocks(config: Config, everyone: list[Held]) -> None:
    """Each stage has the blocks that the split gives it."""
    ranges, pp = stages.split(config), config.parallel.pp
    for one in everyone:
        wanted = tuple(i for index, blocks in enumerate(ranges) if index % pp == one.stage for i in blocks)
        if one.blocks != wanted:
            raise CheckFailed(
                f"stage {one.stage} (tensor rank {one.tensor}) holds blocks {list(one.blocks)}, but should hold "
                f"{list(wanted)}."
            )


def _tiles(name: str, shards: list[Shard | None], tag: Tag | None, parallel: Parallel) -> None:
    """The tensor ranks' shards of one parameter are equal parts of the whole along one dimension, or all of it."""
    if tag is None:
        raise CheckFailed(f"parameter {name} is none of the whole model's.")
    for rank, shard in enumerate(shards):
        if shard is None:
            raise CheckFailed(f"parameter {name} is missing on tensor rank {rank}.")
        if shard.tag != tag or shard.dim != shards[0].dim:  # type: ignore[union-attr]
            raise CheckFailed(f"parameter {name} is another on tensor rank {rank} than in the whole model.")
        tiled = list(shard.shape)
        if shard.dim is not None:
            tiled[shard.dim] *= parallel.tp
        if tuple(tiled) != tag.shape:
            raise CheckFailed(
                f"parameter {name} {tag.shape} is {shard.shape} on tensor rank {rank}: {parallel.tp} of these do not "
                f"make up the whole."
            )
    if parallel.tp > 1 and shards[0] is not None and shards[0].dim is None and _large(name, tag):
        raise CheckFailed(
            f"parameter {name} {tag.shape} is not sharded: each of {parallel.tp} tensor ranks holds all of it."
        )


def _large(name: str, tag: Tag) -> bool:
    """The matrices of the blocks hold nearly all of the model: whole on each rank they would fill the GPUs."""
    return name.startswith("blocks.") and tag.role is Role.HIDDEN
