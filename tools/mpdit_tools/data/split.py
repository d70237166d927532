"""Which samples are held out: whole concepts, by hash, so that no validation caption or picture is in training."""

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
