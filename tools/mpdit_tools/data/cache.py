"""``mpdit data cache CONFIG``: latents, text states and REPA features of a config's data, computed once."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mpdit import config as configs
from mpdit.config import Config, Parallel
from mpdit.errors import InputError

if TYPE_CHECKING:
    from mpdit.data.mixture import Mixture
    from mpdit_tools.data.cache_build import Plan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Compute what CONFIG's data.latents, data.text and objective.repa_teacher make of its data, into its data.cache.

    What is there already stays, also after kill -9; a second run with nothing to do is a no-op.
    """

    config: Annotated[str, tyro.conf.arg(metavar="CONFIG"), tyro.conf.Positional]
    """A YAML file, or a run folder."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="section.key=value"), tyro.conf.Positional] = ()
    """Keys of the config that are other for this command."""
    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Processes; they do not change the result. With a GPU they share it."""
    per_part: int = 256
    """Samples that a process computes at once, and that a kill can lose."""
    verify: bool = False
    """Read every byte of the caches that are there and compare checksums, instead."""
    json: bool = False
    """Print what is there as JSON."""


def main(argv: list[str]) -> int:
    """Exit code 0 when all is there. Raises InputError for a bad config, model or data set, or a damaged cache."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit data cache")
    for name, value in (("workers", arguments.workers), ("per-part", arguments.per_part)):
        if value < 1:
            raise InputError(f"--{name} {value}: should be 1 or more.")
    asked = configs.load(arguments.config, arguments.overrides)
    if asked.data.cache is None:
        raise InputError(f"{arguments.config}: data.cache is not given; it should be the folder to fill.")
    root = Path(asked.data.cache)
    plans = _plans(asked)
    if not plans:
        raise InputError(
            f"{arguments.config}: has nothing to cache: data.latents is not given, data.text is {asked.data.text}, "
            "objective.repa_weight is 0."
        )
    try:
        rows = _verified(plans, root) if arguments.verify else _built(plans, root, arguments)
    except KeyboardInterrupt:
        print("mpdit data cache: interrupted; what is finished is kept.", file=sys.stderr)
        return 130
    _show(rows, as_json=arguments.json, verified=arguments.verify)
    return 0


def _plans(asked: Config) -> "list[Plan]":
    """What CONFIG needs, in this process alone. Raises InputError as training would."""
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.data.mixture import Mixture
    from mpdit.parallel import fp8_rules
    from mpdit.train import preflight

    parallel = Parallel(precision=fp8_rules.stored(asked.parallel.precision))
    alone = dataclasses.replace(asked, parallel=parallel, data=dataclasses.replace(asked.data, cache=None))
    config = preflight.check(alone, 1)
    return [plan for split in ("train", "val") for plan in _of_split(config, Mixture.open(config.data, split))]


def _of_split(config: Config, shards: "Mixture") -> "list[Plan]":
    from mpdit.data import encoders
    from mpdit.train import cached
    from mpdit_tools.data.cache_build import Plan
    from mpdit_tools.data.cache_parts import Features, Latents, Pictures

    found, model, data = cached.autoencoder(config, shards), config.model, config.data
    factor = found.space.factor if found else 1
    pictures = Pictures(
        data=data,
        split=shards.split,
        shapes=tuple((height * factor, width * factor) for height, width in cached.sizes(config)),
        channels=found.space.pixel_channels if found else model.channels,
        mirror=data.mirror,
    )
    plans, variants = [], 2 if data.mirror else 1
    if found is not None:
        latents = Latents(pictures=pictures, folder=str(found.folder))
        plans.append(
            Plan(
                wanted=cached.wanted_latents(config, shards, found.sha256),
                items=len(shards),
                rows_per_item=variants,
                work=lambda first, count: latents,
                facts=dataclasses.asdict(found.space),
            )
        )
    if data.text in encoders.KINDS:
        plans.append(_of_text(config, shards))
    if config.objective.repa_weight and shards.split == "train":
        features = Features(pictures=pictures, objective=config.objective, patch=model.patch * factor)
        plans.append(
            Plan(
                wanted=cached.wanted_features(config, shards, factor),
                items=len(shards),
                rows_per_item=variants,
                work=lambda first, count: features,
                facts={},
            )
        )
    return plans


def _of_text(config: Config, shards: "Mixture") -> "Plan":
    from mpdit.data.cached_text import DIGESTS, digests
    from mpdit.data.encoders import Encoder
    from mpdit.train import cached
    from mpdit_tools.data.cache_build import Plan
    from mpdit_tools.data.cache_parts import Text, captions_of

    kind, model, tokens = config.data.text, config.data.text_model, config.model.text_tokens
    encoder = Encoder.open(kind, model)
    captions = sorted({"", *captions_of(shards)})
    found_by = digests(captions)
    order = found_by.argsort()
    return Plan(
        wanted=cached.wanted_text(config, shards, encoder.sha256),
        items=len(captions),
        rows_per_item=1,
        work=lambda first, count: Text(
            captions=[captions[i] for i in order[first : first + count].tolist()], kind=kind, model=model, tokens=tokens
        ),
        facts={"text_dim": encoder.text_dim, "pooled_dim": encoder.pooled_dim, "most": encoder.most},
        beside={DIGESTS: found_by[order]},
    )


def _built(plans: "Sequence[Plan]", root: Path, arguments: Arguments) -> list[dict[str, Any]]:
    from mpdit_tools.data.cache_build import Workers, build
    from mpdit_tools.data.report import Progressing

    with Progressing() as told, contextlib.closing(Workers(arguments.workers)) as workers:
        return [dataclasses.asdict(build(plan, root, arguments.per_part, workers, told)) for plan in plans]


def _verified(plans: "Sequence[Plan]", root: Path) -> list[dict[str, Any]]:
    from mpdit.data.cache import Cache

    rows = []
    for plan in plans:
        found = Cache.open(root, plan.wanted)
        read = found.verify()
        known = {"kind": plan.wanted.kind, "split": plan.wanted.split, "folder": str(found.folder)}
        rows.append({**known, "rows": found.manifest["rows"], "bytes": read})
    return rows


def _show(rows: Sequence[dict[str, Any]], *, as_json: bool, verified: bool) -> None:
    if as_json:
        print(json.dumps({"verified": verified, "caches": rows}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("cache", "split", title_justify="left")
    for name in ("rows", "bytes", *(() if verified else ("parts", "computed now", "seconds"))):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = [row["rows"], row["bytes"], *(() if verified else (row["parts"], row["built"], row["seconds"]))]
        table.add_row(row["kind"], row["split"], *(f"{number:,}" for number in numbers))
    Console().print(table)
    state = "every byte is as it was written" if verified else "complete"
    print(f"{Path(rows[0]['folder']).parent}: {state}.")
