"""The gated residual sum in Triton's interpreter (started by test_fused.py)."""

import pytest
import torch

from kernels.cases import LAYOUTS, WIDTHS, Rows, rows_errors

FP32, FP16 = 1e-6, 1e-3  # relative to the largest value


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int) -> None:
    rows = Rows(shape=(9, 2, width), modulation=(1, 2, width))
    assert max(rows_errors("gated_residual", rows).values()) <= FP32
    assert max(rows_errors("gated_residual", rows, torch.float16).values()) <= FP16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    found = rows_errors("gated_residual", LAYOUTS[layout], multiplier=0.3)
    assert max(found.values()) <= FP32, found


def test_without_a_gate() -> None:
    found = rows_errors("gated_residual", LAYOUTS["sequence first"], gated=False, multiplier=0.3)
    assert max(found.values()) <= FP32, found
