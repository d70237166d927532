"""Which samples are held out, by hash: whole concepts, or a share of every class. No picture is in both splits."""

import collections
import hashlib
from collections.abc import Sequence

from mpdit.errors import InputError

LARGEST = 4  # a group of samples over this many times the wanted size of val stays in training


def split_concepts(samples: Sequence[tuple[str, str]], *, fraction: float) -> list[bool]:
    """True for the samples to hold out.

    ``samples`` are (concept, hash of the picture). Samples that share a concept or a picture are never separated. A
    group is held out when its hash, as a number in [0, 1), is below ``fraction``, so that a larger set holds out what a
    smaller one did. But at least one group is held out and one is not, and a group that makes up much of the set stays.
    Raises InputError when all samples belong together.
    """
    groups = _groups(samples)
    sizes = collections.Counter(groups)
    if len(sizes) < 2:
        raise InputError(
            f"all {len(samples)} samples share one caption or picture, so none can be held out for validation; "
            "at least two different captions are needed."
        )
    limit = max(1.0, LARGEST * fraction * len(samples))
    held = {group for group, size in sizes.items() if size <= limit and _position(group) < fraction}
    # All of it would be held out when every group's hash is small, which a few tiny groups can manage.
    if not held or len(held) == len(sizes):
        held = {min(sizes, key=lambda group: (sizes[group], _position(group)))}
    return [group in held for group in groups]


def split_classes(samples: Sequence[tuple[str, str, str]], *, fraction: float) -> list[bool]:
    """True for the samples to hold out: a share of every class, so that training and validation know them all.

    ``samples`` are (class, origin, hash of the picture); those that share origin or picture are never separated.
    They are held out when their hash, as a number in [0, 1), is below ``fraction``, but of every class at least one
    is and at least one is not. What belongs to several classes, or is all there is of one, stays in training.
    Raises InputError when nothing is left to hold out.
    """
    groups = _groups([(origin, pixels) for _, origin, pixels in samples])
    classes = collections.defaultdict[str, set[str]](set)
    for (name, _, _), group in zip(samples, groups, strict=True):
        classes[name].add(group)
    homes = collections.Counter(group for there in classes.values() for group in there)
    held = set[str]()
    for there in classes.values():
        free = sorted((group for group in there if homes[group] == 1), key=_position)
        wanted = max(1, sum(_position(group) < fraction for group in free))
        held.update(free[: min(wanted, len(there) - 1)])
    if not held:
        raise InputError(
            f"none of the {len(classes)} classes has two pictures of its own, so none can be held out for validation; "
            "a class should have at least two."
        )
    return [group in held for group in groups]


def _position(group: str) -> float:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:6]) / 2**48


def _groups(samples: Sequence[tuple[str, str]]) -> list[str]:
    """The name of each sample's group: the first in alphabetical order of the concepts that hang together."""
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for concept, pixels in samples:
        # The smaller root wins, and "concept" sorts before "pixels".
        first, second = sorted((find(f"concept {concept}"), find(f"pixels {pixels}")))
        parent[second] = first
    return [find(f"concept {concept}").removeprefix("concept ") for concept, _ in samples]
