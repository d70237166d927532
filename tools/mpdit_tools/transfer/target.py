"""``--to``: the target's config. What it does not say is the proxy's, and so is what the proxy tuned."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpdit import config as configs
from mpdit.config import Config, flat
from mpdit.errors import InputError
from mpdit.mup.transferable import same_shares, transfer_from
from mpdit.presets import PRESETS
from mpdit.redact import redact_uri
from mpdit_tools.transfer.source import Source, Tree, tree_of

# Hyperparameters of which muP's theory does not say how they follow the width: the proxy's are kept, unless the
# command line chooses. (The report says of each what is known.)
OPEN = (
    *("optim.clip", "optim.warmup_steps", "optim.decay_steps", "optim.beta1", "optim.beta2", "train.ema_decay"),
    *("data.caption_drop", "objective.logit_mean", "objective.logit_std", "objective.repa_weight"),
)
_TUNED = ("optim.", "mup.")
_OWN = ("parallel.", "run.")  # sections that the proxy does not give, but for:
_GIVEN = (
    *("parallel.precision", "parallel.backend", "parallel.fp8_recipe", "parallel.fp8_bf16_blocks"),
    *("run.experiment", "run.mlflow_uri"),
)
_SAVES = 50  # checkpoints over a run, so that a killed job repeats a fiftieth at most


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The target as asked for: ``given`` are the keys that its preset, its file or the command line names."""

    name: str
    config: Config
    given: frozenset[str]
    overridden: frozenset[str]  # on the command line


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """``replaced``: keys of the target's file that gave way to the proxy's tuned value, and what they were."""

    config: Config
    replaced: dict[str, Any]
    chosen: tuple[str, ...]  # open keys that the command line set
    warnings: tuple[str, ...]


def asked(to: str, overrides: Sequence[str]) -> Asked:
    """Read `to`: a preset's name, a YAML or a run folder. Raises InputError for anything else, or a bad key."""
    if to in PRESETS:
        tree: Tree = {"model": {"preset": to}}
    elif Path(to).exists():
        tree = tree_of(Path(to))
    else:
        raise InputError(f"--to {to}: is neither a file nor a preset; presets are {', '.join(PRESETS)}.")
    for assignment in overrides:
        configs.override(tree, assignment)
    config = configs.from_dict(tree, f"--to {to}")
    given = {*flat(tree)}
    if config.model.preset:
        given |= {f"model.{key}" for key in PRESETS[config.model.preset]}
    overridden = {assignment.partition("=")[0].removeprefix("--") for assignment in overrides}
    for key in filter(_is_size, sorted(overridden)):
        raise InputError(f"{key}: is a size of the proxy, which --from says; leave it out.")
    return Asked(name=to, config=config, given=frozenset(given), overridden=frozenset(overridden))


def proxy_of(source: Source, to: Asked) -> tuple[Config, tuple[str, ...]]:
    """The proxy's whole config, and warnings. Base values without a model are of the target's at ``mup.base_*``.

    Raises InputError if the source says neither the proxy's model nor its width.
    """
    if source.tree.get("model"):
        return configs.from_dict(source.tree, f"--from {source.name}"), ()
    found = configs.from_dict(source.tree, f"--from {source.name}")
    whole, mup, train = configs.to_dict(to.config), found.mup, {**source.tree.get("train", {})}
    if "base_width" not in source.tree.get("mup", {}):
        raise InputError(
            f"--from {source.name}: says neither model nor mup.base_width, so that nobody knows what its values were "
            "tuned on; add mup.base_width, or give the proxy's config."
        )
    sizes = {"width": mup.base_width, "depth": mup.base_depth, "head_dim": mup.base_head_dim}
    own = {key: size for key, size in sizes.items() if size}
    target = to.config.train
    batch = train.setdefault("batch_size", mup.base_batch_size or target.batch_size)
    said = "steps" in train or mup.base_images
    train.setdefault("steps", mup.base_images // max(1, batch) if mup.base_images else target.steps)
    task = {section: {**whole[section], **source.tree.get(section, {})} for section in ("data", "objective")}
    tree = {**source.tree, **task, "model": {**whole["model"], "preset": None, **own}, "train": train}
    warning = (
        f"{source.name}: does not say how long its values were tuned (train.steps, or mup.base_images): taken to be as "
        "long as the target."
    )
    return configs.from_dict(tree, f"--from {source.name}"), () if said else (warning,)


def target_of(to: Asked, proxy: Config, out: Path, *, completedp: bool) -> Target:
    """The config to train: `to` with the values that `proxy` tuned, and ``mup.base_*`` of its sizes.

    Raises InputError, naming the key in the way, where muP does not carry the proxy's values to this target.
    """
    before, own = flat(proxy), flat(to.config)
    values = {key: own[key] if key in to.given or _is_own(key) else value for key, value in before.items()}
    values["model.preset"] = to.config.model.preset
    tuned = [key for key in before if (key.startswith(_TUNED) or key in OPEN) and key not in to.overridden]
    values |= {key: before[key] for key in tuned}
    values["mup.base_head_dim"] = proxy.model.head_dim
    if not (values["model.vocab_size"] or values["model.text_dim"]):
        values["model.vocab_size"] = proxy.model.vocab_size
    warnings = _run(values, to, out)
    config = configs.from_dict(configs.nested(values), f"--to {to.name}")
    shares = {key: share for key, share in same_shares(proxy, config).items() if key not in to.overridden}
    config = configs.from_dict(configs.nested(values | shares), f"--to {to.name}")
    _no_narrower(config, proxy)
    chosen = tuple(key for key in OPEN if key in to.overridden and own[key] != before[key])
    try:
        config = transfer_from(proxy, config, chosen={*chosen, "data.path"})
    except InputError as error:
        raise InputError(f"--to {to.name}: {error}") from error
    if not completedp:
        config = dataclasses.replace(
            config, mup=dataclasses.replace(config.mup, base_batch_size=None, base_images=None)
        )
    after = flat(config)
    replaced = {key: own[key] for key in tuned if key in to.given and own[key] != after[key] and not _is_size(key)}
    return Target(config=config, replaced=replaced, chosen=chosen, warnings=(*warnings, *_doubts(config, proxy)))


def _is_size(key: str) -> bool:
    return key.startswith("mup.base_")


def _is_own(key: str) -> bool:
    return key.startswith(_OWN) and key not in _GIVEN


def _run(values: dict[str, Any], to: Asked, out: Path) -> tuple[str, ...]:
    """Where the run goes, how often it is saved, and where it is tracked: set in `values`."""
    if "run.dir" not in to.given:
        values["run.dir"] = str(out / "run")
    if "train.save_every" not in to.given:
        values["train.save_every"] = max(1, values["train.steps"] // _SAVES)
    uri = values["run.mlflow_uri"]
    if uri is None or redact_uri(uri) == uri:
        return ()
    values["run.mlflow_uri"] = None
    return (
        f"run.mlflow_uri {redact_uri(uri)}: holds credentials, which are not written down; give the address without "
        "them and the rest in MLflow's own environment variables.",
    )


def _no_narrower(config: Config, proxy: Config) -> None:
    if config.model.width < proxy.model.width and config.model.arch == proxy.model.arch:
        raise InputError(
            f"model.width of the target is {config.model.width}, less than the proxy's {proxy.model.width}; values "
            "transfer from a narrow model to a wide one: take a wider target, or tune a narrower proxy."
        )


def _doubts(config: Config, proxy: Config) -> tuple[str, ...]:
    """What is allowed, but nobody has shown to work."""
    model, small, found = config.model, proxy.model, []
    if model.head_dim != small.head_dim:
        found.append(
            f"model.head_dim is {model.head_dim}, but the proxy's is {small.head_dim}: the attention scale follows it "
            "(1/d), which the paper did not try; it widens by more heads."
        )
    features = model.patch**2 * model.channels
    if small.width < features:
        found.append(
            f"model.width of the proxy is {small.width}, less than the {features} numbers of a patch: the proxy can't "
            "tell all patches apart, so that its loss is another than the width's."
        )
    if model.depth != small.depth and model.arch in ("uvit", "pixart"):
        found.append(f"model.depth: completep's rule is not shown for {model.arch} yet.")
    if config.data.path != proxy.data.path:
        found.append(
            f"data.path is {config.data.path}, but the proxy's is {proxy.data.path}: values transfer only where both "
            "hold the same data."
        )
    return tuple(found)
