"""One training run as MLflow has it: opened, fed and ended by whoever has the patience. MLflow is imported late.

RUN/tracking.json keeps what MLflow is to know of the run beside metrics.jsonl, RUN/mlflow_run_id which run it is.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from mpdit.redact import redact_uri, without_stars
from mpdit.train.metrics import plain

Status = Literal["FINISHED", "FAILED", "KILLED"]

_TOLD, _RUN_ID = "tracking.json", "mlflow_run_id"
_KEY = "mpdit.run"  # the tag that holds Told.key
_METRICS, _PARAMS = 1000, 100  # MLflow's limits a call

# What the user has set wins. By its own defaults MLflow waits 247 s for a server that is down, prints the run's address
# with the credentials in it, and sends usage data abroad.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def prepare(timeout_s: int) -> None:
    """Set what MLflow reads from the environment, before its first call."""
    for name, value in (_ENVIRONMENT | {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)}).items():
        os.environ.setdefault(name, value)


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What MLflow is told of a run beside its metrics; no credential is in it."""

    uri: str | None  # as the user gave it, starred; None: the sqlite store beside the run folder
    experiment: str
    params: dict[str, str]
    tags: dict[str, str]
    key: str  # of the run folder: by it a run is found whose creation was not answered
    status: Status | None = None  # None: the run has not ended, or could not say so

    def save(self, folder: Path) -> None:
        """Whole or not at all. A disk that does not take it costs `mpdit track sync` the params, nothing else."""
        partial = folder / f"{_TOLD}.tmp"
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
            os.replace(partial, folder / _TOLD)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None if the run folder has none, or a damaged one."""
        try:
            told = cls(**json.loads((folder / _TOLD).read_text(encoding="utf-8")))
            texts = [told.experiment, told.key, *told.params.values(), *told.tags.values()]
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return told if all(isinstance(text, str) for text in texts) else None


def key_of(folder: Path) -> str:
    """The folder's key, a new one for a new folder."""
    told = Told.read(folder)
    return told.key if told is not None else uuid.uuid4().hex


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The numbers of a line of metrics.jsonl."""

    step: int
    time_ms: int
    values: dict[str, float]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """A row's "time" (unix seconds) is its time, now where there is none."""
        own = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
        numbers = {key: float(value) for key, value in own.items() if isinstance(value, int | float)}
        step, seconds = int(numbers.pop("step")), numbers.pop("time", None)
        return cls(step=step, time_ms=round(1000 * (time.time() if seconds is None else seconds)), values=numbers)


class MlflowRun:
    """The run of `folder` in the store that `uri` or, without one, `told` names.

    Every method may raise whatever MLflow, its store or the network comes up with, and may be called again then.
    """

    def __init__(self, folder: Path, told: Told, uri: str | None = None) -> None:
        self._folder, self._told = folder.absolute(), told
        beside = self._folder.parent
        self.uri = without_stars(uri or told.uri or f"sqlite:///{beside / 'mlflow.db'}")
        # A server knows where artifacts go; any other store would put them into the current directory.
        server = re.match(r"https?://|databricks|uc:", self.uri)
        self._artifacts = None if server else (beside / "mlartifacts").as_uri()
        self._client: Any = None
        self.id: str | None = None  # None until MLflow has answered
        self.created = False  # by this object
        self.new_params = self.new_tags = 0  # that :meth:`open` logged

    @property
    def client(self) -> Any:
        """MLflow's own, once the run is open."""
        return self._client

    def open(self, *, running: bool = True, start_ms: int | None = None) -> None:
        """Go on with the folder's run, or create it, and log the params that it lacks.

        A param that differs from the run's first value becomes the tag ``changed.<key>``. The id is kept in the folder;
        a store that does not know it gets a new run. `running`: the run is marked so.
        """
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # what goes wrong is told once, by whoever called
            logging.getLogger(name).setLevel(logging.CRITICAL)
        client = MlflowClient(tracking_uri=self.uri)
        run = self._known(client) or self._created(client, start_ms)
        if running and run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        known, told = run.data.params, self._told
        new = [Param(key, value) for key, value in told.params.items() if key not in known]
        for start in range(0, len(new), _PARAMS):
            client.log_batch(run.info.run_id, params=new[start : start + _PARAMS], synchronous=True)
        tags = dict(told.tags)
        tags |= {f"changed.{key}": value for key, value in told.params.items() if known.get(key, value) != value}
        missing = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        if missing:
            client.log_batch(run.info.run_id, tags=missing, synchronous=True)
        self._client, self.id = client, run.info.run_id
        self.new_params, self.new_tags = len(new), len(missing)

    def log(self, points: Iterable[Point]) -> None:
        """Log what `points` hold. A point that is there already, of the same time, is not doubled."""
        from mlflow.entities import Metric

        metrics = [Metric(key, value, p.time_ms, p.step) for p in points for key, value in p.values.items()]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _METRICS], synchronous=True)

    def log_file(self, path: Path, folder: str | None) -> None:
        self._client.log_artifact(self.id, str(path), folder)

    def end(self, status: Status, end_ms: int | None = None) -> None:
        self._client.set_terminated(self.id, status, end_ms)

    def _known(self, client: Any) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run((self._folder / _RUN_ID).read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            return None
        except MlflowException as error:  # a store that is down says neither
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _created(self, client: Any, start_ms: int | None) -> Any:
        """A new run, unless an earlier try made it and the answer was lost."""
        experiment, key = self._experiment(client), self._told.key
        found = client.search_runs([experiment], f"tags.`{_KEY}` = '{key}'", max_results=1)
        if not found:
            tags = {**self._told.tags, _KEY: key}
            found = [client.create_run(experiment, start_ms, tags=tags, run_name=self._folder.name)]
            self.created = True
        with contextlib.suppress(OSError):  # then it is found by its key
            (self._folder / _RUN_ID).write_text(found[0].info.run_id + "\n", encoding="utf-8")
        return found[0]

    def _experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        name = self._told.experiment
        known = client.get_experiment_by_name(name)
        if known is None:
            try:
                return str(client.create_experiment(name, artifact_location=self._artifacts))
            except MlflowException:  # another trial of the same sweep may have been quicker
                known = client.get_experiment_by_name(name)
                if known is None:
                    raise
        return str(known.experiment_id)


def has_run(folder: Path) -> bool:
    """Whether the folder says which MLflow run is its own."""
    return (folder / _RUN_ID).is_file()
