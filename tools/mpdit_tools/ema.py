"""``mpdit ema``: the average of a run's weights that it would have had with another width, made after the training."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from mpdit.errors import InputError
from mpdit.train import profiles


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Make the power-function average of another width out of the snapshots of a run with train.posthoc_ema.

    Draw with it: mpdit sample RUN --weights DIR. Method: Karras et al., arXiv 2312.02696, section 3.
    """

    run: Annotated[Path, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]
    """The run folder."""
    sigma_rel: float
    """The width, a share of the run's length: 0.05 is a short average, 0.15 a long one."""
    step: int | None = None
    """The average as it was after this step; the last snapshot's by default."""
    out: Path | None = None
    """The folder to make; RUN/ema/sigma_S-step_N by default."""
    max_error: float = 0.05
    """Refuse when the profile that the snapshots can make is further than this from the one asked for (relative)."""
    json: bool = False
    """Print what was made as JSON."""


def main(argv: list[str]) -> int:
    """Exit code 0. Raises InputError for a run without good snapshots, CheckFailed where they are too few."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit ema")
    if not 0.001 <= arguments.sigma_rel <= profiles.WIDEST:
        raise InputError(f"--sigma-rel {arguments.sigma_rel:g}: should be between 0.001 and {profiles.WIDEST}.")
    from mpdit.parallel import accel

    accel.enter()
    from mpdit_tools import posthoc

    made = posthoc.make(arguments.run, arguments.sigma_rel, arguments.step, arguments.out, arguments.max_error)
    if arguments.json:
        print(json.dumps(made, indent=1))
        return 0
    print(f"{made['out']}: sigma_rel {made['sigma_rel']:g} after step {made['step']}, of {made['averages']} averages")
    print(f"its profile is within {made['error']:.2g} of the one asked for")
    print(f"draw with it: mpdit sample {arguments.run} --weights {made['out']} --prompts FILE")
    return 0
