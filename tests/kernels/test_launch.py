"""How rows are cut into programs: every row once, whatever the numbers, and no round for a few programs left over."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpdit_kernels.fused.launch import Rows, chunks_of, few_rows, launch, recorded, vector_of


@given(st.integers(0, 300), st.integers(0, 5000), st.integers(1, 2112))
def test_chunks_hold_every_row(groups: int, rows: int, programs: int) -> None:
    chunks = chunks_of(groups, rows, programs=programs)
    assert 1 <= chunks <= max(1, rows)
    assert chunks * math.ceil(rows / chunks) >= rows


@pytest.mark.parametrize(("groups", "rows"), [(8, 4096), (1, 32768), (64, 256), (256, 256), (3, 1000)])
def test_the_last_round_is_no_waste(groups: int, rows: int) -> None:
    """132 programs at once, as of wide rows on an H100: at most a quarter more time than if all were always busy."""
    chunks = chunks_of(groups, rows, programs=132)
    rounds = math.ceil(groups * chunks / 132)
    assert rounds * math.ceil(rows / chunks) <= 1.25 * max(groups * rows / 132, 8)


def test_few_rows_keeps_the_programs_busy() -> None:
    assert few_rows(2, 4096, programs=132, most=16) == 16
    assert few_rows(2, 64, programs=132, most=16) == 1
    assert few_rows(0, 64, programs=132, most=16) == 1


@pytest.mark.parametrize(
    ("shape", "modulation", "groups", "rows", "strides"),
    [
        ((7, 3, 8), (1, 3, 8), 3, 7, (8, 24)),
        ((3, 7, 8), (3, 1, 8), 3, 7, (56, 8)),
        ((7, 3, 8), (1, 1, 8), 3, 7, (8, 24)),
        ((3, 7, 8), (1, 1, 8), 3, 7, (56, 8)),
        ((7, 1, 8), (1, 1, 8), 1, 7, (0, 8)),
        ((1, 7, 8), (1, 7, 8), 7, 1, (8, 0)),
    ],
)
def test_rows_that_share_a_modulation(shape, modulation, groups: int, rows: int, strides) -> None:
    x = torch.empty(shape)
    found = Rows.of(x, [torch.empty(modulation)])
    assert (found.groups, found.rows, found.strides(x)) == (groups, rows, strides)


def test_vectors_need_every_stride() -> None:
    assert vector_of([72, 0, 216]) == 8
    assert vector_of([72, 0, 217]) == 1


def test_launches_on_meta_tensors_are_written_down_and_not_run() -> None:
    x = torch.empty(4, device="meta")

    def kernel() -> None:
        raise AssertionError

    launch(kernel, 3, x, warps=4)
    with recorded() as found:
        launch(kernel, 3, x, warps=4, D=8)
        launch(kernel, 0, x, warps=4, D=8)
    assert [(one.kernel, one.constants) for one in found] == [(kernel, {"D": 8})]
