"""Layer norm, modulation and the sum before them, in Triton's interpreter (started by test_fused.py)."""

import pytest
import torch

from kernels.cases import LAYOUTS, WIDTHS, Rows, rows_errors

FP32, FP16, BF16 = 1e-6, 1e-3, 2e-2  # relative to the largest value; the interpreter truncates bf16


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("operation", ["layer_norm_modulate", "gated_residual_modulate", "residual_layer_norm"])
def test_widths(operation: str, width: int) -> None:
    rows = Rows(shape=(9, 2, width), modulation=(1, 2, width))
    assert max(rows_errors(operation, rows).values()) <= FP32
    assert max(rows_errors(operation, rows, torch.float16).values()) <= FP16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", ["layer_norm_modulate", "gated_residual_modulate"])
def test_layouts(operation: str, layout: str) -> None:
    found = rows_errors(operation, LAYOUTS[layout])
    assert max(found.values()) <= FP32, found


@pytest.mark.parametrize("layout", ["sequence first", "batch first", "no tokens", "columns of another"])
def test_layer_norms_own_gain_and_bias(layout: str) -> None:
    for operation in ("layer_norm", "residual_layer_norm"):
        assert max(rows_errors(operation, LAYOUTS[layout]).values()) <= FP32


def test_a_sum_without_a_gate() -> None:
    found = rows_errors("gated_residual_modulate", LAYOUTS["sequence first"], gated=False, multiplier=0.3)
    assert max(found.values()) <= FP32, found


def test_the_multiplier_scales_branch_and_gradients() -> None:
    for operation in ("gated_residual_modulate", "residual_layer_norm"):
        assert max(rows_errors(operation, LAYOUTS["sequence first"], multiplier=0.3).values()) <= FP32


@pytest.mark.parametrize(("own", "of_modulation"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_types_may_differ(own: torch.dtype, of_modulation: torch.dtype) -> None:
    found = rows_errors("gated_residual_modulate", LAYOUTS["sequence first"], own, modulation_dtype=of_modulation)
    assert max(found.values()) <= FP16, found


def test_bf16_runs() -> None:
    """No more than that: what bf16 is worth only a GPU can tell."""
    found = rows_errors("gated_residual_modulate", LAYOUTS["sequence first"], torch.bfloat16)
    assert max(found.values()) <= BF16, found
