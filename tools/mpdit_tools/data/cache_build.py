"""A cache out of its parts: computed by several processes, kept when the build is killed, complete in one step."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from mpdit.data import cache
from mpdit.data.cache import Cache, Wanted
from mpdit.errors import InputError
from mpdit_tools.data.cache_parts import Part, Work
from mpdit_tools.data.output import NO_ROOM
from mpdit_tools.data.pool import interrupts_held_back, start_worker
from mpdit_tools.data.shards import write_durably

Progress = Callable[[str, int, int], None]  # told(what is being done, samples done, samples in all)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A cache to build: how many rows, and what makes those of a part."""

    wanted: Wanted
    items: int  # samples or captions
    rows_per_item: int
    work: Callable[[int, int], Work]  # first item, how many
    facts: dict[str, Any]
    beside: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # arrays that lie beside the rows, by name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A cache that is there. `built`: parts computed now; the others were found."""

    kind: str
    split: str
    folder: str
    rows: int
    bytes: int
    parts: int
    built: int
    seconds: float


class Workers:
    """Processes that compute parts; started when there are first two to do, ended by :meth:`close`."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Spawned, not forked: this process has threads.
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def run(self, parts: Sequence[Part]) -> Iterator[int]:
        """Compute each; how many items it was of, as they are done. Raises InputError as they do."""
        if min(self.count, len(parts)) <= 1:
            for part in parts:
                yield part.run()
            return
        try:
            with interrupts_held_back():
                running = [self._started().submit(part.run) for part in parts]
            for future in concurrent.futures.as_completed(running):
                yield future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"--workers {self.count}: a worker process was killed, probably for want of memory; use fewer workers. "
                "What is finished is kept."
            ) from error

    def _started(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.count, mp_context=self._context, initializer=start_worker, initargs=(self._stop,)
            )
        return self._pool

    def close(self) -> None:
        """What has not begun is left out."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def build(plan: Plan, root: Path, per_part: int, workers: Workers, told: Progress) -> Built:
    """Build what `plan` says into `root`, or what is missing of it. Raises InputError as the parts do."""
    began = time.monotonic()
    final = plan.wanted.folder(root)
    starts = range(0, plan.items, per_part)
    todo = 0
    if not (final / "manifest.json").is_file():
        partial = final.with_name(f"{final.name}.partial")
        with _only_builder(partial, root):
            _keep_if_same(partial, {"key": plan.wanted.key, "per_part": per_part, "items": plan.items})
            parts = [
                Part(
                    folder=partial,
                    number=number,
                    first=first,
                    count=(count := min(per_part, plan.items - first)),
                    work=plan.work(first, count),
                )
                for number, first in enumerate(starts)
                if not all((partial / name).is_file() for name in cache.part_names(number))
            ]
            todo, what = len(parts), f"{plan.wanted.kind} of {plan.wanted.split}"
            done = plan.items - sum(part.count for part in parts)
            told(what, done, plan.items)
            for count in workers.run(parts):
                done += count
                told(what, done, plan.items)
            _finish(partial, final, plan, per_part, len(starts))
    found = Cache.open(root, plan.wanted)
    return Built(
        kind=plan.wanted.kind,
        split=plan.wanted.split,
        folder=str(final),
        rows=found.manifest["rows"],
        bytes=sum(file["bytes"] for file in found.manifest["files"].values()),
        parts=len(starts),
        built=todo,
        seconds=round(time.monotonic() - began, 2),
    )


@contextlib.contextmanager
def _only_builder(partial: Path, root: Path) -> Iterator[None]:
    """Raises InputError if another process builds in the folder, or it can't be written."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{partial}: another `mpdit data cache` is building it at the moment.") from None
            yield
    except OSError as error:
        kept = "; what is finished is kept" if error.errno in NO_ROOM else ""
        raise InputError(f"data.cache {root}: can't be written to ({error.strerror}){kept}.") from error


def _keep_if_same(partial: Path, plan: dict[str, Any]) -> None:
    """Remove what a build cut in other parts has left."""
    note = partial / "build.json"
    if note.is_file() and note.read_bytes() == _json(plan):
        return
    for path in partial.iterdir():
        if path.name != ".lock":
            path.unlink()
    write_durably(note, _json(plan))


def _finish(partial: Path, final: Path, plan: Plan, per_part: int, parts: int) -> None:
    """Write the manifest and give the folder its name."""
    for name, array in plan.beside.items():
        cache.write_array(partial / name, array)
    names = sorted([*plan.beside, *(name for part in range(parts) for name in cache.part_names(part))])
    manifest: dict[str, Any] = {
        "format": cache.FORMAT,
        "kind": plan.wanted.kind,
        "split": plan.wanted.split,
        "samples": plan.wanted.samples,
        "depends": plan.wanted.depends,
        "facts": plan.facts,
        "rows": plan.items * plan.rows_per_item,
        "per_part": per_part * plan.rows_per_item,
        "files": {
            name: {"bytes": (partial / name).stat().st_size, "sha256": cache.sha256_of(partial / name)}
            for name in names
        },
    }
    manifest = json.loads(json.dumps(manifest))  # tuples are lists there, and so they are hashed
    manifest["manifest_sha256"] = cache.manifest_sha256(manifest)
    for left in [path for path in partial.iterdir() if path.name not in {".lock", *names}]:  # of killed processes, too
        left.unlink()
    write_durably(partial / "manifest.json", _json(manifest))
    if final.exists():  # without a manifest: no cache
        shutil.rmtree(final)
    os.replace(partial, final)
    (final / ".lock").unlink(missing_ok=True)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
