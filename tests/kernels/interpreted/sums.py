"""The second stage of sums over rows in Triton's interpreter (started by test_fused.py)."""

import pytest
import torch

from kernels.oracle import random
from mpdit_kernels.fused.launch import sums_over_rows

FP32 = 1e-6  # relative to the largest value


@pytest.mark.parametrize("chunks", [0, 1, 63, 64, 65, 200])
def test_every_chunk_is_added(chunks: int) -> None:
    """More chunks than one tile holds, which takes a GPU's many programs elsewhere."""
    partial = random(2, 3, chunks, 70, seed=1)
    for shift in (torch.empty(1, 3, 70), torch.empty(3, 1, 70), torch.empty(1, 1, 70)):
        wanted = partial.double().sum(2 if shift.shape != (1, 1, 70) else (1, 2)).view(2, *shift.shape)
        found = sums_over_rows(partial, [shift, None, shift])
        assert found[1] is None
        for one, exact in zip((found[0], found[2]), wanted, strict=True):
            assert one is not None
            assert (one - exact).abs().max() <= FP32 * exact.abs().max().clamp(min=1)


def test_each_gets_its_own_shape_and_type() -> None:
    partial = random(2, 3, 5, 8, seed=1)
    of_all, of_each = sums_over_rows(partial, [torch.empty(8).half(), torch.empty(1, 3, 8)])
    assert of_all is not None
    assert of_each is not None
    assert (of_all.dtype, of_each.dtype) == (torch.float16, torch.float32)
    assert torch.equal(of_all, partial[0].double().sum((0, 1)).half())
    assert (of_each - partial[1].double().sum(1)).abs().max() <= 1e-5
