"""The file that describes a sweep: what is searched on which proxy, how, and what of it may change later."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from mpdit import config as configs
from mpdit.config import Config, flat, suggestion
from mpdit.errors import InputError
from mpdit.redact import redact_uri
from mpdit_tools.sweep import space
from mpdit_tools.sweep.space import Axis

Mode = Literal["random", "grid", "tpe", "coordinate"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prune:
    """Which trials are given up, by a look every so many steps at what metrics.jsonl says so far.

    median: worse than the median of the finished trials at the same step, or than the share `keep` of them; a long
    warm-up or a high learning rate is behind at first, so not before half the run. halving: of the trials that
    reached `warmup_steps` x `reduction`^k steps, not among the best 1 / `reduction` (asynchronous successive halving,
    arXiv 1810.05934).
    """

    kind: Literal["median", "halving"] = "median"
    metric: str = "loss"  # loss: the mean since the last look; val_loss needs train.val_every
    every: int = 0  # steps between looks; 0: a twentieth of the run
    warmup_steps: int = 0  # before which none is given up; 0: median half the run, halving steps / reduction^2
    startup_trials: int = 5  # median: finished trials before any is given up
    keep: float = 0.5  # median: 0.75 spares what is merely average, as the finished ones are those that survived
    reduction: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Confirm:
    """After the search the best settings are run again with other seeds, and the best mean wins."""

    top: int = 3
    seeds: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Keys:
    """Keys of the file that are fields as they stand."""

    mode: Mode
    trials: int | None = None  # training runs of the search; None: all that grid and coordinate ask for
    seeds: tuple[int, ...] = (0,)  # train.seed of the runs of each setting; several are paired over settings
    metric: str = "val_loss"  # of metrics.jsonl, the last value; smaller is better
    sampler_seed: int = 0  # random: values are a function of it and the trial's number; tpe: and of what came out
    prune: Prune | None = None
    confirm: Confirm | None = None
    rounds: int = 2  # coordinate: of trying every factor
    least_gain: float = 0.002  # coordinate: relative; a change that helps less is not kept, however sure
    diverged_above: float | None = None  # a value above it counts as diverged; None: 1.25 x the run's first loss
    ranks: int = 1  # processes a trial, by torchrun on this machine
    keep_checkpoints: bool = False  # of finished trials


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spec(_Keys):
    """A sweep. ``proxy`` and ``axes`` come from the keys "proxy" and "search" of the file."""

    proxy: Config
    axes: tuple[Axis, ...]


# Keys of the file that are no fields as they stand, and what may change between two starts of one sweep.
_OWN = ("proxy", "search")
_FREE = ("trials", "confirm", "keep_checkpoints")
_FREE_OF_PROXY = (
    "run",
    "sample",
    "data.path",
    "data.workers",
    "train.log_every",
    "train.save_every",
    "train.keep_last",
)


def load(path: Path, overrides: tuple[str, ...] = (), trials: int | None = None) -> Spec:
    """The spec of a YAML file, with dotted keys of its proxy overridden.

    Raises InputError, one sentence, for what can be seen without the data: unknown keys, wrong types, bad ranges.
    """
    tree = configs.read_yaml(path, "the spec of a sweep")
    if not isinstance(tree, dict):
        raise InputError(f"{path}: should hold keys such as 'proxy:', 'search:' and 'mode:'.")
    known = [*_OWN, *(field.name for field in dataclasses.fields(_Keys))]
    for key in tree:
        if key not in known:
            raise InputError(f"{path}: unknown key {key}{suggestion(str(key), known)}.")
    for key in ("proxy", "search", "mode"):
        if tree.get(key) is None:
            raise InputError(f"{path}: {key} is missing; a sweep has a proxy, a search space and a mode.")
    values = {key: value for key, value in tree.items() if key not in _OWN}
    if isinstance(values.get("prune"), str):
        values["prune"] = {"kind": values["prune"]}
    _check_seeds(values, path)
    given = configs.build(_Keys, {**values, **({} if trials is None else {"trials": trials})}, str(path))
    proxy = _proxy(tree["proxy"], path, overrides)
    axes = space.read(tree["search"], given.mode, f"{path}: search")
    keys = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    spec = Spec(proxy=proxy, axes=axes, **keys)
    _check(spec, str(path))
    return _resolved(spec)


def _check_seeds(values: Mapping[str, Any], path: Path) -> None:
    confirm = values.get("confirm")
    lists = {"seeds": values, "confirm.seeds": confirm if isinstance(confirm, dict) else {}}
    for name, section in lists.items():
        seeds = section.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise InputError(f"{path}: {name} should be a list of whole numbers, but is {seeds!r}.")


def _proxy(given: Any, path: Path, overrides: tuple[str, ...]) -> Config:
    if isinstance(given, str):
        proxy = configs.load(path.parent / given, overrides)
    elif isinstance(given, dict):
        for text in overrides:
            configs.override(given, text)
        proxy = configs.from_dict(given, f"{path}: proxy")
    else:
        raise InputError(f"{path}: proxy should be the path of a config or a config itself, but is {given!r}.")
    uri = proxy.run.mlflow_uri
    if uri and redact_uri(uri) != uri:
        raise InputError(
            "run.mlflow_uri of the proxy holds credentials, which a sweep would write into its trials' commands; give "
            "them in MLflow's environment variables, such as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    return proxy


def _check(spec: Spec, path: str) -> None:
    for name in ("trials", "ranks", "rounds"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise InputError(f"{path}: {name} is {value}, but should be at least 1.")
    if spec.sampler_seed < 0:
        raise InputError(f"{path}: sampler_seed is {spec.sampler_seed}, but should be at least 0.")
    for name, seeds in {"seeds": spec.seeds, "confirm.seeds": spec.confirm.seeds if spec.confirm else ()}.items():
        if len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0:
            raise InputError(f"{path}: {name} should be different whole numbers from 0 up, but is {list(seeds)}.")
    if spec.trials is None and spec.mode in ("random", "tpe"):
        raise InputError(f"{path}: trials is missing; mode {spec.mode} would not know when to stop.")
    if spec.trials is not None and spec.trials < len(spec.seeds):
        raise InputError(
            f"{path}: trials counts runs: {spec.trials} is not one setting with its {len(spec.seeds)} seeds."
        )
    if spec.mode == "coordinate":
        _check_coordinate(spec, path)
    if spec.confirm and (spec.confirm.top < 1 or set(spec.confirm.seeds) & set(spec.seeds)):
        raise InputError(f"{path}: confirm should have top of at least 1 and seeds that are not among {spec.seeds}.")
    if spec.prune:
        _check_prune(spec.prune, spec, path)


def _check_coordinate(spec: Spec, path: str) -> None:
    if len(spec.seeds) < 2:
        raise InputError(
            f"{path}: mode coordinate tells what helps from what seeds do: give at least two, such as seeds: [0, 1, 2]."
        )
    for axis in spec.axes:
        if isinstance(axis, space.Factors) and not space.of(spec.proxy, axis.key):
            raise InputError(f"{path}: search: {axis.key} is 0 in the proxy, so no factor changes it; give it a value.")
    for name in ("prune", "confirm"):
        if getattr(spec, name):
            raise InputError(f"{path}: mode coordinate compares whole runs over all seeds; leave {name} out.")


def _check_prune(prune: Prune, spec: Spec, path: str) -> None:
    steps = spec.proxy.train.steps
    for name, least in {"every": 0, "warmup_steps": 0, "startup_trials": 0, "reduction": 2}.items():
        if getattr(prune, name) < least:
            raise InputError(f"{path}: prune.{name} is {getattr(prune, name)}, but should be at least {least}.")
    if not 0 < prune.keep < 1:
        raise InputError(f"{path}: prune.keep is {prune.keep}, but should be a share between 0 and 1.")
    for name in ("every", "warmup_steps"):
        if getattr(prune, name) >= steps:
            raise InputError(f"{path}: prune.{name} should be less than the proxy's train.steps, which is {steps}.")
    if prune.metric == "val_loss" and not 0 < spec.proxy.train.val_every < steps:
        raise InputError(
            f"{path}: prune.metric val_loss needs train.val_every of the proxy, between 1 and {steps - 1}."
        )


def _resolved(spec: Spec) -> Spec:
    if spec.prune is None:
        return spec
    steps, prune = spec.proxy.train.steps, spec.prune
    first = max(1, steps // (2 if prune.kind == "median" else prune.reduction**2))
    prune = dataclasses.replace(
        prune, every=prune.every or max(1, steps // 20), warmup_steps=prune.warmup_steps or first
    )
    return dataclasses.replace(spec, prune=prune)


# ---- what stays the same over the starts of one sweep ----------------------------------------------------------------


def dump(spec: Spec) -> str:
    """The spec as YAML that :func:`load` reads back: resolved, with the proxy inside."""
    tree = {key: value for key, value in configs.to_dict(spec).items() if key != "axes" and value is not None}
    tree = {"proxy": tree.pop("proxy"), "search": dict(map(_search, spec.axes)), **tree}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _search(axis: Axis) -> tuple[str, dict[str, Any]]:
    if isinstance(axis, space.Range):
        return axis.key, {"log_uniform" if axis.log else "uniform": [axis.low, axis.high]}
    if isinstance(axis, space.Factors):
        return axis.key, {"factors": list(axis.factors)}
    return axis.key, {"grid" if axis.ordered else "choice": list(axis.values)}


def fixed(spec: Spec) -> dict[str, Any]:
    """What the trials of one sweep have in common, as dotted keys."""
    tree = yaml.safe_load(dump(spec))
    proxy = flat(tree.pop("proxy"))
    kept = {key: value for key, value in proxy.items() if not key.startswith(tuple(f"{f}." for f in _FREE_OF_PROXY))}
    for key in _FREE_OF_PROXY:
        kept.pop(key, None)
    free = {key: value for key, value in tree.items() if key not in _FREE}
    search = {f"search.{key}": value for key, value in free.pop("search").items()}
    return {**flat(free), **search, **{f"proxy.{key}": value for key, value in kept.items()}}


def fingerprint(spec: Spec) -> str:
    """Of :func:`fixed`: two sweeps with the same may share a folder."""
    return hashlib.sha256(json.dumps(fixed(spec), sort_keys=True).encode()).hexdigest()[:16]


def same(there: Spec, given: Spec, folder: Path) -> None:
    """Raises InputError if `folder`, whose spec is `there`, holds another sweep than `given`."""
    before, now = fixed(there), fixed(given)
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise InputError(
                f"{folder} holds a sweep with {key} {before.get(key, 'not set')}, but now it is "
                f"{now.get(key, 'not set')}; only {', '.join(_FREE)}, workers and where data and tracking lie may "
                "change: set it back, or give another --out."
            )


# ---- advice ----------------------------------------------------------------------------------------------------------


def advice(spec: Spec) -> list[str]:
    """Sentences on what works but is seldom wanted."""
    model, mup = spec.proxy.model, spec.proxy.mup
    patch = model.patch**2 * model.channels
    said = []
    if model.width < 2 * patch:
        said.append(
            f"the proxy's width {model.width} is not well above patch^2 x channels = {patch}: such a proxy is limited "
            f"by its patch embedding, and its optimum drifts with the width; take a width of at least {2 * patch}."
        )
    if mup.parametrization != "sp" and mup.base_width != model.width:
        said.append(
            f"mup.base_width {mup.base_width} is not the proxy's width {model.width}: what is found are base values of "
            f"width {mup.base_width}."
        )
    return said
