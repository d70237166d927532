"""Each hyperparameter in words: the proxy's value, the rule and where it is from, the target's value, and why.

Values are those of the muP table (mpdit/mup/rules.py); here stands only what they are called.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from mpdit.config import Config
from mpdit.mup import rules
from mpdit.mup.roles import Group, Role, Tag
from mpdit.mup.rules import Rule
from mpdit.mup.table import Table

SOURCES = {
    "muP": "Zheng et al., arXiv 2505.15270, Table 1 (AdamW)",
    "TP-V": "Yang et al., arXiv 2203.03466",
    "CompleteP": "Dey et al., arXiv 2505.01618, Table 1, alpha = 1",
    "Complete(d)P": "arXiv 2512.22382; over batch size and length it was shown with cosine schedules",
    "decay": "Wang and Aitchison, arXiv 2405.13698; Kosson et al., arXiv 2510.19093; so does the code of [muP]",
    "sqrt": "Fan et al., arXiv 2510.15262",
    "eps": "Everett et al., arXiv 2407.05872",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Proxy and target: their configs and tables, and what each of the target's parameters gets in the proxy."""

    proxy: Config
    target: Config
    proxy_table: Table
    table: Table
    proxy_rules: Mapping[str, Rule | None]

    @property
    def completep(self) -> bool:
        return self.target.mup.parametrization == "completep"

    @property
    def root(self) -> str:
        """Complete(d)P's factor, where it acts."""
        return "sqrt(r)" if rules.noise_ratio(self.target) != 1 else ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A hyperparameter. ``source`` is a key of SOURCES."""

    name: str
    proxy: str
    rule: str
    target: str
    why: str
    source: str


def number(value: float) -> str:
    return f"{value:.6g}"


def lines(pair: Pair) -> list[Line]:
    """All hyperparameters that theory carries over."""
    parts = (_learning_rates, _weight_decays, _epsilons, _inits, _multipliers, _attention, _betas)
    return [line for part in parts for line in part(pair)]


# ---- what each parameter gets ----------------------------------------------------------------------------------------

_GROUPS = {  # who, and why its learning rate is what it is
    Group.INPUT: ("input matrices", "their fan-in is finite"),
    Group.TABLE: ("embedding tables", "a row is looked up: a fan-in of one"),
    Group.HIDDEN: ("hidden matrices", "m times as many changes of one sign add up"),
    Group.MODULATION: ("adaLN matrices", "hidden as well"),
    Group.OUTPUT: ("output matrices", "their forward multiplier shrinks instead"),
    Group.VECTOR: ("biases and gains", "nothing adds up in them"),
}


def _learning_rates(pair: Pair) -> Iterator[Line]:
    for group, (who, why) in _GROUPS.items():
        mult = getattr(pair.target.mup.lr_mult, group)
        tuned = f"; mup.lr_mult.{group} is a base value" if mult != 1 else ""
        rule = _times("lr", number(mult) if mult != 1 else "", pair.root)
        hidden = group in (Group.HIDDEN, Group.MODULATION)
        yield from _line(
            pair,
            f"learning rate, {who}",
            [name for name, entry in pair.table.items() if entry.tag.group is group],
            "lr",
            f"{rule} / m" if hidden else rule,
            why + tuned,
            "muP",
        )


def _weight_decays(pair: Pair) -> Iterator[Line]:
    mup = pair.target.mup
    factor, why, source = {
        "independent": ("m", "over the width lr * wd stays", "decay"),
        "const": ("", "mup.wd_rule const: lr * wd falls as 1 / m", "muP"),
        "sqrt": ("sqrt(m)", "mup.wd_rule sqrt: the singular values stay", "sqrt"),
    }[mup.wd_rule]
    kept = _times("wd", pair.root)
    vector = (kept, "mup.wd_vector, as in the paper") if mup.wd_vector else ("0", "not decayed (mup.wd_vector)")
    rows = {
        "hidden matrices": ((Role.HIDDEN,), _times("wd", factor, pair.root), why, source),
        "input and output": ((Role.INPUT, Role.OUTPUT), kept, "their learning rate stays", "muP"),
        "biases and gains": ((Role.VECTOR,), *vector, "muP"),
    }
    for who, (roles, rule, why, source) in rows.items():
        names = [name for name, entry in pair.table.items() if entry.tag.role in roles]
        yield from _line(pair, f"weight decay, {who}", names, "weight_decay", rule, why, source)


def _epsilons(pair: Pair) -> Iterator[Line]:
    if pair.target.mup.eps_rule == "constant":
        why = "mup.eps_rule constant, as in the paper's code"
        yield from _line(pair, "eps", list(pair.table), "eps", _over("eps", pair.root), why, "muP")
        return
    same = not any(_grows(entry.tag) for entry in pair.table.values())  # the target is as wide as the proxy
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for name, entry in pair.table.items():
        kinds.setdefault((same or _grows(entry.tag), pair.completep and entry.tag.in_block), []).append(name)
    for grows, deep in sorted(kinds, key=lambda kind: (not kind[0], kind[1])):
        who = "eps" if grows else "eps, what has no width (QK-norm gains, readout bias)"
        rule = _over("eps", "m" if grows else "", "m_L" if deep else "", pair.root)
        why = "gradients shrink as much" if grows or deep else "gradients do not shrink"
        source = "CompleteP" if deep else "eps" if grows else "Complete(d)P"
        name = f"{who}, in residual branches" if deep else who
        yield from _line(pair, name, kinds[grows, deep], "eps", rule, why, source)


def _inits(pair: Pair) -> Iterator[Line]:
    rows = {
        Role.INPUT: ("std", "their fan-in is finite"),
        Role.HIDDEN: ("std / sqrt(m)", "1 / sqrt(fan-in)"),
        Role.OUTPUT: ("std", "their forward multiplier shrinks instead"),
    }
    for role, (rule, why) in rows.items():
        names = [name for name, entry in pair.table.items() if entry.tag.role is role]
        zero = not any(pair.table[name].rule.init_std for name in names)
        yield from _line(
            pair, f"init std, {role} matrices", names, "init_std", rule, "zero at the start" if zero else why, "muP"
        )


def _multipliers(pair: Pair) -> Iterator[Line]:
    names = [name for name, entry in pair.table.items() if entry.tag.role is Role.OUTPUT]
    why = "m times as many terms of one sign add up"
    yield from _line(pair, "forward multiplier, output", names, "multiplier", "output_mult / m", why, "muP")
    if pair.completep:
        yield Line(
            name="forward multiplier, residual branches",
            proxy=number(rules.residual_multiplier(pair.proxy)),
            rule="1 / m_L",
            target=number(rules.residual_multiplier(pair.target)),
            why="m_L times as many branches add up",
            source="CompleteP",
        )


def _attention(pair: Pair) -> Iterator[Line]:
    small, own = pair.proxy.model.head_dim, pair.target.model.head_dim
    yield Line(
        name="softmax scale of attention",
        proxy=number(rules.softmax_scale(small, pair.proxy.mup)),
        rule="1 / sqrt(head_dim)" if small == own else f"sqrt({small}) / head_dim",
        target=number(rules.softmax_scale(own, pair.target.mup)),
        why="head_dim stays, there are more heads" if small == own else "head_dim grows: 1 / d attention",
        source="muP" if small == own else "TP-V",
    )


def _betas(pair: Pair) -> Iterator[Line]:
    if not pair.root:
        return
    for name, given, own in zip(("beta1", "beta2"), rules.betas(pair.proxy), rules.betas(pair.target), strict=True):
        yield Line(
            name=name,
            proxy=number(given),
            rule=f"1 - (1 - {name}) * r",
            target=number(own),
            why="averages over the same share of the run",
            source="Complete(d)P",
        )


Value = Literal["lr", "weight_decay", "eps", "init_std", "multiplier"]


def _line(
    pair: Pair, name: str, names: Sequence[str], value: Value, rule: str, why: str, source: str
) -> Iterator[Line]:
    """The line of the parameters in `names`; none where there are none."""
    if names:
        given = [getattr(theirs, value) for key in names if (theirs := pair.proxy_rules[key])]
        own = [getattr(pair.table[key].rule, value) for key in names]
        yield Line(name=name, proxy=_range(given), rule=rule, target=_range(own), why=why, source=source)


def _times(*factors: str) -> str:
    return " * ".join(filter(None, factors))


def _over(whole: str, *factors: str) -> str:
    below = [factor for factor in factors if factor]
    return f"{whole} / ({_times(*below)})" if len(below) > 1 else " / ".join([whole, *below])


def _grows(tag: Tag) -> bool:
    return (tag.fan_in, tag.fan_out) != (tag.base_fan_in, tag.base_fan_out)


def _range(values: Sequence[float]) -> str:
    """One number, or the lowest and highest of several. Zeros beside others are not of interest."""
    shown = [number(value) for value in sorted([value for value in values if value] or values)]
    return " to ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else "none"
