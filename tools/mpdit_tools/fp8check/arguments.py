"""What ``mpdit fp8check`` can be asked."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What may be lost. A recipe that loses more at some width fails the check."""

    gap_bound: float = 0.0025
    """Of (loss - loss in bf16) / loss in bf16 over the second half of the steps, less twice its noise. The default is
    what DeepSeek-V3 reports for all of its training (arXiv 2412.19437, section 3.3)."""
    underflow_bound: float = 0.01
    """Of the share of a tensor's numbers that are not zero but become it."""
    saturation_bound: float = 0.001
    """Of the share that is beyond the largest code."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments(Bounds):
    """What does FP8 do to this model, at this width and at wider ones? Exit code 1 if a bound is crossed.

    Copies of CONFIG's model at several widths under its own parametrization are trained for a few steps in bf16, in
    fp32 for comparison and in emulated FP8 under each recipe, from the same weights on the same batches. Shown are the
    gap of the losses, and for the input, weight and output gradient of every FP8 linear what underflows, saturates and
    is rounded off, with the slope of each over the width. One process, needs no GPU; CONFIG's layout is left aside.
    """

    config: Annotated[Path, tyro.conf.arg(metavar="CONFIG"), tyro.conf.Positional]
    """The YAML file, or a run folder."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="section.key=value"), tyro.conf.Positional] = ()
    """Keys of the config."""
    widths: tuple[int, ...] = ()
    """Default: mup.base_width times 1, 2, 4."""
    recipes: tuple[Recipe, ...] = ("tensorwise", "delayed", "blockwise", "mxfp8")
    """Values of parallel.fp8_recipe."""
    steps: int = 40
    """Of training. CONFIG's learning rate, clipping and decay hold, its schedule does not: the rate is constant."""
    seeds: int = 2
    """Of initial weights; the gaps' noise is seen between them."""
    looks: int = 3
    """Steps of the second half, the last one among them, at which tensors are looked at."""
    batch_size: int = 16
    """Images in a batch."""
    data: bool = False
    """Train on data.path instead of made-up pictures."""
    out: Path | None = None
    """Folder for fp8check.png and fp8check.json."""
    json: bool = False
    """Print JSON instead of the tables."""
