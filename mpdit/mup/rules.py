"""The equations of the parametrization: pure functions of role and ratios. No names, no modules, no process groups.

Zheng et al., arXiv 2505.15270, Table 1 for AdamW (TP-V's form with a multiplier on the readout only). With
m = fan-in / fan-in at the base width:

    role     init std         LR       weight decay (independent)   eps (scaled)   forward
    input    base             lr       wd                           eps / m        1
    hidden   base / sqrt(m)   lr / m   wd * m                       eps / m        1
    output   zero or base     lr       wd                           eps / m        output_mult / m
    vector   0 or 1           lr       0 (or wd)                    eps / m        1
"""

import dataclasses
import math

from mpdit.config import Mup, Optim
from mpdit.mup.roles import Group, Role, Tag


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a parameter gets. ``lr`` is the peak of its schedule; ``multiplier`` acts in the forward pass."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float
    multiplier: float


def width_ratio(width: int, mup: Mup) -> float:
    """m: how much wider than the proxy. Every dimension that grows does so by this factor, so each fan-in does."""
    return width / mup.base_width


def rule(tag: Tag, *, mup: Mup, optim: Optim, width: int) -> Rule:
    """The rule of a parameter with `tag` in a model of `width`; `optim` and `mup` hold base (proxy) values."""
    m = width_ratio(width, mup) if mup.parametrization == "mup" else 1.0
    return Rule(
        init_std=_init_std(tag, m, mup),
        lr=optim.lr * getattr(mup.lr_mult, tag.group) / (m if tag.role is Role.HIDDEN else 1.0),
        weight_decay=_weight_decay(tag, m, mup, optim),
        eps=optim.eps / (m if mup.eps_rule == "scaled" and tag.eps_follows_width else 1.0),
        multiplier=mup.output_mult / m if tag.role is Role.OUTPUT else 1.0,
    )


def _init_std(tag: Tag, m: float, mup: Mup) -> float:
    if tag.role is Role.VECTOR:
        return 0.0
    if tag.group is Group.MODULATION and mup.adaln_init == "zero":
        return 0.0
    if tag.role is Role.OUTPUT:
        # "base" is the proxy's std: under muP the readout's weights do not shrink, its multiplier does.
        return 0.0 if mup.readout_init == "zero" else tag.gain / math.sqrt(tag.fan_in / m)
    # A hidden weight's base / sqrt(m) with base = gain / sqrt(fan_in / m) is gain / sqrt(fan_in) at any width.
    return tag.gain / math.sqrt(tag.fan_in)


def _weight_decay(tag: Tag, m: float, mup: Mup, optim: Optim) -> float:
    if tag.role is Role.VECTOR and not mup.wd_vector:
        return 0.0
    if tag.role is not Role.HIDDEN:
        return optim.weight_decay
    return optim.weight_decay * {"const": 1.0, "independent": m, "sqrt": math.sqrt(m)}[mup.wd_rule]


def softmax_scale(head_dim: int, mup: Mup) -> float:
    """1/sqrt(head_dim); when head_dim is not the proxy's, sqrt(base_head_dim)/head_dim (equal at the proxy).

    Fixed head_dim with more heads is the paper's way to widen; a growing head_dim needs 1/d attention (TP-V).
    """
    base = mup.base_head_dim or head_dim
    return 1 / math.sqrt(head_dim) if mup.parametrization == "sp" else math.sqrt(base) / head_dim
