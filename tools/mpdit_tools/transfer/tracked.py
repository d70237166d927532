"""A proxy out of MLflow: a run, or the best finished one of an experiment, as mpdit/train/tracking.py logs it."""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mpdit import config as configs
from mpdit.config import Config
from mpdit.errors import InputError
from mpdit.redact import redact_uri
from mpdit_tools.transfer import trials
from mpdit_tools.transfer.source import Source, Tree
from mpdit_tools.transfer.trials import Trial

_STORE = "sqlite:///runs/mlflow.db"  # where runs of run.dir=runs/NAME are tracked
_WAIT_S = "5"
_ENVIRONMENT = {  # what the user has set wins; MLflow's own defaults wait for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": _WAIT_S,
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# run.* and sample.* are a run's own.
_SECTIONS = ("model.", "mup.", "optim.", "parallel.", "data.", "objective.", "train.")
_SEARCHED = ("mup.", "optim.", "data.", "objective.", "train.ema_decay")  # what trials of one search may differ in
_ALIKE = ("model.", "mup.base_", "data.path", "train.steps", "train.batch_size")  # and what not

T = TypeVar("T")


def run(run_id: str, uri: str | None) -> Source:
    """The run `run_id`. Raises InputError if it is unknown, not finished, or no run of mpdit."""
    uri = _uri(uri)
    name = f"MLflow run {run_id}"
    found = _ask(uri, name, lambda client: client.get_run(run_id))
    if found.info.status != "FINISHED":
        raise InputError(
            f"--from {name}: its status is {found.info.status}, so that nobody knows where its values lead; give a "
            "finished run, or the proxy's config."
        )
    return Source(name=name, said=f"a finished run in the store {redact_uri(uri)}", tree=_tree(_params(found), name))


def experiment(name: str, uri: str | None) -> Source:
    """The finished run of lowest final val_loss. Raises InputError if there is none."""
    uri = _uri(uri)
    where = f"MLflow experiment {name}"
    runs = _ask(uri, where, lambda client: _runs(client, name))
    if runs is None:
        raise InputError(f"--from {where}: the store {redact_uri(uri)} has no experiment of that name.")
    runs = [run for run in runs if "optim.lr" in run.data.params]  # a sweep's own run is no training
    params = {run.info.run_id: _params(run) for run in runs}
    finished = [run for run in runs if _state(run) == trials.COMPLETE]
    if not finished:
        raise InputError(
            f"--from {where}: none of its {len(runs)} runs has finished with a val_loss; train a proxy to its end."
        )
    best = min(finished, key=lambda run: run.data.metrics["val_loss"])
    own = params[best.info.run_id]
    like = [run for run in runs if _alike(params[run.info.run_id], own)]
    searched = _differing([params[run.info.run_id] for run in like])
    said = (
        f"run {best.info.run_id} ({best.info.run_name}), val_loss {best.data.metrics['val_loss']:.6g}, the best of "
        f"{len(finished)} finished runs among {len(runs)} in the store {redact_uri(uri)}"
    )
    warning = (
        f"{where}: {len(runs) - len(like)} of its {len(runs)} runs are of another model, data set, batch size or "
        "length than the best one, so that their losses do not compare; they are left out of the search's cost."
    )
    return Source(
        name=where,
        said=said,
        tree=_tree(own, where),
        trials=tuple(_trial(run, params[run.info.run_id], searched) for run in like),
        warnings=(warning,) if len(like) < len(runs) else (),
    )


# ---- the store -------------------------------------------------------------------------------------------------------


def _uri(uri: str | None) -> str:
    """The store asked for, else the environment's, else mpdit's own. Raises InputError if its file is not there."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _STORE
    local = re.match(r"(?:sqlite:///|file:(?://)?)?(?![\w+.-]+:|databricks|uc\b)([^?]*)", uri)
    if local and not Path(local[1]).exists():  # MLflow would make a new, empty one
        raise InputError(f"MLflow store {redact_uri(uri)}: {local[1]} is not there; name another with --tracking-uri.")
    return uri


def _ask(uri: str, what: str, ask: Callable[[Any], T]) -> T:
    """What the store answers. An error's own text stays unsaid: it may repeat the credentials in `uri`."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    shown = redact_uri(uri)
    try:
        return ask(MlflowClient(tracking_uri=uri))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise InputError(f"--from {what}: the store {shown} does not know it.") from None
        raise InputError(
            f"--from {what}: the MLflow store {shown} does not answer ({error.error_code}); start it, name "
            "another with --tracking-uri, or give the proxy's config."
        ) from None
    except Exception as error:
        raise InputError(
            f"--from {what}: the MLflow store {shown} can't be read ({type(error).__name__}); name another with "
            "--tracking-uri, or give the proxy's config."
        ) from None


def _runs(client: Any, name: str) -> list[Any] | None:
    known = client.get_experiment_by_name(name)
    if known is None:
        return None
    found, token = [], None
    while True:
        page = client.search_runs([known.experiment_id], max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


# ---- runs as settings and as trials ----------------------------------------------------------------------------------


_CHANGED = "changed."


def _params(run: Any) -> dict[str, str]:
    """What the run was trained with: its params, and its tags where it went on with others than it began with."""
    tags = run.data.tags.items()
    return {**run.data.params, **{key[len(_CHANGED) :]: value for key, value in tags if key.startswith(_CHANGED)}}


def _tree(params: Mapping[str, str], name: str) -> Tree:
    """Sections out of dotted keys. Raises InputError where no key is one of mpdit's."""
    tree = configs.nested({key: _value(key, text) for key, text in params.items() if key.startswith(_SECTIONS)})
    if not tree:
        raise InputError(f"--from {name}: has no params such as optim.lr; give a run that mpdit trained.")
    return tree


_DEFAULTS = configs.flat(Config())


def _value(key: str, text: str) -> Any:
    if text == "None":
        return None
    return text if isinstance(_DEFAULTS.get(key), str) else yaml.safe_load(text)


def _state(run: Any) -> str:
    loss = run.data.metrics.get("val_loss")
    if run.info.status != "FINISHED" or loss is None:
        # What trained and was cut short has been tried: such a learning rate is not beyond the edge of the search.
        ended = trials.PRUNED if run.info.status == "KILLED" else trials.DIVERGED
        return ended if "loss" in run.data.metrics else trials.FAILED
    return trials.COMPLETE if math.isfinite(loss) else trials.DIVERGED


def _trial(run: Any, params: Mapping[str, str], searched: list[str]) -> Trial:
    return Trial(
        state=_state(run),
        value=run.data.metrics.get("val_loss"),
        params={key: _number(_value(key, params[key])) for key in searched if key in params},
        images=int(run.data.metrics.get("images", 0)),
    )


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _alike(params: Mapping[str, str], other: Mapping[str, str]) -> bool:
    keys = {key for key in (*params, *other) if key.startswith(_ALIKE)}
    return all(params.get(key) == other.get(key) for key in keys)


def _differing(runs: list[dict[str, str]]) -> list[str]:
    """Keys of hyperparameters that not all of `runs` share."""
    keys = {key for params in runs for key in params if key.startswith(_SEARCHED)}
    return sorted(key for key in keys if len({params.get(key) for params in runs}) > 1)
