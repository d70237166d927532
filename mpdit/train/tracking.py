"""Tracking that cannot hurt training: RUN/metrics.jsonl is the truth, and MLflow is fed behind it by a thread.

Only the rank that writes the run folder makes these objects. MLflow is imported in the thread, so neither its import,
nor a new sqlite store (seconds of migrations), nor a server that is down, slow or mute ever holds up a step.
"""

import dataclasses
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpdit.redact import one_line, redact_uri
from mpdit.train.mlflow_run import MlflowRun, Point, Status, Told, flatten, key_of, prepare

_TIMEOUT_S = 10  # a request to a server that does not answer
_PAUSES_S = (2.0, 30.0)  # before the first new try, doubled each time, up to the longest
_AT_ONCE = 50  # calls in one delivery: about as many metrics as MLflow takes in one request
_GATHER_S = 0.5  # between deliveries at least: many steps in one request, and little of the interpreter's lock
_BREATH_S = 0.05  # where more than a delivery waits
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # what will not be taken the second time either


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    path: Path
    folder: str | None


class Tracker:
    """Feeds one MLflow run from a daemon thread behind a bounded queue. Nothing MLflow does reaches the caller.

    `uri` None means the sqlite store ``mlflow.db`` in the folder that holds `run_dir`, with ``mlartifacts`` beside it.
    The run's id is kept in ``run_dir/mlflow_run_id``: a later Tracker on the same folder goes on with the same run,
    unless the store does not know it. `params` are logged once; one that differs from the run's first value becomes the
    tag ``changed.<key>``. `tags` are set too, and the run's place under the run that the config among `params` names as
    ``run.mlflow_parent``. What ``mpdit track sync`` needs to do the same later is in ``run_dir/tracking.json``.

    A server that is down, hangs or fails is told once to `warn` and tried again for as long as the run lives, after
    `pauses` (the first and the longest, seconds). A full queue (`capacity` calls) drops its oldest. `lost` counts the
    calls that did not get through; if there are any at the end, a line says so, and how MLflow gets them after all.
    As a context manager it ends the run FINISHED, KILLED (KeyboardInterrupt, SystemExit) or FAILED (other exceptions).
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        uri: str | None = None,
        experiment: str = "mpdit",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        capacity: int = 10_000,
        pauses: tuple[float, float] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._run_dir, self._warn, self._pauses = Path(run_dir), warn or _to_stderr, pauses or _PAUSES_S
        flat, all_tags = flatten(params or {}), dict(tags or {})
        if flat.get("run.mlflow_parent", "None") != "None":
            all_tags["mlflow.parentRunId"] = flat["run.mlflow_parent"]
        self._told = Told(
            uri=redact_uri(uri) if uri else None,
            experiment=experiment,
            params=flat,
            tags=all_tags,
            key=key_of(self._run_dir),
        )
        self._told.save(self._run_dir)
        self._run = MlflowRun(self._run_dir, self._told, uri)
        self._began_ms = time.time_ns() // 1_000_000
        self._monitor: _SystemMetrics | None = None
        self._changed = threading.Condition()  # guards all that follows
        self._queue: deque[Point | _File] = deque()
        self._capacity = max(1, capacity)
        self._sending: list[Point | _File] = []  # taken out of the queue and not yet confirmed
        self._status: Status | None = None  # set by close: how the thread should end the run
        self._complete = self._left = False  # the thread has done all; nobody waits for it any more
        self._reason, self._warned = "", False  # of the last failure; whether it was told
        self._failures = 0  # since the last success
        self.lost = 0
        prepare(_TIMEOUT_S)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """None until MLflow has answered."""
        return self._run.id

    def log(self, row: Mapping[str, Any]) -> None:
        """Queue the numbers of `row` (a line of metrics.jsonl, with its "step"); the rest stays in the file."""
        self._put(Point.of(row))

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Queue a file (a sample grid, mup_table.json) for the artifacts, under `folder`; it is read when sent."""
        self._put(_File(path=Path(path).absolute(), folder=folder))

    def close(self, status: Status = "FINISHED", timeout: float = 30.0) -> None:
        """Send what is queued and end the run with `status`; give up after `timeout` seconds. May be called twice."""
        with self._changed:
            first, self._status = self._status is None, self._status or status
            self._changed.notify_all()
        if first:
            dataclasses.replace(self._told, status=status).save(self._run_dir)
        self._thread.join(timeout)
        with self._changed:
            if not self._complete:
                self._reason = self._reason or f"it did not answer within {timeout:g} s of the end of the run"
                self.lost += len(self._queue) + len(self._sending)
                self._queue.clear()
                self._sending, self._left = [], True
            if first and (self.lost or not self._complete):
                self._warn(self._parting())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        # Whoever ends a run early, a scheduler above all, does not wait long.
        self.close("FINISHED" if kind is None else "KILLED" if killed else "FAILED", 30.0 if kind is None else 10.0)

    def _parting(self) -> str:
        missing = f"{self.lost} log calls" if self.lost else "how the run ended"
        said = f"MLflow misses {missing} ({self._reason})"
        if not (self._run_dir / "metrics.jsonl").is_file():
            return f"{said}."
        return (
            f"{said}; metrics.jsonl has every step, and this brings MLflow up to it: "
            f"mpdit track sync {shlex.quote(str(self._run_dir))}"
        )

    def _put(self, item: Point | _File) -> None:
        with self._changed:
            if self._left or self._status is not None:
                self.lost += 1
                return
            if len(self._queue) == self._capacity:
                self._queue.popleft()
                self._drop(1, "more waited than the queue takes")
            self._queue.append(item)
            self._changed.notify_all()

    def _drop(self, calls: int, reason: str) -> None:
        with self._changed:
            self.lost += calls
            self._reason = self._reason or reason

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            last_try = self._status is not None
            try:
                self._converse()
                with self._changed:
                    self._complete = not self._left
                return
            except ImportError as error:
                last_try = True
                self._failed(error)
            except Exception as error:  # whatever MLflow, its store or the network came up with
                self._failed(error)
            if last_try:
                return
            first, longest = self._pauses
            with self._changed:
                self._changed.wait_for(lambda: self._status, timeout=min(longest, first * 2 ** (self._failures - 1)))

    def _failed(self, error: Exception) -> None:
        """Put back what was not confirmed; the first time, say so."""
        with self._changed:
            room = self._capacity - len(self._queue)
            back = self._sending[max(0, len(self._sending) - room) :]
            self.lost += len(self._sending) - len(back)
            self._queue.extendleft(reversed(back))
            self._sending = []
            self._failures = min(self._failures + 1, 30)
            told, self._warned = self._warned or self._left, True
            self._reason = f"{type(error).__name__}: {one_line(error, self._run.uri)}"
        if not told:
            then = "is off" if isinstance(error, ImportError) else "is tried again while the run lives"
            self._warn(f"MLflow {then} ({self._reason}); training does not wait for it, metrics.jsonl has every step.")

    def _converse(self) -> None:
        """Until the run is over and everything is sent."""
        if self._run.id is None:
            self._run.open(start_ms=self._began_ms)
        if self._monitor is None or not self._monitor.is_alive():
            self._monitor = _SystemMetrics.started(self._run)
        while self._take():
            self._deliver()
        if self._monitor is not None:
            self._monitor.finish()
        assert self._status is not None
        self._run.end(self._status)

    def _take(self) -> bool:
        """Take what is due out of the queue; waits for it. False when the run is over and everything is sent."""
        with self._changed:
            pause = _GATHER_S if len(self._queue) < _AT_ONCE else _BREATH_S
            self._changed.wait_for(lambda: self._status, timeout=pause)
            self._changed.wait_for(lambda: self._queue or self._status)
            self._sending = [self._queue.popleft() for _ in range(min(_AT_ONCE, len(self._queue)))]
        return bool(self._sending)

    def _deliver(self) -> None:
        """Points first: an artifact store of its own that is away does not keep them back."""
        files = [item for item in self._sending if isinstance(item, _File)]
        self._unless_refused([item for item in self._sending if isinstance(item, Point)], self._run.log)
        with self._changed:
            self._sending = [*files]
        for file in files:
            if file.path.is_file():
                self._unless_refused([file], lambda files: self._run.log_file(files[0].path, files[0].folder))
            else:  # old samples may have been cleaned up while a server was away
                self._drop(1, f"{file.path.name} was gone")
            with self._changed:
                self._sending = self._sending[1:]
        with self._changed:
            self._failures = 0

    def _unless_refused(self, items: list[Any], send: Callable[[list[Any]], None]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            send(items)
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            self._drop(len(items), f"refused: {one_line(error, self._run.uri)}")


class _SystemMetrics:
    """MLflow's monitor of processor, memory, disk, network and GPUs. It ends at its first failure."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    @classmethod
    def started(cls, run: MlflowRun) -> Self | None:
        """None where there is nothing to start: psutil is missing or a sensor is odd."""
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(run.id, resume_logging=True, tracking_uri=run.uri)
            monitor.start()
        except Exception:  # the run's own metrics do not depend on it
            return None
        return cls(monitor)

    def is_alive(self) -> bool:
        return self._monitor._process is not None and self._monitor._process.is_alive()

    def finish(self) -> None:
        self._monitor.finish()


def _to_stderr(line: str) -> None:
    print(f"mpdit: {line}", file=sys.stderr, flush=True)
