"""A rank that hangs or has died ends the job, by name, so that whoever started the job starts it again.

A thread of each rank leaves a sign of life every other second in the world's key-value store (torch's c10d store: in
memory, seen from every node, and still there when storage is not, which is when ranks hang). Nobody looks there until a
rank has made no progress for ``guard.hang_timeout_s``. A step pays for noting where it is: a microsecond.
"""

import contextlib
import dataclasses
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from mpdit.config import Guard
from mpdit.parallel import groups
from mpdit.train.launcher import tell_launcher
from mpdit.train.signals import Signals

PHASES = (  # in a step's order
    "start",
    "data",
    "forward and backward",
    "average",
    "gradient norm",
    "update",
    "validation",
    "pictures",
    "save",
)
_FIRST = 3  # x the timeout: the first step compiles kernels and opens data
_BEAT_S = 2.0
_SILENT = 3  # beats that a rank misses before it counts as gone
_NAMED = 8  # ranks in a sentence
_FRAMES = 4  # of a stack in it
_WAITING = ("torch/distributed", "megatron/core")  # where a rank is that waits for others
_STDERR = 2


def collective_timeout_s(guard: Guard) -> float:
    """For process groups: the watchdog, which can tell why, comes first; this is for a process whose threads hang."""
    return guard.hang_timeout_s * (_FIRST + 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A rank's sign of life."""

    rank: int
    host: str
    pid: int
    count: int  # -1: of one that gives no more
    step: int
    phase: str
    stack: tuple[str, ...] = ()  # where its main thread is, innermost first; of ranks that have made no progress

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    @property
    def waits(self) -> bool:
        return bool(self.stack) and any(place in self.stack[0] for place in _WAITING)

    def __str__(self) -> str:
        does = "gives no sign of life, last" if self.count < 0 else "is"
        places = [frame.rpartition("site-packages/")[2] for frame in self.stack]
        where = f" ({' < '.join(places)})" if places else ""
        return f"rank {self.rank} (host {self.host}, pid {self.pid}) {does} at step {self.step}, {self.phase}{where}"


def blamed(beats: Sequence[Beat]) -> list[Beat]:
    """Those whom the others wait for: dead or stopped ones, else those that are behind, else those that do not wait."""
    silent = [beat for beat in beats if beat.count < 0]
    last = min(beat.progress for beat in beats)
    behind = [beat for beat in beats if beat.progress == last]
    return silent or [beat for beat in behind if not beat.waits] or behind


class Watchdog:
    """Within, this rank's main thread has to come by :meth:`at` at least every ``hang_timeout_s``.

    Otherwise the process writes its stacks and a sentence naming the ranks to blame, and ends with exit code 1. A rank
    that was signalled does not wait for peers that are gone, and one whose peer died says which. Every rank of the job
    enters it; the groups are up.
    """

    def __init__(self, guard: Guard, signals: Signals, step: int) -> None:
        self._timeout_s, self._signals = guard.hang_timeout_s, signals
        self._beat_s = min(_BEAT_S, guard.hang_timeout_s / 10)
        self._rank, self._world = groups.rank(), groups.world_size()
        self._main = threading.get_ident()
        self._first = step
        self._now = (step, "start", time.monotonic())  # one tuple, so that the thread never sees half of it
        self._count = 0
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self._store = groups.meeting_place()
        self._beat()
        groups.barrier()
        self._store_host = self._read(0)
        self._store.set_timeout(datetime.timedelta(seconds=max(1.0, _SILENT * self._beat_s)))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _of_a_peer(error):
            gone = [beat for beat in self._look() if beat.count < 0]
            if gone:
                _say(f"{_sentence(gone)}. That is why rank {self._rank} ends.")
        self._end.set()
        self._thread.join(2 * _SILENT * self._beat_s)

    def at(self, step: int, phase: str) -> None:
        """The main thread begins with `phase`, one of :data:`PHASES`, of `step`."""
        assert phase in PHASES, phase
        self._now = (step, phase, time.monotonic())

    def alive(self) -> None:
        """The main thread waits for something that has a limit of its own, such as a save."""
        step, phase, _ = self._now
        self._now = (step, phase, time.monotonic())

    def _watch(self) -> None:
        while not self._end.wait(self._beat_s):
            self._beat()
            step, _, since = self._now
            idle_s = time.monotonic() - since
            if idle_s > self._timeout_s * (_FIRST if step == self._first else 1):
                self._give_up(idle_s)
            if self._signals.caught and self._world > 1:
                gone = any(beat.count < 0 for beat in self._look())
                if gone and not self._end.is_set():
                    os._exit(128 + self._signals.caught)  # no step will end any more

    def _give_up(self, idle_s: float) -> None:
        sentence = f"no progress for {idle_s:.0f} s: {_sentence(blamed(self._look()))}."
        if self._end.is_set():
            return
        with contextlib.suppress(RuntimeError):
            # What the first to look has found: the others would find the ranks gone that it is about to end.
            sentence = self._store.compare_set(self._key("found"), "", sentence).decode()
        faulthandler.dump_traceback(_STDERR)
        _say(sentence)
        tell_launcher(sentence)
        if self._rank == 0:  # whose process holds the store: the others are to read it
            time.sleep(_SILENT * self._beat_s)
        os._exit(1)

    # ---- signs of life -----------------------------------------------------------------------------------------------

    def _key(self, name: object) -> str:
        return f"mpdit/watchdog/{self._first}/{name}"

    def _beat(self, stack: tuple[str, ...] = ()) -> None:
        self._count += 1
        step, phase, _ = self._now
        beat = Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            count=self._count,
            step=step,
            phase=phase,
            stack=stack,
        )
        with contextlib.suppress(RuntimeError):  # the store is gone: whoever looks will find out
            self._store.set(self._key(self._rank), json.dumps(dataclasses.asdict(beat)))

    def _look(self) -> list[Beat]:
        """The beats of all ranks, or of the one that held the store if that is gone. Takes a few beats' time."""
        try:
            before = [self._read(rank) for rank in range(self._world)]
            for _ in range(_SILENT):
                self._beat(self._stack())
                self._end.wait(self._beat_s)
            after = [self._read(rank) for rank in range(self._world)]
        except RuntimeError:
            return [dataclasses.replace(self._store_host, count=-1)]
        return [
            dataclasses.replace(new, count=-1) if new.count == old.count else new
            for old, new in zip(before, after, strict=True)
        ]

    def _read(self, rank: int) -> Beat:
        values: dict[str, Any] = json.loads(self._store.get(self._key(rank)))
        return Beat(**values | {"stack": tuple(values["stack"])})

    def _stack(self) -> tuple[str, ...]:
        frames = traceback.extract_stack(sys._current_frames().get(self._main), limit=_FRAMES)
        return tuple(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _of_a_peer(error: BaseException | None) -> bool:
    """Whether a collective failed: NCCL has its own errors, gloo's are plain ones that name its source files."""
    return isinstance(error, RuntimeError) and (type(error).__name__.startswith("Dist") or "gloo" in str(error))


def _sentence(beats: Sequence[Beat]) -> str:
    more = f"; and {len(beats) - _NAMED} more" if len(beats) > _NAMED else ""
    return "; ".join(map(str, beats[:_NAMED])) + more


def _say(text: str) -> None:
    print(f"mpdit: {text}", file=sys.stderr, flush=True)
