"""``mpdit plan CONFIG``: what a run will need and how fast it will be, before there are any GPUs."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mpdit.config import Config
from mpdit_tools.mup_table import with_vocabulary
from mpdit_tools.plan.gpus import Machine
from mpdit_tools.plan.resolve import load, of

if TYPE_CHECKING:
    from mpdit_tools.plan.estimate import Estimate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Parameters, memory, FLOPs, pipeline bubble, traffic and the step's time on a GPU of your choice. Needs none.

    The network's own code is run piece by piece on tensors without memory, so the counts are exact; times come from a
    roofline, whose efficiencies are printed.
    """

    config: Annotated[str, tyro.conf.arg(metavar="CONFIG"), tyro.conf.Positional]
    """A config (YAML), a run or launch folder, or the name of a preset such as mmdit-18b."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[section.key=value ...]"), tyro.conf.Positional] = ()
    """Keys of the config to change, for example parallel.tp=8."""
    gpus: int = 0
    """GPUs of the job; 0: as many as the layout needs for one copy of the model."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    gpus_per_node: int = 8
    search: bool = False
    """Rank the layouts of this many GPUs instead: those that fit by expected speed, the others with the reason."""
    top: int = 10
    """How many layouts of each kind a search shows."""
    calibration: Path | None = None
    """A YAML file of measured efficiencies (gemm, attention, memory, node, network, operator_s, collective_s)."""
    out: Path | None = None
    """A folder for plan.json and the figures memory.png and timeline.png."""
    json: bool = False
    """Print plan.json instead of the tables."""


def main(argv: list[str]) -> int:
    """0 if the plan fits the GPU's memory, 1 if it does not. Raises InputError for a layout that can't be."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit plan")
    config, note = with_vocabulary(load(arguments.config, arguments.overrides))
    machine = Machine.of(arguments.gpu, config, arguments.gpus_per_node, arguments.calibration)
    from mpdit.parallel import accel

    accel.enter_to_imagine()
    from mpdit_tools.plan import report, search

    if arguments.search:
        found = search.rank(config, arguments.gpus, machine)
        print(json.dumps(search.as_json(found), indent=1) if arguments.json else search.table(found, arguments.top))
        return 0 if any(one.fits for one in found) else 1
    plan, resolved = of(config, arguments.gpus, machine)
    told = report.as_json(plan, resolved, arguments.gpu, machine)
    if arguments.out is not None:
        write(arguments.out, plan, resolved, told, machine)
    print(json.dumps(told, indent=1) if arguments.json else report.text(plan, resolved, arguments.gpu, machine, note))
    if arguments.out is not None and not arguments.json:
        print(f"{arguments.out}: plan.json, memory.png and timeline.png written.")
    return 0 if report.fits(plan, machine) else 1


def write(folder: Path, plan: "Estimate", config: Config, told: dict[str, Any], machine: Machine) -> None:
    """plan.json and the figures."""
    from mpdit_tools.plan import figures

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    figures.memory(plan, config, machine, folder / "memory.png")
    figures.timeline(plan, config, folder / "timeline.png")
