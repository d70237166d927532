"""RMSNorm of heads and their rotation in Triton's interpreter (started by test_fused.py)."""

import pytest
import torch

from kernels.cases import HEADS

FP32, FP16 = 1e-6, 1e-3  # relative to the largest value


@pytest.mark.parametrize("case", HEADS)
def test_cases(case: str) -> None:
    found = HEADS[case].errors()
    assert max(found.values()) <= FP32, found
    found = HEADS[case].errors(torch.float16)
    assert max(found.values()) <= FP16, found
