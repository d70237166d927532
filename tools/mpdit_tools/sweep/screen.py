"""What a person sees of a sweep: a line a trial with the best so far, and a bar under it on a terminal."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mpdit_tools.sweep import plan
from mpdit_tools.sweep.results import Record
from mpdit_tools.sweep.space import number
from mpdit_tools.sweep.spec import Spec


class Screen:
    """Lines on stdout, or on stderr where stdout is for JSON."""

    def __init__(self, spec: Spec, *, to_stderr: bool) -> None:
        self._spec = spec
        self._console = Console(stderr=to_stderr, highlight=False, soft_wrap=True, markup=False)
        self._bar: Progress | None = None
        self._total = total(spec)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("trials"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[best]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("sweep", total=self._total, best="")
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text)

    def begin(self, folder: Path, records: Sequence[Record]) -> None:
        over = sum(record.state != "running" for record in records)
        of = f" of {self._total}" if self._total else ""
        self.say(f"{self._spec.mode} search in {folder}{f': going on after {over}{of} trials' if over else ''}")
        self._show(over, "")

    def finished(self, record: Record, records: Sequence[Record]) -> dict[str, float]:
        """Say how a trial ended; the numbers of the line."""
        best = plan.winner(self._spec, records)
        told = {} if record.value is None else {"value": record.value}
        so_far = "no best yet"
        if best is not None:
            told["best"] = best.mean(self._spec.seeds)  # over the search's seeds: others have their own luck
            so_far = f"best {told['best']:.4f} (trial {min(best.by_seed[seed].number for seed in best.seeds)})"
        value = f"{self._spec.metric} {record.value:.4f}" if record.value is not None else record.error
        params = " ".join(f"{key.rpartition('.')[2]}={number(value)}" for key, value in record.params.items())
        seed = f" seed={record.seed}" if len(self._spec.seeds) > 1 or record.kind == "confirm" else ""
        over = sum(one.state != "running" for one in records)
        of = f"/{self._total}" if self._total else ""
        took = f"{record.wall_s:.0f} s"
        self.say(f"trial {record.number} ({over}{of})  {record.state:<8}  {value}  {params}{seed}  {took}  {so_far}")
        self._show(over, so_far)
        return told

    def _show(self, over: int, best: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=over, best=best)


def total(spec: Spec) -> int | None:
    """Trials that the sweep will have at most; None where that depends on what comes out."""
    if spec.mode == "coordinate":
        return spec.trials
    search = spec.trials or 0
    if spec.mode == "grid":
        every = sum(1 for _ in plan.grid(spec)) * len(spec.seeds)
        search = min(search or every, every)
    return search + (spec.confirm.top * len(spec.confirm.seeds) if spec.confirm else 0)
