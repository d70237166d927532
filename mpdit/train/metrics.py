"""RUN/metrics.jsonl, the truth about a run: a line a step, written before anything else hears of it."""

import contextlib
import errno
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpdit.errors import CheckFailed

_SYNC_EVERY_S = 1.0  # what a power cut can cost
_WAITING = 16 * 2**20  # bytes of lines that may wait in memory: some 50,000 steps
_CLOSING_S = 60.0
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EROFS)  # what a file says that can't be synced at all


class Metrics:
    """Appends one JSON object a line to `path`.

    Each line is with the operating system before :meth:`log` returns (a killed process loses none), and on the disk a
    second later (a thread calls fsync, so that no step waits for a disk). Lines that the disk does not take, now or in
    an fsync later, stay in memory and are tried again each second, with one line to `warn` of what is at risk and one
    when they are in the file; training goes on. When `capacity` bytes wait, or lines still wait at :meth:`close`, the
    run stops with CheckFailed: a run that nobody can read afterwards should not go on. Half a line is never left in
    the file by a write that failed.

    `resume_at` is the first step that will be logged again: lines of that step and later ones, and lines that a crash
    left torn, are removed, so that the file reads like that of an unbroken run. `kept` and `removed` count lines.
    Raises OSError when the file can't be read or opened.
    """

    def __init__(
        self,
        path: str | Path,
        resume_at: int = 0,
        *,
        warn: Callable[[str], None] | None = None,
        capacity: int = _WAITING,
    ) -> None:
        self.path = Path(path)
        self._warn, self._capacity = warn or _to_stderr, capacity
        self.kept, self.removed = _keep_before(self.path, resume_at)
        if self.kept < resume_at:
            self._warn(f"{self.path}: lacks {resume_at - self.kept} of the {resume_at} steps before this start.")
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._changed = threading.Condition()  # guards what follows
        self._tail: deque[bytes] = deque()  # lines that are not known to be on the disk, oldest first
        self._written = 0  # so many of them are with the operating system
        self._bytes = 0  # in the tail
        self._durable = self._end = os.fstat(self._file).st_size  # bytes on the disk, and with the operating system
        self._trouble: OSError | None = None  # since a write failed: until it is None again, only the thread writes
        self._closing = self._closed = False
        self._disk = threading.Lock()  # held by whoever waits for the disk
        self._thread = threading.Thread(target=self._keep, name="metrics", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Write `row`, which has a whole number under "step". Numbers that JSON lacks (nan, inf) become null.

        Raises CheckFailed when more lines than memory is set aside for wait for the disk.
        """
        if not isinstance(row.get("step"), int):
            raise ValueError(f"a line of {self.path.name} needs a whole number 'step', got {row.get('step')!r}")
        line = (json.dumps(plain(row), allow_nan=False) + "\n").encode()
        with self._changed:
            if self._closed:
                raise ValueError(f"{self.path.name} is closed")
            self._tail.append(line)
            self._bytes += len(line)
            if self._trouble is None:
                self._write()
            self._bound()
            self._changed.notify_all()

    def sync(self) -> bool:
        """Make every line survive a power cut; True if all do. To be called before a checkpoint is marked complete."""
        if not self._closed:
            self._settle()
        return self._trouble is None

    def close(self) -> None:
        """Sync and close; may be called twice. Raises CheckFailed, naming the steps, if lines could not be written."""
        with self._changed:
            if self._closed:
                return
            self._closing = self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSING_S)
        with self._changed:
            lost = [json.loads(line)["step"] for line in list(self._tail)[self._written :]]
            reason = self._trouble
        if not self._thread.is_alive():
            os.close(self._file)
        if lost:
            steps = f"step {lost[0]}" if len(lost) == 1 else f"the {len(lost)} steps {lost[0]} to {lost[-1]}"
            raise CheckFailed(f"{self.path}: could not be written ({_why(reason)}); it lacks {steps}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            self.close()
        except CheckFailed as error:
            if kind is None:
                raise
            self._warn(str(error))  # what ended the run comes first

    # ---- the disk ----------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """The thread: once a second, whatever is not on the disk is brought there."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._tail)
                closing = self._closing
            self._settle()
            if closing:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=_SYNC_EVERY_S)

    def _settle(self) -> None:
        with self._disk:
            if self._trouble is None:
                self._fsync()
            else:
                self._recover()

    def _fsync(self) -> None:
        end = self._end
        try:
            os.fsync(self._file)
        except OSError as error:
            if error.errno not in _NO_FSYNC:
                with self._changed:  # nobody knows what the disk has of what it was given since the last good one
                    self._end, self._written = self._durable, 0
                    self._fail(error)
                return
        with self._changed:
            while self._written and self._durable + len(self._tail[0]) <= end:
                self._forget()

    def _recover(self) -> None:
        """Bring what waits to the disk, without holding up :meth:`log`, which only adds to it meanwhile."""
        waiting, written = len(self._tail), self._written
        try:
            while self._written < waiting:
                os.ftruncate(self._file, self._end)
                self._put(self._tail[self._written])
        except OSError as error:
            self._trouble = error
            return
        trouble = self._trouble
        self._fsync()
        with self._changed:
            if self._trouble is trouble:
                self._trouble = None
                self._write()  # what came meanwhile
                self._warn(f"{self.path} is written again; the {waiting - written} lines that waited are in it.")

    def _write(self) -> None:
        try:
            while self._written < len(self._tail):
                self._put(self._tail[self._written])
        except OSError as error:
            self._fail(error)

    def _put(self, line: bytes) -> None:
        """Append one line, or nothing."""
        rest = line
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # then it is done before the next try
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)
        self._written += 1

    def _fail(self, error: OSError) -> None:
        if self._trouble is None:
            self._warn(
                f"{self.path}: can't be written ({_why(error)}); training goes on and its lines wait in memory, lost "
                "if the process is killed. Make room or mend the disk; writing is tried again every second."
            )
        self._trouble = error

    def _forget(self) -> None:
        """The oldest line need not be written again."""
        size = len(self._tail.popleft())
        self._written, self._bytes = self._written - 1, self._bytes - size
        self._durable += size

    def _bound(self) -> None:
        while self._bytes > self._capacity and self._written and self._trouble is None:  # an fsync that hangs
            self._forget()
        if self._bytes > self._capacity:
            raise CheckFailed(
                f"{self.path}: {len(self._tail)} lines wait in memory for a disk that does not take them "
                f"({_why(self._trouble)}); make room or mend it, and start again: the run goes on from its newest "
                "checkpoint."
            )


def _why(error: OSError | None) -> str:
    return (error.strerror or str(error)) if error else "the disk does not answer"


def _to_stderr(line: str) -> None:
    print(f"mpdit: {line}", file=sys.stderr, flush=True)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in the order of the file; a line that a crash left torn is left out."""
    with Path(path).open("rb") as lines:
        return [row for row in map(parse, lines) if row is not None]


def parse(line: bytes) -> dict[str, Any] | None:
    """A line of a metrics.jsonl; None if it is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _keep_before(path: Path, step: int) -> tuple[int, int]:
    """Remove torn lines and those of `step` and later; how many lines were kept and removed."""
    if not path.exists():
        return 0, 0
    kept = removed = 0
    rest = path.with_name(path.name + ".tmp")
    with path.open("rb") as lines, rest.open("wb") as out:
        for line in lines:
            row = parse(line)
            if row is None or row["step"] >= step:
                removed += 1
            else:
                kept += 1
                out.write(line.rstrip(b"\r\n") + b"\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(rest, path)
    return kept, removed


def plain(value: Any) -> Any:
    """`value` as JSON has it; tensors and numpy scalars of one element become numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)
