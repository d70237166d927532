"""What an emoji is called and where it belongs, by code point, out of emojibase and OpenMoji."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

SKIN_TONE = re.compile(r"-?(medium-)?(light|dark|medium)-skin-tone")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Emoji:
    """Words for one emoji. ``concept`` is the same for all skin tones."""

    label: str
    concept: str
    code: str = ""  # code points in hexadecimal, without the variation selector
    tags: tuple[str, ...] = ()
    group: str = ""
    subgroup: str = ""


def code_key(code: str) -> str:
    """A code-point sequence as every vendor's file can be looked up: lower case, without FE0F."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def slug(text: str) -> str:
    """Words joined with dashes, as icon sets name their files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def unnamed(name: str) -> Emoji:
    """The best that can be said about an icon that only has a file name."""
    return Emoji(label=name.replace("-", " "), concept=SKIN_TONE.sub("", slug(name)))


def emojibase(members: Mapping[str, bytes]) -> dict[str, Emoji]:
    """All emoji of the ``emojibase-data`` package, skin tones included, by `code_key`."""
    messages = json.loads(members["en/messages.json"])
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    found = {}
    for entry in json.loads(members["en/data.json"]):
        base = Emoji(
            label=entry["label"],
            concept=slug(entry["label"]) or entry["hexcode"],
            code=code_key(entry["hexcode"]),
            tags=tuple(entry.get("tags", [])),
            group=groups.get(entry.get("group"), "components"),
            subgroup=subgroups.get(entry.get("subgroup"), ""),
        )
        found[base.code] = base
        for skin in entry.get("skins", []):
            code = code_key(skin["hexcode"])
            found[code] = dataclasses.replace(base, code=code, label=skin["label"].replace(": ", ", "))
    return found


def openmoji(entry: Mapping[str, Any]) -> Emoji:
    """An entry of OpenMoji's own list; it has emoji that Unicode does not."""
    tags = f"{entry['tags']},{entry['openmoji_tags']}".split(",")
    return Emoji(
        label=entry["annotation"],
        concept=SKIN_TONE.sub("", slug(entry["annotation"])) or entry["hexcode"],
        code=code_key(entry["hexcode"]),
        tags=tuple(tag.strip() for tag in tags if tag.strip()),
        group=entry["group"].replace("-", " "),
        subgroup=entry["subgroups"].replace("-", " "),
    )
