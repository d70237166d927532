"""What muP carries from a tuned proxy to a larger model, and a sentence for what it does not; pure functions.

Over the width, for one network, task and recipe: Zheng et al., arXiv 2505.15270. Over the depth too: completep
(Dey et al., arXiv 2505.01618). Over batch size and images, with schedules as shares of the run: Complete(d)P
(arXiv 2512.22382).
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from mpdit.config import Config, flat
from mpdit.errors import InputError

_BASES = ("mup.base_width", "mup.base_depth", "mup.base_head_dim", "mup.base_batch_size", "mup.base_images")
# Counts of steps or blocks, and what they are a share of: the count or the share is kept.
_SHARES = {
    "optim.warmup_steps": "train.steps",
    "optim.decay_steps": "train.steps",
    "objective.repa_block": "model.depth",
}
# Of the sections below, what the two may choose on their own, or what has a rule of its own here.
_FREE = {
    *("model.preset", "model.width", "model.depth", "model.head_dim", "model.vocab_size", "model.text_dim"),
    *("data.workers", "data.cache"),
    *_BASES,
    *_SHARES,
}
# Whatever these sections hold has to be the same: why, and the way out but for taking the base's value.
_SAME = {
    "model.": ("muP transfers over the width of one network", "tune a proxy that has the target's"),
    "objective.": ("muP transfers what was tuned for one task", "tune a proxy on the target's"),
    "data.": ("muP transfers what was tuned on one data set", "tune a proxy on the target's"),
    "optim.": ("base values are the proxy's and transfer as they are", "tune the proxy with the target's"),
    "mup.": ("base values are the proxy's and transfer as they are", "tune the proxy with the target's"),
}

Flat = dict[str, Any]  # dotted key: value


def transfer_from(base: Config, target: Config, *, chosen: Collection[str] = ()) -> Config:
    """`target` with `base` for its proxy: ``mup.base_*`` say the width, depth, head_dim, batch, images of `base`.

    Raises InputError, naming the first key in the way and what would be right, if `base` has a proxy of its own,
    if the two differ in what muP does not carry over, or if their base values (``optim`` and ``mup``) differ. Keys in
    `chosen` may differ: those of which somebody knows that theory does not say them.
    """
    flat_base, flat_target, own = flat(base), flat(target), _sizes(base)
    _own_proxy(flat_base, own)
    _parametrized(base, target)
    for prefix, (why, otherwise) in _SAME.items():
        keys = [key for key in flat_base if key.startswith(prefix) and key not in _FREE and key not in chosen]
        _same(flat_base, flat_target, keys, why, otherwise)
    for size, why in (("vocab_size", "one data set has one vocabulary"), ("text_dim", "one encoder has one width")):
        if getattr(base.model, size) and getattr(target.model, size):  # 0: what data and encoder say, the same in both
            _same(flat_base, flat_target, [f"model.{size}"], why, "leave both out")
    _depth(base, target)
    _head_dim(base, target)
    _shares(base, target, chosen)
    sizes: dict[str, Any] = {key.removeprefix("mup."): value for key, value in own.items()}
    return dataclasses.replace(target, mup=dataclasses.replace(target.mup, **sizes))


def same_shares(base: Config, target: Config) -> dict[str, int]:
    """What keeps its share of the run (or of the depth) in `target`: dotted key -> the count, rounded, at least 1.

    Schedules as shares of the run are what Complete(d)P transfers over batch size and length.
    """
    flat_base, flat_target = flat(base), flat(target)
    return {
        key: max(1, round(count * flat_target[whole] / flat_base[whole])) if (count := flat_base[key]) else 0
        for key, whole in _SHARES.items()
    }


def _sizes(base: Config) -> dict[str, int]:
    """What ``mup.base_*`` say where the proxy is `base`."""
    model, train = base.model, base.train
    sizes = (model.width, model.depth, model.head_dim, train.batch_size, train.batch_size * train.steps)
    return dict(zip(_BASES, sizes, strict=True))


def _own_proxy(base: Flat, own: dict[str, int]) -> None:
    for key, size in own.items():
        if base[key] not in (None, size):
            raise InputError(
                f"{key} of the base is {base[key]}, but its own is {size}, so that it has a proxy itself; give that "
                f"proxy's config, or set the base's {key} to {size} if it was tuned as it is."
            )


def _parametrized(base: Config, target: Config) -> None:
    for name, config in (("base", base), ("target", target)):
        if config.mup.parametrization == "sp":
            raise InputError(
                f"mup.parametrization of the {name} is sp, under which nothing follows the width; set it to mup in "
                "both (a model that is its own proxy is the same under either)."
            )


def _same(base: Flat, target: Flat, keys: list[str], why: str, otherwise: str) -> None:
    for key in keys:
        if base[key] != target[key]:
            raise InputError(
                f"{key} is {target[key]}, but the base's is {base[key]}; {why}: set it to {base[key]}, or {otherwise}."
            )


def _depth(base: Config, target: Config) -> None:
    depth = base.model.depth
    if target.model.depth != depth and target.mup.parametrization != "completep":
        raise InputError(
            f"model.depth is {target.model.depth}, but the base's is {depth}; mup does not follow the depth: set it "
            f"to {depth}, or mup.parametrization to completep in both."
        )


def _head_dim(base: Config, target: Config) -> None:
    head_dim, known = base.model.head_dim, target.mup.base_head_dim
    if known is None and target.model.head_dim != head_dim:
        raise InputError(
            f"model.head_dim is {target.model.head_dim}, but the base's is {head_dim}; set it to {head_dim} and widen "
            f"by more heads, or set mup.base_head_dim to {head_dim}, so that the attention scale follows it."
        )
    if known not in (None, head_dim):
        raise InputError(f"mup.base_head_dim is {known}, but the base's model.head_dim is {head_dim}; set it to that.")


def _shares(base: Config, target: Config, chosen: Collection[str]) -> None:
    flat_base, flat_target = flat(base), flat(target)
    for key, share in same_shares(base, target).items():
        found, before = flat_target[key], flat_base[key]
        if key not in chosen and found not in (before, share):
            scaled = "" if share == before else f", or to {share}, the same share of {_SHARES[key]}"
            raise InputError(f"{key} is {found}, but the base's is {before}; set it to {before}{scaled}.")
