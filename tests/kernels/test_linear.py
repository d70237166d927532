"""fp32 products on the CPU are those of float64 to a rounding, forward and backward, are counted, and compile."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mpdit_kernels import linear as linears
from mpdit_kernels.linear import linear

BOUND = 2e-6  # relative to the largest number, or to the terms, about 1, where they cancel; a float32 has 6e-8


def tensors(
    shape: tuple[int, ...], fan_out: int, *, bias: bool, dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [shape, (fan_out, shape[-1]), *([(fan_out,)] if bias else [])]
    return [torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in shapes]


def passes(function, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """y and all gradients."""
    y = function(*given)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(x.grad for x in given)]


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max().clamp(min=1))


@given(
    leading=st.lists(st.integers(1, 5), max_size=2),
    fan_in=st.integers(1, 70),
    fan_out=st.integers(1, 70),
    bias=st.booleans(),
)
def test_forward_and_gradients_are_those_of_float64(leading: list[int], fan_in: int, fan_out: int, bias: bool) -> None:
    given_ = tensors((*leading, fan_in), fan_out, bias=bias, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in given_]
    for found, wanted in zip(passes(linear, given_), passes(F.linear, exact), strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == torch.float32
        assert apart(found, wanted) <= BOUND


def test_views_that_megatron_makes() -> None:
    """Every second row of a wider tensor, and samples first."""
    wide = torch.randn(6, 4, 2, 8)
    for x in (wide[:, :, 0], wide[:, :, 0].transpose(0, 1)):
        w = torch.randn(5, 8)
        assert not x.is_contiguous()
        assert apart(linear(x, w), F.linear(x.double(), w.double())) <= BOUND


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    y, dx, dw, db = passes(linear, tensors(shape, 4, bias=True, dtype=torch.float32))
    assert y.shape == (*shape[:-1], 4)
    assert dx.shape == shape
    assert not dw.any()
    assert not db.any()


def test_only_what_is_asked_for_is_computed() -> None:
    """A frozen weight gets no gradient, and none is counted."""
    x, w, b = tensors((6, 3), 4, bias=True, dtype=torch.float32)
    w.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        linear(x, w, b).sum().backward()
    assert w.grad is None
    assert counter.get_total_flops() == 2 * (2 * 6 * 3 * 4)


def test_flops_are_counted_as_torch_counts_its_own() -> None:
    counted = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(*tensors((5, 2, 33), 11, bias=True, dtype=torch.float32)).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 3 * 2 * 10 * 33 * 11


def test_other_types_are_torchs() -> None:
    given_ = tensors((4, 8), 3, bias=True, dtype=torch.bfloat16)
    assert torch.equal(linear(*given_), F.linear(*given_))


def test_fp32_is_onednns_where_torch_has_it() -> None:
    with torch.profiler.profile() as profile:
        linear(*tensors((4, 8), 3, bias=True, dtype=torch.float32))
    names = {event.key for event in profile.key_averages()}
    assert ("mkldnn::_linear_pointwise" in names) == (linears._onednn is not None)


def test_it_compiles_without_a_break() -> None:
    given_ = tensors((4, 2, 8), 3, bias=True, dtype=torch.float32)
    again = [x.detach().clone().requires_grad_() for x in given_]
    compiled = torch.compile(lambda x, w, b: F.gelu(linear(x, w, b)), fullgraph=True, backend="aot_eager")
    eager = passes(lambda x, w, b: F.gelu(linear(x, w, b)), given_)
    for found, wanted in zip(passes(compiled, again), eager, strict=True):
        assert apart(found, wanted) <= BOUND
