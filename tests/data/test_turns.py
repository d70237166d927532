"""Turns: everyone has had its share at any time, and any turn is known without those before it."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit.data.turns import Turns

weights = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 10**12)), min_size=1, max_size=9)


@settings(deadline=None)
@given(weights=weights, turns=st.integers(1, 300))
def test_each_row_takes_its_own_turns_in_order(weights: list[int], turns: int) -> None:
    rows, nths = Turns(weights).take(0, turns)
    for row in range(len(weights)):
        assert nths[rows == row].tolist() == [*range(np.count_nonzero(rows == row))]


@settings(deadline=None)
@given(weights=weights, start=st.one_of(st.integers(0, 300), st.integers(0, 10**15)), count=st.integers(1, 40))
def test_any_turn_is_known_without_those_before_it(weights: list[int], start: int, count: int) -> None:
    turns = Turns(weights)
    rows, nths = turns.take(start, count)
    single = [turns.take(turn, 1) for turn in range(start, start + count)]
    assert rows.tolist() == [int(row[0]) for row, _ in single]
    assert nths.tolist() == [int(nth[0]) for _, nth in single]


@settings(deadline=None)
@given(weights=weights, turns=st.one_of(st.integers(0, 300), st.integers(0, 10**15)))
def test_everyone_has_had_its_share(weights: list[int], turns: int) -> None:
    """After any number of turns; how many a row has had is the number of its next one."""
    limit = {1: 0, 2: 0.5, 3: 1}.get(len(weights), 1.68)
    rows, nths = Turns(weights).take(turns, 2000)
    for row, weight in enumerate(weights):
        if (mine := np.flatnonzero(rows == row)).size:
            had = int(nths[mine[0]])
            assert abs(had - Fraction(turns * weight, sum(weights))) <= limit


def test_pinned() -> None:
    """A resumed run must find its place: raise plan.VERSION if this has to change."""
    assert Turns([1, 3, 2]).take(0, 12)[0].tolist() == [2, 1, 0, 1, 2, 1, 2, 1, 0, 1, 2, 1]
    assert [a.tolist() for a in Turns([5]).take(7, 3)] == [[0, 0, 0], [7, 8, 9]]


@pytest.mark.parametrize("bad", [[], [1, 0], [-1]])
def test_impossible_weights(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="no turns"):
        Turns(bad)
