"""Rendering on several processes, with results in the order of the jobs."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event

from mpdit.errors import InputError
from mpdit_tools.data.samples import Drop, Job, Sample

CHUNK = 16  # jobs sent to a worker at once


def render_all(jobs: Sequence[Job], *, workers: int) -> Generator[Sample | Drop, None, None]:
    """Renders every job; the order of the results is that of the jobs, whatever ``workers`` is.

    Raises InputError when the system kills a worker, which is nearly always for want of memory.
    """
    if workers <= 1 or len(jobs) <= CHUNK:
        for job in jobs:
            yield job.render()
        return
    # Spawned, not forked: a progress bar's thread may be running in this process.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker, initargs=(stop,)
    )
    try:
        with interrupts_held_back():
            results = pool.map(_render, jobs, chunksize=CHUNK)
        yield from results
    except BrokenProcessPool as error:
        raise InputError(
            f"--workers {workers}: a worker process was killed, probably for want of memory; use fewer workers."
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    # Ctrl-C reaches the whole process group. Workers started here never see it; the parent does, a moment later.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_stop: Event | None = None  # in a worker: set when the parent wants no more results


def start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A worker waiting for its next job would outlive a parent that was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _render(job: Job) -> Sample | Drop:
    if _stop is not None and _stop.is_set():
        return Drop(origin="", reason="stopped")
    return job.render()
