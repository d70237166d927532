"""SIGTERM and SIGUSR1 (Slurm's notice): the run saves at the end of a step and leaves with 128 + signal."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

CAUGHT = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_S = 3.0  # the launcher passes on what the whole process group had already got: the same request


class Stop(SystemExit):
    """The run was asked to end and leaves; its newest checkpoint is that of `step`, None if it has none. ``code`` is
    what the scheduler needs. Every rank raises it."""

    def __init__(self, signum: int, step: int | None) -> None:
        super().__init__(128 + signum)
        saved = "no checkpoint could be written" if step is None else f"saved at step {step}"
        self.said = f"asked to stop by {signal.Signals(signum).name}: {saved}"


class Signals:
    """Within, the first signal is kept in `caught`; a second one, after some seconds, ends the process at once.

    A thread reads them from a pipe: Python itself runs handlers only between bytecodes of the main thread, which may
    never come back from a collective whose peer is gone. Enter it in the main thread.
    """

    def __init__(self) -> None:
        self.caught = 0  # the signal's number
        self._first_s = 0.0

    def __enter__(self) -> Self:
        global _in_force
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, _nothing) for number in CAUGHT}
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        _in_force += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _in_force
        _in_force -= 1
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1)[0]:
            if number not in CAUGHT:
                continue
            if not self.caught:
                self.caught, self._first_s = number, time.monotonic()
            elif time.monotonic() - self._first_s > _ECHO_S:
                os._exit(128 + number)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler has to be there, or the signal would end the process."""


_in_force = 0


def _in_child() -> None:
    """Helper processes that a rank forks: not the ones to save, nor to die of the notice while they help to."""
    if _in_force:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_child)
