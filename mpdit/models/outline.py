"""What a configured network consists of, without its weights."""

import dataclasses

import torch

from mpdit.config import Config, Parallel
from mpdit.models import parts, repa
from mpdit.mup.roles import Tag, collect
from mpdit.parallel import context, fp8_rules, stages


def outline(config: Config) -> dict[str, Tag]:
    """The tags of every parameter of the whole model, by name; nothing is allocated (meta device).

    The layout in `config` is left aside: groups of a single rank have to be up (mpdit.parallel.groups.start). Raises
    InputError for a parameter without a role.
    """
    whole = dataclasses.replace(config, parallel=Parallel(precision=fp8_rules.stored(config.parallel.precision)))
    ctx = context.build(whole)
    with torch.device("meta"):
        (stage,) = stages.build(ctx, parts(ctx), repa.auxiliary(ctx, parts(ctx)))
    return collect(stage)
