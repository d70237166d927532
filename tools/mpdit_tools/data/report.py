"""What a build tells: progress while it runs, a table when it is done."""

import json
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mpdit_tools.data.samples import LONGEST

if TYPE_CHECKING:
    from mpdit_tools.data.build import Result

EVERY = 10.0  # seconds between the lines of a log


class Progressing:
    """Tells how far a build is: a bar on a terminal, a line every few seconds elsewhere. A context manager.

    Goes to stderr, so that ``--json`` leaves nothing but JSON on stdout.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._what, self._last = "", 0.0
        self._began, self._there = 0.0, 0  # of what is being done: when, and how much of it was done before
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "Progressing":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """``total`` is 0 for a step that is not counted."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=what, completed=done, total=total or None)
            return
        now = time.monotonic()
        if what != self._what:
            self._began, self._there = now, done
        if what != self._what or now - self._last >= EVERY or (total and done == total):
            self._what, self._last = what, now
            count = f" {done}/{total}" if total else ""
            self._console.print(f"{what}{count}{self._left(now, done, total)}", highlight=False, soft_wrap=True)

    def _left(self, now: float, done: int, total: int) -> str:
        if not self._there < done < total:
            return ""
        return f", {(now - self._began) / (done - self._there) * (total - done):.0f} s left"


def show(result: "Result", out: str, *, as_json: bool) -> None:
    """Prints the closing table, or the manifest's summary as JSON, to stdout."""
    manifest = result.manifest
    size = sum(shard["bytes"] for split in manifest["splits"].values() for shard in split["shards"])
    if as_json:
        samples = {name: split["samples"] for name, split in manifest["splits"].items()}
        told = {
            "out": out,
            "built": result.built,
            "seconds": round(result.seconds, 1),
            "samples": samples,
            "bytes": size,
        }
        print(json.dumps(told | {key: value for key, value in manifest.items() if key != "splits"}))
        return
    table = Table(title=f"{manifest['name']}, {manifest['size']} pixels", title_justify="left")
    table.add_column("what")
    table.add_column("which")
    table.add_column("count", justify="right")
    for name, split in manifest["splits"].items():
        table.add_row("samples", name, f"{split['samples']:,}")
    for heading, key in (("style", "styles"), ("licence", "licences"), ("dropped", "dropped")):
        for name, count in manifest[key].items():
            table.add_row(heading, name, f"{count:,}")
    for name, count in manifest.get("aspects", {}).items():
        table.add_row("width / height", name, f"{count:,}")
    if "cut" in manifest:
        table.add_row("cut", f"to {LONGEST}:1", f"{manifest['cut']:,}")
    if "classes" in manifest:
        table.add_row("classes", "", f"{len(manifest['classes']):,}")
    table.add_row("tokenizer", "pieces", f"{manifest['tokenizer']['vocab_size']:,}")
    table.add_row("bytes", "of all shards", f"{size:,}")
    table.add_row("seconds", "", f"{result.seconds:.1f}")
    console = Console()
    console.print(table)
    state = "written" if result.built else "was there already, from the same inputs and arguments: nothing was done"
    console.print(f"{out} {state}.", highlight=False, soft_wrap=True)
