"""Guards the arithmetic of the coordinate check: slopes, what is expected, what is out of bounds, in which order."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpdit.mup.coordcheck import (
    ACTIVATION,
    BOUNDS,
    CHANGE,
    GRADIENT,
    UPDATE,
    Bounds,
    Key,
    expected_gradient_slope,
    expected_slope,
    is_finite,
    judge,
    slopes,
    still,
)
from mpdit.mup.roles import Tag, Width, matrix, vector

D = Width(256, 32)


def key(statistic: str, step: int, name: str) -> Key:
    return Key(statistic=statistic, step=step, name=name)


@given(
    slope=st.floats(-2, 2),
    height=st.floats(1e-6, 1e6),
    noise=st.lists(st.floats(-1, 1), min_size=1, max_size=3),
)
def test_a_power_law_gives_its_exponent_whatever_the_seeds_have_in_common(
    slope: float, height: float, noise: list[float]
) -> None:
    measured = {w: {key(CHANGE, 1, "a"): [height * w**slope * 2**n for n in noise]} for w in (32, 64, 128, 256)}
    assert slopes(measured)[key(CHANGE, 1, "a")] == pytest.approx(slope, abs=1e-9)


def test_seeds_are_averaged_in_the_logarithm() -> None:
    """One seed twice as high at the widest size shifts a slope of three points by a quarter, not by its share."""
    measured = {w: {key(CHANGE, 1, "a"): [1.0, 2.0 if w == 4 else 1.0]} for w in (1, 2, 4)}
    assert slopes(measured)[key(CHANGE, 1, "a")] == pytest.approx(0.25)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_what_did_not_move_or_has_no_number_has_no_slope(value: float) -> None:
    measured = {w: {key(UPDATE, 1, "a"): [value if w == 64 else 1.0]} for w in (32, 64, 128)}
    assert slopes(measured) == {}


def test_something_missing_at_one_size_has_no_slope() -> None:
    measured = {32: {key(UPDATE, 1, "a"): [1.0]}, 64: {}, 128: {key(UPDATE, 1, "a"): [1.0]}}
    assert slopes(measured) == {}


def test_bounds_of_the_design() -> None:
    """0.1 for the start and for changes, 0.3 for own updates; later activations, gradients, norms are shown alone."""
    bounds = BOUNDS["width"]
    assert [bounds.of(key(s, n, "a")) for s, n in ((ACTIVATION, 0), (CHANGE, 1), (UPDATE, 2))] == [0.1, 0.1, 0.3]
    assert bounds.of(key(ACTIVATION, 2, "a")) is None
    assert bounds.of(key(GRADIENT, 2, "a")) is None


def test_findings_name_causes_before_what_follows_from_them() -> None:
    found = {
        key(CHANGE, 1, "b"): 0.9,
        key(UPDATE, 2, "c.weight"): 0.31,
        key(ACTIVATION, 0, "a"): -0.11,
        key(UPDATE, 2, "d.weight"): -1.0,
        key(CHANGE, 2, "fine"): 0.09,
        key(ACTIVATION, 2, "not judged"): 3.0,
    }
    out = judge(found, Bounds().of, lambda _: 0.0)
    assert [f.key.name for f in out] == ["a", "d.weight", "c.weight", "b"]
    assert out[1].excess == pytest.approx(1 / 0.3)


def test_a_slope_is_judged_against_what_is_expected() -> None:
    found = {key(ACTIVATION, 0, "repa"): -0.5, key(ACTIVATION, 0, "other"): 0.0}
    assert [f.key.name for f in judge(found, Bounds().of, lambda k: -0.5)] == ["other"]


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [(matrix(2048, D), -0.5), (matrix(16, 2048), 0.0), (matrix(D, D), 0.0), (matrix(D, 16), 0.0), (vector(16), 0.0)],
    ids=["output", "finite to finite", "hidden", "input", "gain"],
)
def test_an_output_layer_starts_smaller_the_wider_it_is(tag: Tag, wanted: float) -> None:
    """Its weights have the proxy's std and its multiplier is 1 / m: a sum of `width` terms, over the width."""
    assert expected_slope(key(ACTIVATION, 0, "a"), {"a.weight": tag}) == wanted
    assert expected_slope(key(CHANGE, 1, "a"), {"a.weight": tag}) == 0.0
    assert expected_slope(key(ACTIVATION, 0, "unknown"), {"a.weight": tag}) == 0.0


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [(matrix(D, D), -1.0), (matrix(16, D), -1.0), (matrix(D, 16), -1.0), (vector(D), -1.0), (vector(16), 0.0)],
)
def test_the_eps_rule_counts_on_gradients_that_shrink_where_a_fan_grows(tag: Tag, wanted: float) -> None:
    assert expected_gradient_slope(tag) == wanted


@pytest.mark.parametrize(
    ("tag", "finite"),
    [(matrix(16, 2048), True), (matrix(2048, D), False), (matrix(D, D), False), (matrix(D, 16), False)],
)
def test_layers_without_the_width_are_not_judged(tag: Tag, finite: bool) -> None:
    """Their own updates; those of their biases are."""
    tags = {"a.weight": tag, "a.bias": vector(16)}
    assert is_finite(key(CHANGE, 1, "a"), tags) is finite
    assert is_finite(key(UPDATE, 1, "a.weight"), tags) is finite
    assert not is_finite(key(UPDATE, 1, "a.bias"), tags)


def test_parameters_that_never_moved_are_named() -> None:
    measured = {32: {key(UPDATE, 1, "a"): [0.0], key(UPDATE, 2, "a"): [1.0], key(UPDATE, 1, "b"): [0.0, 0.0]}}
    assert still(measured, ["a", "b", "c"]) == ["b", "c"]


def test_bounds_can_be_set_one_by_one() -> None:
    assert dataclasses.replace(BOUNDS["depth"], update=1.0).of(key(CHANGE, 1, "a")) == 0.3
