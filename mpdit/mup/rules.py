"""The equations of the parametrization: pure functions of role and ratios. No names, no modules, no process groups.

Zheng et al., arXiv 2505.15270, Table 1 for AdamW (TP-V's form with a multiplier on the readout only). With
m = fan-in / fan-in in the proxy, of each tensor (for inputs and vectors, whose fan-in is finite, of the fan-out):

    role     init std         LR       weight decay (independent)   eps (scaled)   forward
    input    base             lr       wd                           eps / m        1
    hidden   base / sqrt(m)   lr / m   wd * m                       eps / m        1
    output   zero or base     lr       wd                           eps / m        output_mult / m
    vector   0 or 1           lr       0 (or wd)                    eps / m        1

completep (Dey et al., arXiv 2505.01618, alpha = 1) adds, with m_L = depth / depth of the proxy: residual branches times
1 / m_L, and in them eps / m_L. A run of other batch size and length than the proxy's follows Complete(d)P (arXiv
2512.22382): with r = batch ratio / images ratio, lr and wd * sqrt(r), eps / sqrt(r), 1 - beta times r.
"""

import dataclasses
import math

from mpdit.config import Config, Mup, Optim
from mpdit.mup.roles import Role, Tag


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a parameter gets. ``lr`` is the peak of its schedule; ``multiplier`` acts in the forward pass."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float
    multiplier: float


def rule(tag: Tag, config: Config) -> Rule:
    """The rule of a parameter with `tag`; ``config.optim`` and ``config.mup`` hold base (proxy) values."""
    mup, optim = config.mup, config.optim
    m, r = width_ratio(tag, mup), noise_ratio(config)
    in_depth = depth_ratio(config) if tag.in_block else 1.0
    return Rule(
        init_std=_init_std(tag, m),
        lr=optim.lr * getattr(mup.lr_mult, tag.group) * math.sqrt(r) / (m if tag.role is Role.HIDDEN else 1.0),
        weight_decay=_weight_decay(tag, m, mup, optim) * math.sqrt(r),
        eps=optim.eps / math.sqrt(r) / (m * in_depth if mup.eps_rule == "scaled" else 1.0),
        multiplier=mup.output_mult / m if tag.role is Role.OUTPUT else 1.0,
    )


def width_ratio(tag: Tag, mup: Mup) -> float:
    """m of one tensor: by its fan-in, or by its fan-out where the fan-in is finite; 1 under sp."""
    if mup.parametrization == "sp":
        return 1.0
    if tag.role in (Role.HIDDEN, Role.OUTPUT):
        return tag.fan_in / tag.base_fan_in
    return tag.fan_out / tag.base_fan_out


def depth_ratio(config: Config) -> float:
    """m_L: how much deeper than the proxy; 1 unless the parametrization is completep."""
    if config.mup.parametrization != "completep":
        return 1.0
    return config.model.depth / (config.mup.base_depth or config.model.depth)


def residual_multiplier(config: Config) -> float:
    """What multiplies every residual branch: 1 / m_L."""
    return 1.0 / depth_ratio(config)


def noise_ratio(config: Config) -> float:
    """r = m_B / m_D: how much larger than the proxy's is the batch, over how many more images are seen."""
    mup, train = config.mup, config.train
    m_B = train.batch_size / (mup.base_batch_size or train.batch_size)
    images = train.batch_size * train.steps
    return m_B / (images / (mup.base_images or images))


def betas(config: Config) -> tuple[float, float]:
    """AdamW's: 1 - beta follows r, so that the averages span the same share of the run."""
    r = noise_ratio(config)
    return 1 - (1 - config.optim.beta1) * r, 1 - (1 - config.optim.beta2) * r


def _init_std(tag: Tag, m: float) -> float:
    if tag.role is Role.VECTOR:
        return 0.0
    if tag.role is Role.OUTPUT:
        # Under muP the readout's weights keep the proxy's std; its multiplier shrinks instead.
        return tag.gain / math.sqrt(tag.fan_in / m)
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
