"""Tracking that cannot hurt training: RUN/metrics.jsonl is the truth, and MLflow is fed behind it by a thread.

Only the rank that writes the run folder makes these objects. MLflow is imported in the thread, so neither its import,
nor a new sqlite store (seconds of migrations), nor a server that is down or slow ever holds up a step.
"""

import dataclasses
import functools
import json
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import unquote

from mpdit.train.metrics import plain

Status = Literal["FINISHED", "FAILED", "KILLED"]

# ---- secrets ---------------------------------------------------------------------------------------------------------

_URI = re.compile(r"(?i)\b(?!(?:sqlite|file)://)([a-z][a-z0-9+.-]*://)(\S+?)(?=['\")\]}>,;.]*(?:\s|$))")


def redact_uri(text: str) -> str:
    """`text` with the user, password and query values of every URI in it starred; files and sqlite stores stay.

    Errs on the side of hiding: everything before the last "@" of a URI goes.
    """

    def hide(match: re.Match[str]) -> str:
        rest = re.sub(r"^.*@", "***@", match[2])
        return match[1] + re.sub(r"([?&#;][^=&#;]*=)[^&#;]*", r"\1***", rest)

    return _URI.sub(hide, text)


def _one_line(error: Exception, uri: str) -> str:
    """What `error` says, in at most 300 characters, without what is secret in `uri`."""
    text = redact_uri(" ".join(str(error).split()))
    for secret in sorted(_secrets(uri), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text if len(text) <= 300 else text[:300] + " ..."


def _secrets(uri: str) -> set[str]:
    """The parts of `uri` that :func:`redact_uri` hides, as they may turn up alone in an error's text."""
    match = _URI.search(uri)
    if not match:
        return set()
    user, _, password = match[2].rpartition("@")[0].partition(":")
    found = {password or user, *re.findall(r"[?&#;][^=&#;]*=([^&#;]*)", match[2])}
    return {text for part in found for text in (part, unquote(part)) if len(text) > 3}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's params: dotted keys and texts, credentials in URIs starred."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = json.dumps(plain(value)) if isinstance(value, list | tuple) else str(value)
            flat[f"{prefix}{key}"] = redact_uri(text)[:6000]  # MLflow's limit
    return flat


# ---- MLflow ----------------------------------------------------------------------------------------------------------

# What the user has set wins. By its own defaults MLflow waits 247 s for a server that is down, prints the run's address
# with the credentials in it, and sends usage data abroad.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_RETRY_AFTER = (2.0, 10.0, 30.0)  # seconds; a server's restart is over by then
_PAUSE = 0.5  # seconds between deliveries at least: many steps in one call, and little of the interpreter's lock


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    step: int
    time_ms: int
    values: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    path: Path
    folder: str | None


class Tracker:
    """Feeds one MLflow run from a daemon thread behind a bounded queue. Nothing MLflow does reaches the caller.

    `uri` None means the sqlite store ``mlflow.db`` in the folder that holds `run_dir`, with ``mlartifacts`` beside it.
    The run's id is kept in ``run_dir/mlflow_run_id``: a later Tracker on the same folder goes on with the same run,
    unless the store does not know it. `params` are logged once; one that differs from the run's first value becomes the
    tag ``changed.<key>``. `tags` are set when the run is created, and so is its place under the run that the config
    among `params` names as ``run.mlflow_parent``. A full queue (`capacity` calls) drops its oldest.

    A failure to connect, or one that outlasts `retry_after` (seconds before each new try), turns MLflow off with one
    line to `warn`; training goes on, and `lost` counts the calls that did not get through. As a context manager it
    ends the run FINISHED, KILLED (KeyboardInterrupt, SystemExit) or FAILED (any other exception).
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
        retry_after: Iterable[float] = _RETRY_AFTER,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._run_dir = Path(run_dir).absolute()
        beside = self._run_dir.parent
        self._uri = uri or f"sqlite:///{beside / 'mlflow.db'}"
        # A server knows where artifacts go; any other store would put them into the current directory.
        server = re.match(r"https?://|databricks|uc:", self._uri)
        self._artifacts = None if server else (beside / "mlartifacts").as_uri()
        self._experiment, self._params, self._tags = experiment, flatten(params or {}), dict(tags or {})
        parent = self._params.get("run.mlflow_parent", "None")
        if parent != "None":
            self._tags["mlflow.parentRunId"] = parent
        self._retry_after, self._warn = tuple(retry_after), warn or _to_stderr
        self._changed = threading.Condition()  # guards all that follows
        self._queue: deque[_Point | _File] = deque(maxlen=max(1, capacity))
        self._sending = 0  # calls taken out of the queue and not yet confirmed
        self._status: Status | None = None  # set by close: how the thread should end the run
        self._off = self._warned = False
        self.lost = 0
        self.run_id: str | None = None  # None until MLflow has answered
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Queue the numbers of `row` (a line of metrics.jsonl, with its "step"); the rest stays in the file."""
        plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
        values = {key: float(value) for key, value in plain.items() if key != "step" and isinstance(value, int | float)}
        self._put(_Point(step=int(plain["step"]), time_ms=time.time_ns() // 1_000_000, values=values))

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Queue a file (a sample grid, mup_table.json) for the artifacts, under `folder`; it is read when sent."""
        self._put(_File(path=Path(path).absolute(), folder=folder))

    def close(self, status: Status = "FINISHED", timeout: float = 30.0) -> None:
        """Send what is queued and end the run with `status`; give up after `timeout` seconds. May be called twice."""
        with self._changed:
            self._status = self._status or status
            self._changed.notify_all()
        if not self._off:
            self._thread.join(timeout)
        if self._thread.is_alive():
            self._turn_off(f"it did not answer within {timeout:g} s of the end of the run")
        elif self.lost:
            self._tell(f"MLflow misses {self.lost} log calls: the queue was full, or a file was gone")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        # Whoever ends a run early, a scheduler above all, does not wait long.
        self.close("FINISHED" if kind is None else "KILLED" if killed else "FAILED", 30.0 if kind is None else 10.0)

    def _put(self, item: _Point | _File) -> None:
        with self._changed:
            if self._off or self._status is not None:
                self.lost += 1
                return
            self.lost += len(self._queue) == self._queue.maxlen
            self._queue.append(item)
            self._changed.notify_all()

    def _turn_off(self, reason: str) -> None:
        with self._changed:
            self._off = True
            self.lost += self._sending + len(self._queue)
            self._sending = 0
            self._queue.clear()
            self._changed.notify_all()
        self._tell(f"MLflow is off: {reason}; {self.lost} log calls so far did not reach it")

    def _tell(self, what: str) -> None:
        with self._changed:
            first, self._warned = not self._warned, True
        if first:
            self._warn(f"{what} ({self._run_dir.name}/metrics.jsonl has every step).")

    def _work(self) -> None:
        try:
            client = self._connect()
            monitor = _system_metrics(self.run_id, self._uri)
            while items := self._take():
                self._deliver(client, items)
            if monitor is not None:
                monitor.finish()
            if not self._off:
                self._patiently(lambda: client.set_terminated(self.run_id, self._status))
        except Exception as error:  # whatever MLflow, its store or the network came up with
            self._turn_off(f"{type(error).__name__}: {_one_line(error, self._uri)}")

    def _take(self) -> list[_Point | _File]:
        """All that is queued; waits for more. Empty when the run is over and everything is sent, or MLflow is off."""
        with self._changed:
            self._changed.wait_for(lambda: self._status or self._off, timeout=_PAUSE)
            self._changed.wait_for(lambda: self._queue or self._status or self._off)
            items = list(self._queue)
            self._queue.clear()
            self._sending = len(items)
        return items

    def _deliver(self, client: Any, items: list[_Point | _File]) -> None:
        from mlflow.entities import Metric

        points = [item for item in items if isinstance(item, _Point)]
        metrics = [
            Metric(key, value, point.time_ms, point.step) for point in points for key, value in point.values.items()
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit a call
            part = metrics[start : start + 1000]
            self._patiently(functools.partial(client.log_batch, self.run_id, metrics=part, synchronous=True))
        for file in (item for item in items if isinstance(item, _File)):
            if file.path.is_file():
                self._patiently(functools.partial(client.log_artifact, self.run_id, str(file.path), file.folder))
            else:  # old samples may have been cleaned up while a server was away
                with self._changed:
                    self.lost += 1
        with self._changed:
            self._sending = 0

    def _patiently(self, send: Callable[[], Any]) -> None:
        """`send`, again after each pause if it fails. A run that ends does not wait for a server to come back."""
        for pause in self._retry_after:
            try:
                return send()
            except Exception:  # told if the last try fails as well
                with self._changed:
                    if self._changed.wait_for(lambda: self._status or self._off, timeout=pause):
                        break
        if not self._off:
            send()

    def _connect(self) -> Any:
        """A client, with the run open and the params logged."""
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # what goes wrong here is told once, by _tell
            logging.getLogger(name).setLevel(logging.CRITICAL)
        client = MlflowClient(tracking_uri=self._uri)
        run = self._open_run(client)
        self.run_id = run.info.run_id
        known = run.data.params
        new = [Param(key, value) for key, value in self._params.items() if key not in known]
        for start in range(0, len(new), 100):  # MLflow's limit a call
            client.log_batch(self.run_id, params=new[start : start + 100], synchronous=True)
        tags = [
            RunTag(f"changed.{key}", value) for key, value in self._params.items() if known.get(key, value) != value
        ]
        client.log_batch(self.run_id, tags=tags, synchronous=True)
        return client

    def _open_run(self, client: Any) -> Any:
        from mlflow.exceptions import MlflowException

        kept = self._run_dir / "mlflow_run_id"
        if kept.exists():
            try:
                run = client.get_run(kept.read_text(encoding="utf-8").strip())
                client.update_run(run.info.run_id, status="RUNNING")
                return run
            except MlflowException as error:
                # Another store, or the run was deleted: a new one there. A store that is down says neither.
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        run = client.create_run(self._experiment_id(client), run_name=self._run_dir.name, tags=self._tags)
        kept.write_text(run.info.run_id + "\n", encoding="utf-8")
        return run

    def _experiment_id(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        known = client.get_experiment_by_name(self._experiment)
        if known is None:
            try:
                return str(client.create_experiment(self._experiment, artifact_location=self._artifacts))
            except MlflowException:  # another trial of the same sweep may have been quicker
                known = client.get_experiment_by_name(self._experiment)
                if known is None:
                    raise
        return str(known.experiment_id)


def _system_metrics(run_id: str | None, uri: str) -> Any:
    """MLflow's monitor of processor, memory, disk, network and GPUs, started; None where it can't be."""
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
        monitor.start()
    except Exception:  # psutil is missing or a sensor is odd; the run's own metrics do not depend on it
        return None
    return monitor


def _to_stderr(line: str) -> None:
    print(f"mpdit: {line}", file=sys.stderr, flush=True)
