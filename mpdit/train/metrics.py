"""RUN/metrics.jsonl, the truth about a run: a line a step, written before anything else hears of it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class Metrics:
    """Appends one JSON object a line to `path`; each line is with the operating system before :meth:`log` returns.

    `resume_at` is the first step that will be logged again: lines of that step and later ones, and lines that a crash
    or a full disk left torn, are removed, so that the file reads like that of an unbroken run. `kept` and `removed`
    count lines. Raises OSError when the file can't be read or written: a run without its record should not go on.
    """

    def __init__(self, path: str | Path, resume_at: int = 0) -> None:
        self.path = Path(path)
        self.kept, self.removed = _keep_before(self.path, resume_at)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, row: Mapping[str, Any]) -> None:
        """Write `row`, which has a whole number under "step". Numbers that JSON lacks (nan, inf) become null."""
        if not isinstance(row.get("step"), int):
            raise ValueError(f"a line of {self.path.name} needs a whole number 'step', got {row.get('step')!r}")
        self._file.write(json.dumps(plain(row), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make every line survive a power cut. To be called before a checkpoint is marked complete."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; may be called twice."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in the order of the file; a line that a crash left torn is left out."""
    with Path(path).open("rb") as lines:
        return [row for row in map(_parse, lines) if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
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
            row = _parse(line)
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
