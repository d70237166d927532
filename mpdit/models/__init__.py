"""The networks. They read like their papers and import no process group."""

from collections.abc import Callable

from mpdit.models.dit import DiT
from mpdit.models.layers import out_features
from mpdit.models.mmdit import MMDiT
from mpdit.models.pixart import PixArt
from mpdit.models.uvit import UViT
from mpdit.parallel import stages
from mpdit.parallel.context import Context
from mpdit.parallel.stages import Crossing, Grid, Parts

ARCHITECTURES: dict[str, Callable[[Context], Parts]] = {"mmdit": MMDiT, "dit": DiT, "pixart": PixArt, "uvit": UViT}


def parts(ctx: Context) -> Parts:
    """The parts of the configured network."""
    return ARCHITECTURES[ctx.config.model.arch](ctx)


def crossing(ctx: Context, height: int = 0, width: int = 0, keys: str = "") -> Crossing:
    """The sizes of its packed tensor and its prediction for images of height x width pixels, by default the square.

    Raises InputError where tokens don't divide; `keys` are the config's that say height and width.
    """
    model = ctx.config.model
    return stages.crossing(ctx.config, parts(ctx), out_features(model), Grid.of(model, height, width, keys))
