"""The run folder, which one job writes at a time, and what stands behind it."""

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

from mpdit import files
from mpdit.config import Config, dump, to_dict
from mpdit.errors import InputError
from mpdit.mup.table import Table, rows
from mpdit.parallel import groups
from mpdit.redact import redact_uri
from mpdit.train.console import Reporter
from mpdit.train.environment import environment
from mpdit.train.metrics import Metrics
from mpdit.train.sets import Sets
from mpdit.train.tracking import Tracker

_LETTING_GO_S = 5.0  # a job that was just killed may take a moment to let go of its run folder


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the run folder for this job, until its process ends. Raises InputError if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        deadline = time.monotonic() + _LETTING_GO_S
        while not _locked(file):
            if time.monotonic() > deadline:
                raise InputError(f"run.dir {folder}: another job is training there; stop it, or give another.")
            time.sleep(0.1)
        yield


def _locked(file: IO[str]) -> bool:
    # Of the process alone: whatever is forked off rank 0 would inherit a flock and, outliving a rank 0 that was killed,
    # keep the restarted one out.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


class Recorder:
    """Only the first rank writes; the others' calls do nothing."""

    def __init__(self, config: Config, asked: Config, sets: Sets, table: Table, start: int) -> None:
        self.dir = Path(config.run.dir)
        self.first = groups.rank() == 0
        self._open = contextlib.ExitStack()
        self.metrics: Metrics | None = None
        self.tracker: Tracker | None = None
        if self.first:
            open_values = dataclasses.replace(config, parallel=asked.parallel)
            # Each start writes these again: a kill leaves those of the start before.
            files.replace(self.dir / "config.yaml", redact_uri(dump(open_values)))
            sets.tokenizer.save(self.dir)  # pictures need no data set
            if sets.autoencoder is not None:
                sets.autoencoder.save(self.dir)
            _write_json(self.dir / "mup_table.json", rows(table))
            _write_json(self.dir / "environment.json", environment())
            self.metrics = self._open.enter_context(Metrics(self.dir / "metrics.jsonl", start, warn=_warn))
            self.tracker = self._open.enter_context(
                Tracker(self.dir, uri=config.run.mlflow_uri, experiment=config.run.experiment, params=to_dict(config))
            )
            self.tracker.log_file(self.dir / "mup_table.json")
        self.report = self._open.enter_context(
            Reporter(start, config.train.steps, config.train.log_every, quiet=not self.first)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def log(self, row: dict[str, Any]) -> None:
        if self.metrics and self.tracker:
            self.metrics.log(row)
            self.tracker.log(row)

    def sync(self) -> None:
        """Make the lines so far survive a power cut."""
        if self.metrics:
            self.metrics.sync()

    def picture(self, path: Path) -> None:
        if self.tracker:
            self.tracker.log_file(path, "samples")


def _write_json(path: Path, value: Any) -> None:
    files.replace(path, json.dumps(value, indent=1) + "\n")


def _warn(text: str) -> None:
    print(f"mpdit: {text}", flush=True)
