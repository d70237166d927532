"""The one table: name -> (tag, rule) of every parameter. Init, optimizer, readout and run folder read it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from mpdit.config import Config
from mpdit.errors import InputError
from mpdit.mup.roles import Tag
from mpdit.mup.rules import Rule, rule


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    tag: Tag
    rule: Rule


Table = Mapping[str, Entry]


def resolve(tags: Mapping[str, Tag], config: Config) -> Table:
    """The table of the parameters in `tags` under `config`'s parametrization, in the order of `tags`."""
    return {name: Entry(tag=tag, rule=rule(tag, config)) for name, tag in tags.items()}


def merge(tables: Iterable[Mapping[str, Tag]]) -> dict[str, Tag]:
    """The whole model's tags out of those of its stages and shards, sorted by name.

    Raises InputError if two ranks disagree about a parameter: then some layer took its rule from a local shape.
    """
    whole: dict[str, Tag] = {}
    for tags in tables:
        for name, tag in tags.items():
            if whole.setdefault(name, tag) != tag:
                raise InputError(f"parameter {name} is {tag} on one rank and {whole[name]} on another.")
    return dict(sorted(whole.items()))


def optimizer_groups(table: Table) -> dict[Rule, list[str]]:
    """Names by what the optimizer has to know of them (LR, weight decay, eps), in the table's order."""
    groups: dict[Rule, list[str]] = {}
    for name, entry in table.items():
        key = dataclasses.replace(entry.rule, init_std=0.0, multiplier=1.0)
        groups.setdefault(key, []).append(name)
    return groups


def rows(table: Table) -> list[dict[str, Any]]:
    """``mup_table.json``: one dict a parameter."""
    return [
        {
            "name": name,
            "role": entry.tag.role.value,
            "group": entry.tag.group.value,
            "shape": list(entry.tag.shape),
            "fan_in": entry.tag.fan_in,
            "fan_out": entry.tag.fan_out,
            **dataclasses.asdict(entry.rule),
        }
        for name, entry in table.items()
    ]
