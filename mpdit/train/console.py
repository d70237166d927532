"""What a person sees: a progress bar on a terminal, plain lines elsewhere; silence on every rank but the first."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Progress of a run from `start` to `steps`. A line every `log_every` steps where there is no terminal."""

    def __init__(self, start: int, steps: int, log_every: int, *, quiet: bool) -> None:
        self._console = Console(stderr=False, quiet=quiet, highlight=False, soft_wrap=True)
        self._steps, self._log_every = steps, log_every
        self._bar: Progress | None = None
        self._began, self._start = time.monotonic(), start
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, loss=float("nan"), rate="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text)

    def step(self, done: int, row: Mapping[str, Any]) -> None:
        """`done` steps are finished; `row` is the last one's line of metrics.jsonl."""
        loss, rate = row["loss"], f"{row['images_per_s']:.1f} images/s"
        if "mfu" in row:
            rate += f"  {row['tflops_per_gpu']:.0f} TFLOP/s a GPU ({100 * row['mfu']:.0f} %)"
        if self._bar:
            self._bar.update(self._task, completed=done, loss=loss, rate=rate)
        elif done % self._log_every == 0 or done == self._steps:
            left_s = (time.monotonic() - self._began) / max(1, done - self._start) * (self._steps - done)
            self.say(f"step {done}/{self._steps}  loss {loss:.4f}  {rate}  {_clock(left_s)} left")
            sys.stdout.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
