"""Run the coordinate check with one rule broken at a time: python examples/ablations/run.py [fault ...]

For each fault a folder with a page and figures is written beside this file, and README.md with all of them. Faults that
need several ranks start them by torchrun. Exit code 1 if a fault was not caught where it has to be.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from faults import FAULTS, Fault, broken  # noqa: E402

CONFIGS = HERE.parent / "coordcheck"
SEEDS, STEPS = 4, (1, 2)


def check(name: str, arch: str) -> dict[str, Any]:
    """One fault in one model, in this world: what the check says. Writes the figure."""
    from mpdit import config as configs
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.parallel import groups
    from mpdit_tools.coordcheck import check as checks
    from mpdit_tools.coordcheck import figure, report
    from mpdit_tools.coordcheck.main import Arguments

    fault = FAULTS[name]
    config = configs.load(CONFIGS / f"{arch}.yaml", fault.more)
    arguments = Arguments(config=CONFIGS / f"{arch}.yaml", seeds=SEEDS, steps=STEPS, layouts=fault.layouts)
    plan = checks.plan(arguments, config, groups.world_size())
    with broken(fault):
        outcomes = checks.run(plan, lambda *_: None)
    last = outcomes[-1]
    if groups.rank() == 0:
        figure.save(last, f"{arch}: {fault.sentence}", HERE / name / f"{arch}.png")
    return {
        "fault": name,
        "arch": arch,
        "table": list(report.rows(last)),
        "culprits": report.culprits(last),
        "layouts": checks.disagreement(outcomes),
        "caught": caught(fault, last, checks.disagreement(outcomes)),
    }


def caught(fault: Fault, outcome: Any, disagreement: str) -> bool:
    """Whether the statistic that has to show it does, for the group of parameters that has to be named."""
    statistic, group = fault.expected
    if statistic == "layouts":
        return bool(disagreement)
    names = {
        name.rsplit(".", 1)[0] if statistic != "update" else name
        for name, tag in outcome.tags.items()
        if tag.group == group
    }
    return any(f.key.statistic == statistic and f.key.name in names for f in outcome.findings)


def run(name: str, arch: str) -> dict[str, Any]:
    """:func:`check` in as many ranks as the fault needs."""
    ranks = FAULTS[name].ranks
    launcher = (
        [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    )
    done = subprocess.run([*launcher, __file__, "--one", name, arch], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def page(name: str, results: list[dict[str, Any]]) -> str:
    fault = FAULTS[name]
    lines = [f"# {name}", "", f"Broken on purpose: {fault.sentence}.", ""]
    for result in results:
        said = result["culprits"] + ([result["layouts"]] if result["layouts"] else [])
        lines += [
            f"## {result['arch']}",
            "",
            "| statistic | step | how many | worst slope | of | bound | |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in result["table"]]
        lines += [
            "",
            *(f"* {sentence}" for sentence in said),
            "",
            f"![{name}, {result['arch']}]({result['arch']}.png)",
            "",
        ]
    return "\n".join(lines)


def summary(results: dict[str, list[dict[str, Any]]]) -> str:
    """README.md: what is broken, what catches it, what it says."""
    lines = [
        "# Rules broken on purpose",
        "",
        "Each row breaks one rule and runs `mpdit coordcheck` (widths 32 to 256, "
        f"{SEEDS} seeds, steps 1 and 2); written by `python examples/ablations/run.py`.",
        "",
        "| broken | model | caught by | what the check says |",
        "|---|---|---|---|",
    ]
    for name, rows in results.items():
        for row in rows:
            out = [f"{line[0]} at step {line[1]}: {line[3]} ({line[4]})" for line in row["table"] if line[-1] == "OUT"]
            by = "; ".join(out[:2]) or row["layouts"] or "**nothing**"
            said = (row["culprits"] or [row["layouts"]])[0]
            lines.append(f"| [{FAULTS[name].sentence}]({name}/README.md) | {row['arch']} | {by} | {said} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="fault", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--one", nargs=2, metavar=("FAULT", "ARCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        outcome = check(*arguments.one)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(outcome), flush=True)
        return 0
    unknown = [name for name in arguments.faults if name not in FAULTS]
    if unknown:
        parser.error(f"no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    kept = HERE / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in arguments.faults or list(FAULTS):
        results[name] = [run(name, arch) for arch in FAULTS[name].archs]
        (HERE / name).mkdir(exist_ok=True)
        (HERE / name / "README.md").write_text(page(name, results[name]))
        print(name, *("caught" if r["caught"] else "NOT CAUGHT" for r in results[name]), flush=True)
        kept.write_text(json.dumps(results, indent=1) + "\n")
    results = {name: results[name] for name in FAULTS if name in results}
    (HERE / "README.md").write_text(summary(results))
    return 0 if all(row["caught"] for rows in results.values() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
