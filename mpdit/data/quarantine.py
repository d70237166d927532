"""The samples that turned out to be damaged, written down in the run folder, and when there are too many of them."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from mpdit.errors import CheckFailed, InputError

FILE = "quarantine.jsonl"
_SHOWN = 10  # samples in the message, at most


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bad:
    """A sample that can't be used."""

    sample: int
    where: str  # its tar and member
    reason: str  # a few words, to count by


class Quarantine:
    """A file with a JSON line for each bad sample: `sample`, `where`, `reason`, and the `step` when it was found.

    A sample stands there once, over all starts of a run. One process writes it, the first rank's.
    """

    def __init__(self, path: Path, samples: int, max_fraction: float) -> None:
        """`samples`: how many the run trains on; more than `max_fraction` of them bad are too many.

        Raises InputError when the file is there but is something else.
        """
        self._path, self._samples, self._limit = path, samples, max_fraction
        self._known = {bad.sample: bad for bad in _read(path)}
        self._unwritten = ""
        self.trouble: str | None = None  # a sentence, while the storage does not take what is to be written down

    @property
    def count(self) -> int:
        """Bad samples so far, those of earlier starts included."""
        return len(self._known)

    def add(self, found: Iterable[Bad], step: int) -> None:
        """Write down those that are new, safely on disk; where the storage does not take them, with the next ones.
        Raises CheckFailed with a list when it is too many."""
        new = {bad.sample: bad for bad in found if bad.sample not in self._known}
        self._known |= new
        self._unwritten += "".join(json.dumps(dataclasses.asdict(bad) | {"step": step}) + "\n" for bad in new.values())
        if self._unwritten:
            self._write()
        if self.count > self._limit * self._samples:
            raise CheckFailed(
                f"step {step}: {self.count} of {self._samples} samples are damaged, more than data.max_bad_fraction "
                f"{self._limit:g} allows; repair the data set or raise it. {self._path} has them all: {self._some()}."
            )

    def _write(self) -> None:
        written = None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                written = file.tell()
                file.write(self._unwritten)
                file.flush()
                os.fsync(file.fileno())
            self._unwritten, self.trouble = "", None
        except OSError as error:
            self.trouble = f"{self._path} could not be written ({error.strerror}); it is tried again with the next one"
            if written is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, written)

    def _some(self) -> str:
        shown = [f"{bad.where} ({bad.reason})" for bad in [*self._known.values()][:_SHOWN]]
        return ", ".join(shown) + (", …" if self.count > len(shown) else "")


def _read(path: Path) -> list[Bad]:
    """What earlier starts wrote; a last line that a kill left torn is removed, as its sample will be found again."""
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    try:
        rows = [json.loads(line) for line in lines]
        return [Bad(sample=int(row["sample"]), where=str(row["where"]), reason=str(row["reason"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no list of damaged samples; move it away, and the run writes another.") from error
