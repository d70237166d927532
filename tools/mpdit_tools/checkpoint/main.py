"""``mpdit checkpoint list | verify | reshard``."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from mpdit.errors import CheckFailed, InputError
from mpdit.train import checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class List:
    """The checkpoints of a run: step, bytes, age, whether they are complete by name and size, and who wrote them."""

    run: Annotated[Path, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]
    """The run folder."""
    json: bool = False
    """Print JSON instead of the table."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """Read every byte and compare it with the manifest. Exit code 1 if anything is missing or damaged."""

    path: Annotated[Path, tyro.conf.arg(metavar="PATH"), tyro.conf.Positional]
    """A run folder, for all of its checkpoints, or one RUN/checkpoints/step_N."""
    json: bool = False
    """Print JSON instead of lines."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reshard:
    """Write a checkpoint again, in the files that the ranks of another layout would write; by default one rank's.

    Training and drawing load any checkpoint into any layout as it is: this is for moving one, or for storage that is
    fast only with many files. Under torchrun the processes share the work.
    """

    path: Annotated[Path, tyro.conf.arg(metavar="PATH"), tyro.conf.Positional]
    """A folder RUN/checkpoints/step_N."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[parallel.key=value ...]"), tyro.conf.Positional] = ()
    """The layout, for example parallel.tp=8 parallel.pp=4."""
    out: Path
    """The folder to make, for example OTHER_RUN/checkpoints/step_N. It appears when it is whole."""
    ranks: int = 0
    """Ranks of the layout; 0: as many as hold one copy of the model."""
    config: Path | None = None
    """The run's config; RUN/config.yaml by default."""


COMMANDS: dict[str, tuple[Callable[[Any], int], type[Any]]]


def main(argv: list[str]) -> int:
    """Exit code 0, or 1 where a checkpoint is damaged. Raises InputError and CheckFailed."""
    usage = "usage: mpdit checkpoint list | verify | reshard [ARGUMENTS]    (mpdit checkpoint list --help tells more)"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise InputError(f"mpdit checkpoint: no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}.")
    command, kind = COMMANDS[argv[0]]
    return command(tyro.cli(kind, args=argv[1:], prog=f"mpdit checkpoint {argv[0]}"))


def _list(arguments: List) -> int:
    folders = [path for _, path in checkpoints.steps(arguments.run)] + checkpoints.unfinished(arguments.run)
    if not folders:
        raise InputError(f"{arguments.run}: has no checkpoints; it should be a run folder of mpdit train.")
    entries = [checkpoints.entry(path, time.time()) for path in folders]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "bytes", "age", "status", "format", "written by")
    for entry in entries:
        written = f"{entry.ranks} ranks {_layout(entry.layout or {})}" if entry.ranks else ""
        step = "?" if entry.step is None else str(entry.step)
        table.add_row(step, f"{entry.bytes:,}", _age(entry.age_s), entry.status, entry.format or "", written)
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)
    for entry in entries:
        if entry.problem:
            print(entry.problem)
    return 0


def _layout(layout: dict[str, Any]) -> str:
    sizes = [f"{name.upper()}{layout[name]}" for name in ("tp", "pp", "vpp", "cp") if layout.get(name, 1) != 1]
    return " ".join([*sizes, *(["SP"] if layout.get("sp") else []), str(layout.get("precision", ""))])


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _verify(arguments: Verify) -> int:
    path = arguments.path
    folders = [found for _, found in checkpoints.steps(path)] or [path]
    found: dict[str, list[str]] = {}
    for folder in folders:
        try:
            found[str(folder)] = checkpoints.problems(folder)
        except InputError as error:
            if not folder.is_dir():
                raise
            found[str(folder)] = [str(error)]
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for name, problems in found.items():
            print(f"{name}: {'complete and undamaged' if not problems else f'{len(problems)} damaged or missing'}")
            print("".join(f"  {problem}\n" for problem in problems), end="")
    bad = [name for name, problems in found.items() if problems]
    if bad:
        raise CheckFailed(f"{len(bad)} of {len(found)} checkpoints can't be used: {', '.join(bad)}.")
    return 0


def _reshard(arguments: Reshard) -> int:
    from mpdit.parallel import accel

    accel.enter()
    from mpdit_tools.checkpoint import reshard

    said = reshard.reshard(
        arguments.path, arguments.out, arguments.overrides, ranks=arguments.ranks, config_file=arguments.config
    )
    if said:
        print(said)
    return 0


COMMANDS = {"list": (_list, List), "verify": (_verify, Verify), "reshard": (_reshard, Reshard)}
