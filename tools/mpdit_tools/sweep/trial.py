"""One trial: `mpdit train` as a child process, watched through the metrics.jsonl of its run folder."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mpdit.config import suggestion
from mpdit.errors import InputError
from mpdit.redact import redact_uri
from mpdit.train.metrics import read_metrics
from mpdit_tools.sweep import leash
from mpdit_tools.sweep.results import State
from mpdit_tools.sweep.space import Params
from mpdit_tools.sweep.spec import Prune, Spec
from mpdit_tools.sweep.study import Outcome

TRAIN = [sys.executable, "-m", "mpdit", "train"]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# A trial is no rank of whatever started the sweep.
_LAUNCHERS = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
_DIVERGED = 1.25  # x the first loss: such a run has learned nothing


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """What a worker gives its trials of this machine: threads, and GPUs where there are some."""

    threads: int
    devices: tuple[str, ...] = ()

    def environment(self, ranks: int) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not _LAUNCHERS.fullmatch(name)}
        kept.setdefault("OMP_NUM_THREADS", str(max(1, self.threads // ranks)))
        if self.devices:
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        return kept


def visible_devices(dev: Path = Path("/dev")) -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    # CUDA counts from 0 whatever numbers the devices have, as in a container that was given some of a machine's.
    return [str(number) for number, _ in enumerate(dev.glob("nvidia[0-9]*"))]


class Child:
    """The running process of a trial in `folder`, its run folder."""

    def __init__(self, config: Path, folder: Path, params: Params, more: Mapping[str, Any], ranks: int, slot: Slot):
        keys = {**params, **more, "run.dir": str(folder)}
        train = TRAIN if ranks == 1 else [*_TORCHRUN, str(ranks), *TRAIN[1:]]
        command = [*train, str(config), *(f"{key}={json.dumps(value)}" for key, value in keys.items())]
        held = [sys.executable, "-I", "-S", str(leash.__file__), str(os.getpid()), *command]
        self.folder, self.began = folder, time.monotonic()
        self._tail = Tail(folder / "metrics.jsonl")
        with (folder / "stdout.log").open("ab") as out, (folder / "stderr.log").open("wb") as error:
            # A group of its own: Ctrl-C on the terminal is for the sweep, which then ends its trials.
            self.process = subprocess.Popen(
                held, stdin=subprocess.DEVNULL, stdout=out, stderr=error, env=slot.environment(ranks), process_group=0
            )

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    def new_rows(self) -> list[dict[str, Any]]:
        return self._tail.new_rows()

    def outcome(self, spec: Spec) -> Outcome:
        """How the process ended, which it did by itself. Raises InputError if its run has no ``spec.metric``."""
        rows = _rows(self.folder)
        images, wall_s = _images(rows), round(time.monotonic() - self.began, 2)
        if self.code != 0:
            said = (self.folder / "stderr.log").read_text(encoding="utf-8", errors="replace")
            if self.code == 1 and "the run has diverged" in said:
                return Outcome(state="diverged", value=None, images=images, wall_s=wall_s)
            error = last_words(said, self.code or 0)
            return Outcome(state="failed", value=None, images=images, wall_s=wall_s, error=error)
        value = final(rows, spec.metric, self.folder)
        first = next((row["loss"] for row in rows if row.get("loss") is not None), math.inf)
        ceiling = spec.diverged_above
        if ceiling is None and spec.metric.endswith("loss"):
            ceiling = _DIVERGED * first
        if value is None or not math.isfinite(value) or (ceiling is not None and value > ceiling):
            return Outcome(state="diverged", value=None, images=images, wall_s=wall_s)
        return Outcome(state="complete", value=value, images=images, wall_s=wall_s)

    def given_up(self, state: State) -> Outcome:
        """The outcome of a child that did not come to a value."""
        return Outcome(
            state=state, value=None, images=_images(_rows(self.folder)), wall_s=round(time.monotonic() - self.began, 2)
        )


def stop(children: Sequence[Child]) -> None:
    """End them: asked first, so that they close their records, then made to. Their run folders stay."""
    for ask, patience_s in ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0)):
        for child in children:
            if child.code is None:
                child.process.send_signal(ask)
        deadline = time.monotonic() + patience_s
        while any(child.code is None for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)  # it, and what it started
        child.process.wait()


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def _images(rows: list[dict[str, Any]]) -> int:
    return int(rows[-1].get("images", 0)) if rows else 0


def final(rows: Iterable[Mapping[str, Any]], metric: str, folder: Path) -> float | None:
    """The last value of a metric; None where the run wrote that it is no number.

    Raises InputError if no line has it, naming what there is.
    """
    found = [row[metric] for row in rows if metric in row]
    if not found:
        known = sorted({name for row in rows for name, value in row.items() if isinstance(value, int | float)})
        raise InputError(
            f"metric: {folder / 'metrics.jsonl'} has no {metric!r} in any line{suggestion(metric, known)}."
        )
    return None if found[-1] is None else float(found[-1])


def last_words(said: str, code: int) -> str:
    """Why a process ended: the signal, or the last line of its stderr; without credentials, at most 300 characters.

    mpdit's own sentence comes first: under torchrun a page on the ranks follows it.
    """
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in said.splitlines() if re.search(r"\w", line)]
    told = [line for line in lines if line.startswith("mpdit: ")] or lines or [f"exit code {code} without a word"]
    return redact_uri(told[-1])[:300]


def drop_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


# ---- watching --------------------------------------------------------------------------------------------------------


class Tail:
    """Whole new lines of a metrics.jsonl that grows, and that a run which goes on writes anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._inode = path, 0, -1

    def new_rows(self) -> list[dict[str, Any]]:
        try:
            file: IO[bytes] = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._at, self._inode = 0, inode
            file.seek(self._at)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._at += len(whole)
        rows = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class Looks:
    """What the pruner is told: at every `every`-th step the mean of the losses since the look before, or the
    validation losses as they come."""

    def __init__(self, prune: Prune) -> None:
        self._prune = prune
        self._since: list[float] = []

    def of(self, rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
        """(finished steps, value) of the looks that `rows` complete."""
        found = []
        for row in rows:
            value, done = row.get(self._prune.metric), row["step"] + 1
            if value is None:
                continue
            if self._prune.metric == "val_loss":
                found.append((done, float(value)))
                continue
            self._since.append(float(value))
            if done % self._prune.every == 0:
                found.append((done, sum(self._since) / len(self._since)))
                self._since = []
        return found
