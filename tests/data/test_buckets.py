"""Which aspect-ratio bucket an image goes to: the nearest in log ratio, whatever the scale; ties to the first."""

import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import tiny
from mpdit.data import buckets

SIDES = st.integers(1, 20_000)
BUCKETS = ((32, 32), (48, 24), (24, 48), (40, 32))


@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=20))
def test_the_nearest_in_log_ratio(sizes: list[tuple[int, int]]) -> None:
    found = buckets.nearest_bucket(np.array(sizes), BUCKETS)
    for (height, width), number in zip(sizes, found, strict=True):
        distances = [abs(math.log(height / width) - math.log(h / w)) for h, w in BUCKETS]
        assert distances[number] <= min(distances) + 1e-12


@given(side=SIDES, scale=st.integers(1, 50))
def test_ties_go_to_the_first(side: int, scale: int) -> None:
    """Between a bucket and its mirror image for a square, and between buckets of one ratio."""
    square = np.array([[side, side]])
    for pair in (((3, 2), (2, 3)), ((2, 3), (3, 2)), ((7 * scale, 5 * scale), (7, 5))):
        assert buckets.nearest_bucket(square, pair).tolist() == [0]
    assert buckets.nearest_bucket(np.array([[7 * side, 5 * side]]), ((7, 5), (7 * scale, 5 * scale))).tolist() == [0]


def test_no_buckets_are_the_square(tmp_path: Path) -> None:
    assert buckets.of_config(tiny.config(tmp_path)) == ((12, 12),)
    assert buckets.of_config(tiny.config(tmp_path, data={"buckets": [[24, 12], [12, 24]]})) == ((24, 12), (12, 24))
