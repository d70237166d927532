"""``mpdit transfer --from PROXY --to TARGET --out FOLDER``: a launch folder for the target, with the reasons."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mpdit import config as configs
from mpdit.errors import InputError
from mpdit_tools.new_folder import new_folder
from mpdit_tools.transfer.arguments import Arguments

if TYPE_CHECKING:
    from mpdit_tools.transfer.report import Facts


def main(argv: list[str]) -> int:
    """Exit code 0 when the folder is written. Raises InputError, with nothing written, if values don't transfer."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit transfer")
    _check_free(arguments.out)

    from mpdit.parallel import accel

    accel.enter_to_imagine()
    from mpdit_tools.transfer.gather import as_json, gather

    facts = gather(arguments)
    with new_folder(arguments.out) as folder:
        for name, text in files(arguments, facts).items():
            (folder / name).write_text(text, encoding="utf-8")
    for warning in facts.warnings:
        print(f"mpdit: {warning}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(as_json(facts), indent=1))
    else:
        _tell(facts)
    return 0


def files(arguments: Arguments, facts: "Facts") -> dict[str, str]:
    """The launch folder: name -> contents."""
    from mpdit.mup.table import rows
    from mpdit_tools.transfer import launch, report

    config, what = facts.pair.target, report.title(facts.pair)
    found = {
        "config.yaml": f"# {what}. Written by mpdit transfer; REPORT.md says why.\n{configs.dump(config)}",
        "mup_table.json": json.dumps(rows(dict(sorted(facts.pair.table.items()))), indent=1) + "\n",
        "plan.json": json.dumps(facts.plan, indent=1) + "\n",
        "REPORT.md": report.markdown(facts),
        "launch.sh": launch.torchrun(facts.machines, what),
    }
    if arguments.scheduler != "torchrun":
        found["launch.sbatch"] = launch.slurm(facts.machines, what, arguments.out, arguments.image)
    if arguments.scheduler == "kubeflow":
        image = arguments.image or "mpdit"
        found["launch.yaml"] = launch.kubeflow(facts.machines, what, arguments.out, image, arguments.claim)
    return found


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out}: is there already; name a folder that does not exist, or is empty.")


# ---- what is said ----------------------------------------------------------------------------------------------------


def _tell(facts: "Facts") -> None:
    from mpdit_tools import mup_table
    from mpdit_tools.transfer import cost, explain, report

    lines = explain.lines(facts.pair)
    print(f"{report.title(facts.pair)}, from {facts.source.name}, {facts.source.said}", end="\n\n")
    mup_table.show(
        ["", "proxy", "rule", "target", "why"],
        [[line.name, line.proxy, line.rule, line.target, line.why] for line in lines],
    )
    if facts.cost:
        counted = f", {cost.percent(facts.cost.flops_share)} of its FLOPs" if facts.cost.flops_share else ""
        share = cost.percent(facts.cost.share)
        print(f"\nCost of {facts.cost.trials} trials: R S B T / (S B T) = {share} of the target's run{counted}.")
    print(f"\n{facts.folder} is written; REPORT.md there has the reasons. Next:")
    for command in report.commands(facts.folder):
        print(f"  {command}")
