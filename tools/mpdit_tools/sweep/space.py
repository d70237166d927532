"""What a sweep searches: dotted config keys, each with a range, a list of values, or factors of a value."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mpdit import config as configs
from mpdit.config import Config, suggestion
from mpdit.errors import InputError

Params = dict[str, Any]  # dotted config key: value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Values between `low` and `high`, both included, uniform in the value or in its logarithm."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool  # the key takes whole numbers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """A list of values. `ordered`: numbers in ascending order (a grid), which can be too short at an end."""

    key: str
    values: tuple[Any, ...]
    ordered: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """Coordinate search: the value held so far times each of these."""

    key: str
    factors: tuple[float, ...]


Axis = Range | Values | Factors
_KINDS = {
    "log_uniform": "{log_uniform: [1e-4, 1e-2]}",
    "uniform": "{uniform: [0, 1]}",
    "choice": "{choice: [linear, cosine]}",
    "grid": "{grid: [2^-11, 2^-10, 2^-9]}",
    "factors": "{factors: [0.5, 2]}",
}
_OF_MODE = {
    "random": ("log_uniform", "uniform", "choice", "grid"),
    "tpe": ("log_uniform", "uniform", "choice", "grid"),
    "grid": ("choice", "grid"),
    "coordinate": ("factors", "grid"),
}


def read(tree: Any, mode: str, where: str) -> tuple[Axis, ...]:
    """The axes of a spec's ``search`` section. Raises InputError, with `where` in front, for the first bad one."""
    if not isinstance(tree, dict) or not tree:
        raise InputError(f"{where}: should hold a key to search, such as optim.lr: {_KINDS[_OF_MODE[mode][0]]}.")
    axes = tuple(_axis(str(key), entry, mode, where) for key, entry in tree.items())
    grids = [axis.key for axis in axes if isinstance(axis, Values)]
    if mode == "coordinate" and len(grids) != 1:
        raise InputError(
            f"{where}: mode coordinate sweeps one grid, as a rule optim.lr's, before and after it tries factors, but "
            f"grids are given for {', '.join(grids) or 'no key'}."
        )
    return axes


def _axis(key: str, entry: Any, mode: str, where: str) -> Axis:
    allowed = _OF_MODE[mode]
    shown = " or ".join(_KINDS[kind] for kind in allowed)
    if key.startswith("run.") or key == "train.seed":
        raise InputError(f"{where}: {key} can't be searched: the sweep gives each trial its own.")
    if not isinstance(entry, dict) or len(entry) != 1:
        raise InputError(f"{where}: {key} should be {shown}, but is {entry!r}.")
    kind, given = next(iter(entry.items()))
    if kind not in _KINDS:
        raise InputError(f"{where}: {key}: unknown key {kind}{suggestion(str(kind), allowed)}.")
    if kind not in allowed:
        raise InputError(f"{where}: {key}: mode {mode} takes {shown}, not {kind}.")
    place = f"{where}: {key}: {kind}"
    if not isinstance(given, list) or not given:
        raise InputError(f"{place} should be a list, as in {_KINDS[kind]}, but is {given!r}.")
    if kind == "factors":
        return _factors(key, given, where, place)
    values = [typed(key, value, where) for value in given]
    if kind in ("uniform", "log_uniform"):
        return _range(key, kind, values, place)
    if len(set(map(repr, values))) < len(values):
        raise InputError(f"{place} holds a value twice: {given}.")
    if any(isinstance(value, tuple) for value in values):
        raise InputError(f"{place}: lists can't be searched.")
    if kind == "grid":
        if not all(map(_is_number, values)):
            raise InputError(f"{place} should hold numbers; other values go into choice: {given}.")
        values.sort()
    return Values(key=key, values=tuple(values), ordered=kind == "grid")


def _range(key: str, kind: str, values: list[Any], place: str) -> Range:
    if len(values) != 2 or not all(map(_is_number, values)):
        raise InputError(f"{place} should be two numbers, the low and the high end, but is {values}.")
    low, high = values
    if kind == "log_uniform" and low <= 0:
        raise InputError(
            f"{place}: the low end of a range in logarithms should be above 0, but is {number(low)}; raise it, or use "
            "uniform."
        )
    if not low < high:
        raise InputError(f"{place}: the low end {number(low)} should be below the high end {number(high)}.")
    return Range(key=key, low=low, high=high, log=kind == "log_uniform", whole=isinstance(low, int))


def _factors(key: str, given: list[Any], where: str, place: str) -> Factors:
    if not _is_number(typed(key, 1 if _is_whole(key) else 1.0, where)):
        raise InputError(f"{place}: {key} is no number.")
    factors = [_power(value) for value in given]
    if not all(_is_number(value) and 0 < value < math.inf and value != 1 for value in factors):
        raise InputError(f"{place} should be numbers above 0 and other than 1, but is {given}.")
    return Factors(key=key, factors=tuple(map(float, factors)))


# ---- values and config keys ------------------------------------------------------------------------------------------


def typed(key: str, value: Any, where: str) -> Any:
    """`value` as the config holds it under a dotted `key`; "2^-10" is a power. Raises InputError as configs do."""
    value = _power(value)
    if isinstance(value, float) and value.is_integer() and _is_whole(key):
        value = int(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {key}: {value} should be a finite number.")
    return of(filled(Config(), {key: value}, where), key)


def filled(config: Config, params: Mapping[str, Any], where: str) -> Config:
    """`config` with dotted keys set. Raises InputError for an unknown key or a value of the wrong type."""
    tree = configs.to_dict(config)
    for key, value in params.items():
        configs.put(tree, key, value, f"{where}: unknown key {key}")
    return configs.from_dict(tree, where)


def of(config: Config, key: str) -> Any:
    """The value under a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def scaled(value: float, factor: float) -> float:
    """`value` times a factor; a whole number stays one, of at least 1."""
    return max(1, round(value * factor)) if isinstance(value, int) else value * factor


def _is_whole(key: str) -> bool:
    """Whether the config takes whole numbers under `key`; False for an unknown one, of which others complain."""
    hint: Any = Config
    for part in key.split("."):
        hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return int in choices


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _power(value: Any) -> Any:
    """2^-10, as learning rates are written, is 2.0 ** -10; all else stays."""
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*\^\s*([+-]?\d+(?:\.\d+)?)\s*", value) if isinstance(value, str) else None
    )
    try:
        return float(found[1]) ** float(found[2]) if found else value
    except ArithmeticError:
        raise InputError(f"{value.strip()} is no finite number; give a smaller power.") from None


def number(value: Any) -> str:
    """A value for people: small powers of two as such, by half octaves (2^-10, 2^-5.5), else four digits."""
    if isinstance(value, float) and 0 < value < 0.125:
        halves = 2 * math.log2(value)
        if abs(halves - round(halves)) < 1e-9:
            return f"2^{round(halves) / 2:g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- is the optimum inside? ------------------------------------------------------------------------------------------

_NEAR, _AROUND = 0.1, 0.25  # of a range's length: how close to an end the best lies, and the next best around it


def too_narrow(axis: Axis, best: Sequence[Any]) -> str:
    """How to widen an axis, such as "raise the high end to 0.1", if the first of the `best` values lies at an end
    and half of the others or more are around there; empty otherwise, or if nothing lies beyond (0 of an axis that is
    not logarithmic). One alone says little: of a key that does not matter it lies near an end one time in five.
    """
    end = _end(axis, best[0], _NEAR)
    others = [_end(axis, value, _AROUND) for value in best[1:]]
    if not end or 2 * others.count(end) < len(others):
        return ""
    return _widened(axis, end) if isinstance(axis, Range) else _longer(axis, end)


def _end(axis: Axis, value: Any, near: float) -> Literal["low", "high", ""]:
    """The end that a value lies at; `near` is a share of a range's length."""
    if isinstance(axis, Range):
        low, high, at = (math.log(v) if axis.log else v for v in (axis.low, axis.high, value))
        share = (at - low) / (high - low)
        if share < near and (axis.log or axis.low != 0):
            return "low"
        return "high" if share > 1 - near else ""
    if isinstance(axis, Values) and axis.ordered and len(axis.values) > 1:
        if value == axis.values[0] != 0:
            return "low"
        return "high" if value == axis.values[-1] else ""
    return ""


def _widened(axis: Range, end: str) -> str:
    """By half of the range's length."""
    low, high = (math.log(v) if axis.log else v for v in (axis.low, axis.high))
    value = low - (high - low) / 2 if end == "low" else high + (high - low) / 2
    value = math.exp(value) if axis.log else max(value, 0.0) if axis.low >= 0 else value
    rounded = float(f"{value:.2g}")
    shown = str(max(int(axis.log), round(rounded))) if axis.whole else number(rounded)
    return f"{'lower' if end == 'low' else 'raise'} the {end} end to {shown}"


def _longer(axis: Any, end: str) -> str:
    """By a point in the ratio of the last two."""
    first, second = axis.values[:2] if end == "low" else axis.values[:-3:-1]
    further = first * first / second if second else 2 * first
    return f"add {number(round(further) if isinstance(first, int) else further)} to the grid"
