"""Rules broken on purpose, one at a time: each replaces what mpdit.mup.rules says of some parameters.

A fault sees a parameter's name, tag and right rule, and returns the rule to use instead. Names are used here alone: the
project never decides by them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

from mpdit.config import Config
from mpdit.mup import table
from mpdit.mup.roles import Group, Role, Tag
from mpdit.mup.rules import Rule, width_ratio

Break = Callable[[str, Tag, Rule, Config], Rule]  # of a parameter's name, tag and right rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """`sentence` says what is wrong, `expected` where it has to show: a statistic and a group of parameters."""

    sentence: str
    breaks: Break
    expected: tuple[str, str]
    archs: tuple[str, ...] = ("dit",)
    more: tuple[str, ...] = ()  # dotted keys of the config
    ranks: int = 1
    layouts: tuple[str, ...] = ()


def _changed(rule: Rule, **factors: float) -> Rule:
    return dataclasses.replace(rule, **{key: getattr(rule, key) * factor for key, factor in factors.items()})


def _of(condition: Callable[[str, Tag], bool], change: Callable[[Rule, float], Rule]) -> Break:
    return lambda name, tag, rule, config: change(rule, width_ratio(tag, config.mup)) if condition(name, tag) else rule


def _role(*roles: Role) -> Callable[[str, Tag], bool]:
    return lambda _, tag: tag.role in roles


def _group(*groups: Group) -> Callable[[str, Tag], bool]:
    return lambda _, tag: tag.group in groups


def _named(part: str) -> Callable[[str, Tag], bool]:
    return lambda name, _: part in name


def _lr_over_m(rule: Rule, m: float) -> Rule:
    return _changed(rule, lr=1 / m)


def _lr_times_m(rule: Rule, m: float) -> Rule:
    return _changed(rule, lr=m)


def _as_hidden(rule: Rule, m: float) -> Rule:
    return _changed(rule, lr=1 / m, init_std=1 / math.sqrt(m), weight_decay=m)


def _readout_as_hidden(rule: Rule, m: float) -> Rule:
    return _changed(rule, lr=1 / m, init_std=1 / math.sqrt(m), multiplier=m)


def _sp(name: str, tag: Tag, rule: Rule, config: Config) -> Rule:
    m = width_ratio(tag, config.mup)
    if tag.role is Role.HIDDEN:
        return _changed(rule, lr=m, weight_decay=1 / m)
    return _changed(rule, multiplier=m) if tag.role is Role.OUTPUT else rule


def _megatron(name: str, tag: Tag, rule: Rule, config: Config) -> Rule:
    """Megatron-LM's use_mup: a parameter is left alone if it is a vector or "embedding" is in its name; any other gets
    lr / m; only language models' logits are multiplied."""
    m = config.model.width / config.mup.base_width
    lr = rule.lr * (m if tag.role is Role.HIDDEN else 1.0)  # the unscaled one
    left_alone = len(tag.shape) <= 1 or "embedding" in name
    return dataclasses.replace(rule, lr=lr if left_alone else lr / m, multiplier=1.0)


def _per_shard(name: str, tag: Tag, rule: Rule, config: Config) -> Rule:
    """What comes of taking a row-parallel weight's fan-in from its shard."""
    row_parallel = name.endswith(("proj.weight", "fc2.weight"))
    tp = config.parallel.tp if row_parallel else 1
    return _changed(rule, init_std=math.sqrt(tp), lr=tp)


_SCALE_SHIFT = _named("scale_shift.table")

FAULTS: dict[str, Fault] = {
    "sp": Fault(
        sentence="the standard parametrization: one learning rate for all, no multiplier",
        breaks=_sp,
        expected=("update", "hidden"),
        archs=("dit", "mmdit", "pixart", "uvit"),
    ),
    "hidden-init-not-scaled": Fault(
        sentence="hidden weights keep the proxy's initial std at every width",
        breaks=_of(_role(Role.HIDDEN), lambda rule, m: _changed(rule, init_std=math.sqrt(m))),
        expected=("activation", "hidden"),
    ),
    "hidden-lr-not-scaled": Fault(
        sentence="hidden weights (adaLN not among them) learn at lr instead of lr / m",
        breaks=_of(_group(Group.HIDDEN), _lr_times_m),
        expected=("update", "hidden"),
        archs=("dit", "mmdit", "pixart", "uvit"),
    ),
    "hidden-lr-by-sqrt-m": Fault(
        sentence="hidden weights learn at lr / sqrt(m) instead of lr / m",
        breaks=_of(_group(Group.HIDDEN), lambda rule, m: _changed(rule, lr=math.sqrt(m))),
        expected=("update", "hidden"),
    ),
    "readout-multiplier-missing": Fault(
        sentence="the readout's 1 / m in the forward pass is missing",
        breaks=_of(_role(Role.OUTPUT), lambda rule, m: _changed(rule, multiplier=m)),
        expected=("update", "output"),
        archs=("dit", "mmdit", "pixart", "uvit"),
    ),
    "readout-lr-scaled-too": Fault(
        sentence="the readout learns at lr / m, on top of its multiplier",
        breaks=_of(_role(Role.OUTPUT), _lr_over_m),
        expected=("update", "output"),
    ),
    "input-lr-scaled": Fault(
        sentence="patch and first timestep layers learn at lr / m, as if they were hidden",
        breaks=_of(_group(Group.INPUT), _lr_over_m),
        expected=("update", "input"),
    ),
    "embedding-lr-scaled": Fault(
        sentence="embedding tables learn at lr / m",
        breaks=_of(_group(Group.TABLE), _lr_over_m),
        expected=("update", "table"),
        archs=("dit", "mmdit"),
    ),
    "bias-lr-scaled": Fault(
        sentence="biases learn at lr / m",
        breaks=_of(_role(Role.VECTOR), _lr_over_m),
        expected=("update", "vector"),
        archs=("dit", "uvit"),
    ),
    "adaln-not-scaled": Fault(
        sentence="adaLN layers learn at lr instead of lr / m",
        breaks=_of(_group(Group.MODULATION), _lr_times_m),
        expected=("update", "modulation"),
        archs=("dit", "mmdit"),
    ),
    "second-timestep-linear-not-scaled": Fault(
        sentence="the second linear of the timestep MLP (width to width) counts as an embedder and learns at lr",
        breaks=_of(_named("embed.time.linear_2.weight"), _lr_times_m),
        expected=("update", "hidden"),
    ),
    "pixart-table-as-hidden": Fault(
        sentence="PixArt's scale_shift tables count as hidden: lr / m, std / sqrt(m)",
        breaks=_of(_SCALE_SHIFT, _as_hidden),
        expected=("update", "table"),
        archs=("pixart",),
    ),
    "uvit-skip-as-input": Fault(
        sentence="U-ViT's skip layers (2 width to width) count as inputs and learn at lr",
        breaks=_of(_named(".skip.weight"), _lr_times_m),
        expected=("update", "hidden"),
        archs=("uvit",),
    ),
    "repa-layer-as-hidden": Fault(
        sentence="the first layer of REPA's projector (width to 2048) counts as hidden: lr / m, no multiplier",
        breaks=_of(_named("repa.linear_1.weight"), _readout_as_hidden),
        expected=("activation", "output"),
        archs=("mmdit",),
        more=("objective.repa_weight=0.5",),
    ),
    "per-shard-fan-in": Fault(
        sentence="row-parallel weights take their fan-in from the shard that a tensor rank holds",
        breaks=_per_shard,
        expected=("layouts", "hidden"),
        ranks=2,
        layouts=("", "tp=2"),
    ),
    "megatron-use-mup": Fault(
        sentence="Megatron-LM's own use_mup, which tells layers apart by their names and knows language models",
        breaks=_megatron,
        expected=("update", "input"),
        archs=("dit", "mmdit", "pixart"),
    ),
}


@contextlib.contextmanager
def broken(fault: Fault) -> Iterator[None]:
    """Within, muP tables are made with the fault."""
    right = table.resolve

    def resolve(tags: dict[str, Tag], config: Config) -> dict[str, table.Entry]:
        return {
            name: dataclasses.replace(entry, rule=fault.breaks(name, entry.tag, entry.rule, config))
            for name, entry in right(tags, config).items()
        }

    from mpdit.train import session

    session.resolve = resolve  # type: ignore[assignment]
    try:
        yield
    finally:
        session.resolve = right  # type: ignore[assignment]
