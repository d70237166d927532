"""What ``mpdit coordcheck`` can be asked."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Is what the network computes, and what an update changes, the same at every width? Exit code 1 if it is not.

    Small copies of CONFIG's model at several widths are trained for a few steps on one batch. Of every module and
    parameter the slope of log2(RMS) against log2(width) is taken: of the output before any update, of its change after
    each, and of what the parameter's own update makes of its input. Under a right muP all are about 0. Takes a minute,
    needs no data and no GPU; torchrun and parallel.* keys run it in a layout.
    """

    config: Annotated[Path, tyro.conf.arg(metavar="CONFIG"), tyro.conf.Positional]
    """The YAML file, or a run folder."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="section.key=value"), tyro.conf.Positional] = ()
    """Keys of the config."""
    widths: tuple[int, ...] = ()
    """Default: mup.base_width times 1, 2, 4, 8."""
    depths: tuple[int, ...] = ()
    """Check over depths instead, at the config's width (completep); figures are means over the blocks."""
    seeds: int = 8
    """Of initial weights; more of them take noise out of the slopes."""
    steps: tuple[int, ...] = (1, 2, 3)
    """After how many updates to look. With a zero readout step 1 shows the readout alone, step 2 almost all else."""
    lr: float = 2**-9
    """Small: near the best learning rate slopes drift for other reasons."""
    batch_size: int = 32
    """Images in the batch."""
    layouts: tuple[str, ...] = ()
    """Several layouts of the started ranks, such as tp=2,pp=2 cp=2; they must agree. Default: the config's."""
    data: bool = False
    """Train on the first batch of data.path instead of a made-up one."""
    gradients: bool = False
    """Also hold the width exponent of every gradient against what the eps rule counts on."""
    activation_bound: float | None = None
    """Of the slope of an output before any update; 0.1 over widths, 0.3 over depths."""
    change_bound: float | None = None
    """Of the slope of an output's change; 0.1 over widths, 0.3 over depths."""
    update_bound: float | None = None
    """Of the slope of a parameter's own update; 0.3."""
    out: Path | None = None
    """Folder for coordcheck.png and coordcheck.json."""
    json: bool = False
    """Print JSON instead of the table."""
