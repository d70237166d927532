"""``mpdit track sync``: bring the MLflow run of a run folder up to its metrics.jsonl, whatever it missed."""

import contextlib
import dataclasses
import fcntl
import json
import math
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from mpdit import config as configs
from mpdit.errors import CheckFailed, InputError
from mpdit.redact import one_line, redact_uri
from mpdit.train import mlflow_run
from mpdit.train.metrics import parse
from mpdit.train.mlflow_run import MlflowRun, Point, Told, flatten, key_of

_USAGE = "usage: mpdit track sync RUN [--uri URI] [--json]    (mpdit track sync --help tells more)"
_TIMEOUT_S = 30
_AT_ONCE = 1000  # points a request


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Bring the MLflow run of a run folder up to its metrics.jsonl.

    Adds what MLflow misses and nothing twice: points of every metric with their own times, params, tags,
    mup_table.json, samples/*.png, and how the run ended. A run that MLflow has never heard of is created. While the run
    is training, it is brought up to now. Credentials come from MLflow's own variables (MLFLOW_TRACKING_USERNAME,
    MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN): no run folder has them.
    """

    run: Annotated[Path, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]
    """The run folder."""
    uri: str | None = None
    """MLflow's store; the run's own by default."""
    json: bool = False
    """Print what was added as JSON."""


def main(argv: list[str]) -> int:
    """Exit code 0 when MLflow has everything. Raises InputError for no run folder, CheckFailed for a store away."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] != "sync":
        raise InputError(f"mpdit track: no command {argv[0]!r}; there is sync.")
    arguments = tyro.cli(Arguments, args=argv[1:], prog="mpdit track sync")
    truth = Truth.read(arguments.run)
    training = _is_training(arguments.run)
    if training and not mlflow_run.has_run(arguments.run):
        raise InputError(
            f"{arguments.run}: is being trained, and that job opens its MLflow run itself as soon as the store "
            "answers; sync when the run has ended."
        )
    mlflow_run.prepare(_TIMEOUT_S)
    run = MlflowRun(arguments.run, _told(arguments.run), arguments.uri)
    with _answered(run):
        added = sync(run, truth, arguments.run, training=training)
    if arguments.json:
        print(json.dumps(added, indent=1))
        return 0
    new = " (created)" if added["created"] else ""
    print(f"MLflow run {added['run_id']}{new} in {added['uri']}, {added['status']}")
    what = {"points": added["points"], "params": added["params"], "tags": added["tags"], "files": len(added["files"])}
    print("added: " + ", ".join(f"{count} {name}" for name, count in what.items()))
    return 0


# ---- the truth -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """metrics.jsonl by column, 8 bytes a number: a run of a million steps fits."""

    steps: "array[int]"  # quoted: 3.11 has no array[...]
    times_ms: "array[int]"
    values: "dict[str, array[float]]"  # nan where a row has no such number

    @classmethod
    def read(cls, folder: Path) -> "Truth":
        """Raises InputError if there is no metrics.jsonl. Rows without a time get that of the file."""
        path = folder / "metrics.jsonl"
        truth = cls(steps=array("q"), times_ms=array("q"), values={})
        try:
            otherwise_s = path.stat().st_mtime
            with path.open("rb") as lines:
                for row in filter(None, map(parse, lines)):
                    truth._add(Point.of({"time": otherwise_s, **row}))
        except OSError as error:
            raise InputError(
                f"{folder}: is no run folder, its metrics.jsonl can't be read ({error.strerror}); give the run.dir of "
                "a training run."
            ) from error
        return truth

    def _add(self, point: Point) -> None:
        rows = len(self.steps)
        self.steps.append(point.step)
        self.times_ms.append(point.time_ms)
        for key in point.values.keys() - self.values.keys():
            self.values[key] = array("d", [math.nan]) * rows
        for key, column in self.values.items():
            column.append(point.values.get(key, math.nan))

    def missing(self, key: str, known: set[tuple[int, float]]) -> Iterator[Point]:
        """The points of a metric whose (step, value) is not `known`."""
        for step, time_ms, value in zip(self.steps, self.times_ms, self.values[key], strict=True):
            if not math.isnan(value) and (step, value) not in known:
                yield Point(step=step, time_ms=time_ms, values={key: value})


def _told(folder: Path) -> Told:
    """What the run told MLflow beside its metrics; out of its config where it is older than tracking.json."""
    told = Told.read(folder)
    if told is not None:
        return told
    config = configs.load(folder)
    params = flatten(configs.to_dict(config))
    run = config.run
    return Told(uri=run.mlflow_uri, experiment=run.experiment, params=params, tags={}, key=key_of(folder))


def _is_training(folder: Path) -> bool:
    """Whether a job holds the run folder, as mpdit.train.recorder.only_writer does it."""
    try:
        file = (folder / ".lock").open("r+")
    except OSError:  # no lock, or somebody else's folder that can only be read
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


# ---- bringing MLflow up to it ----------------------------------------------------------------------------------------


def sync(run: MlflowRun, truth: Truth, folder: Path, *, training: bool) -> dict[str, Any]:
    """Add what MLflow misses; what was added. May raise whatever MLflow does: what is there then stays."""
    run.open(running=training, start_ms=min(truth.times_ms, default=None))
    points = {}
    for number, key in enumerate(sorted(truth.values)):
        _progress(f"metric {number + 1}/{len(truth.values)} {key}")
        known = {(point.step, point.value) for point in run.client.get_metric_history(run.id, key)}
        added = 0
        part: list[Point] = []
        for point in truth.missing(key, known):
            part.append(point)
            if len(part) == _AT_ONCE:
                run.log(part)
                added, part = added + len(part), []
                _progress(f"metric {number + 1}/{len(truth.values)} {key}, {added} points")
        run.log(part)
        points[key] = added + len(part)
    files = _sync_files(run, folder)
    return {
        "run_id": run.id,
        "uri": redact_uri(run.uri),
        "created": run.created,
        "points": sum(points.values()),
        "points_by_metric": {key: count for key, count in points.items() if count},
        "params": run.new_params,
        "tags": run.new_tags,
        "files": files,
        "status": "RUNNING" if training else _sync_end(run, truth, folder),
    }


def _sync_files(run: MlflowRun, folder: Path) -> list[str]:
    added = []
    for place, paths in (
        (None, [folder / "mup_table.json"]),
        ("samples", sorted((folder / "samples").glob("*.png"))),
    ):
        known = {Path(file.path).name: file.file_size for file in run.client.list_artifacts(run.id, place)}
        for path in paths:
            if path.is_file() and known.get(path.name) != path.stat().st_size:
                _progress(f"file {path.name}")
                run.log_file(path, place)
                added.append(str(path.relative_to(folder)))
    return added


def _sync_end(run: MlflowRun, truth: Truth, folder: Path) -> str:
    """A run that could not say how it ended was killed, unless it has all its steps."""
    told = Told.read(folder)
    status = told.status if told is not None else None
    if status is None:
        with contextlib.suppress(InputError):
            done = max(truth.steps, default=-1) + 1
            status = "FINISHED" if done >= configs.load(folder).train.steps else None
    now = run.client.get_run(run.id).info
    wanted = status or ("KILLED" if now.status == "RUNNING" else now.status)
    if now.status != wanted:
        run.end(wanted, max(truth.times_ms, default=None))
    return str(wanted)


@contextlib.contextmanager
def _answered(run: MlflowRun) -> Iterator[None]:
    """What goes wrong between us and the store, in a sentence without credentials."""
    try:
        yield
    except (InputError, CheckFailed):
        raise
    except ImportError as error:
        raise CheckFailed(f"MLflow is not there ({error}); pip install mlflow-skinny sqlalchemy alembic.") from None
    except Exception as error:  # whatever a client for one of many stores raises
        hint = "" if run.id is None else "; what was added stays, and the same command goes on from there"
        raise CheckFailed(
            f"the MLflow store {redact_uri(run.uri)} does not answer as it should ({type(error).__name__}: "
            f"{one_line(error, run.uri)}){hint}; start it, give its credentials in MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or name another with --uri."
        ) from None
    finally:
        _progress("")


def _progress(text: str) -> None:
    """One line that is written over, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)
