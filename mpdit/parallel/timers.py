"""How long a rank computes within the passes of a step: Megatron's schedules say when, through ``config.timers``."""

import time

import torch

from mpdit.parallel import accel


class Timers:
    """What Megatron calls as ``timers(name, log_level).start()`` and ``.stop()``. Nothing waits for the device: on CUDA
    events are queued, and read when the step's loss has been."""

    def __init__(self) -> None:
        self._kept = {name: _Timer() for name in ("forward-compute", "backward-compute", "forward-backward")}

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer | _Nobody":
        return self._kept.get(name, _Nobody())

    def clear(self) -> None:
        """Forget the passes so far, of a validation or of pictures."""
        for timer in self._kept.values():
            timer.clear()

    def idle(self) -> float:
        """The share of the passes since the last call in which this rank did not compute; 0 if there were none."""
        computed, whole = 0.0, 0.0
        for name, timer in self._kept.items():
            if name == "forward-backward":
                whole = timer.take()
            else:
                computed += timer.take()
        return max(0.0, 1 - computed / whole) if whole else 0.0


class _Timer:
    def __init__(self) -> None:
        self._marks: list[float | torch.cuda.Event] = []

    def start(self, barrier: bool = False) -> None:
        self._marks.append(_mark())

    stop = start

    def clear(self) -> None:
        self._marks = []

    def take(self) -> float:
        """Seconds between starts and stops since the last call."""
        marks, self._marks = self._marks, []
        return sum(_seconds(*pair) for pair in zip(marks[::2], marks[1::2], strict=True))


class _Nobody:
    def start(self, barrier: bool = False) -> None:
        """Megatron times more than is asked for here."""

    stop = start


def _mark() -> float | torch.cuda.Event:
    if not accel.is_cuda():
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, float) or isinstance(stop, float):
        assert isinstance(start, float)
        assert isinstance(stop, float)
        return stop - start
    return start.elapsed_time(stop) / 1e3
