"""The networks. They read like their papers and import no process group."""

from mpdit.models.mmdit import MMDiT
from mpdit.parallel.context import Context

ARCHITECTURES = {"mmdit": MMDiT}


def parts(ctx: Context) -> MMDiT:
    """The parts of the configured network."""
    return ARCHITECTURES[ctx.config.model.arch](ctx)
