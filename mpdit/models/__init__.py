"""The networks. They read like their papers and import no process group."""

from collections.abc import Callable

from mpdit.models.dit import DiT
from mpdit.models.layers import out_features
from mpdit.models.mmdit import MMDiT
from mpdit.models.pixart import PixArt
from mpdit.models.uvit import UViT
from mpdit.parallel import stages
from mpdit.parallel.context import Context
from mpdit.parallel.stages import Crossing, Parts

ARCHITECTURES: dict[str, Callable[[Context], Parts]] = {"mmdit": MMDiT, "dit": DiT, "pixart": PixArt, "uvit": UViT}


def parts(ctx: Context) -> Parts:
    """The parts of the configured network."""
    return ARCHITECTURES[ctx.config.model.arch](ctx)


def crossing(ctx: Context) -> Crossing:
    """The sizes of its packed tensor and its prediction. Raises InputError where tokens don't divide."""
    return stages.crossing(ctx.config, parts(ctx), out_features(ctx.config.model))
