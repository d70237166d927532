"""FP8 casts: codes and scales of Transformer Engine's and torchao's own code, and what must hold of any tensor."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import fp8_cases
from kernels.fp8_cases import Case
from mpdit_kernels import fp8
from mpdit_kernels.fp8 import E4M3, E5M2, Quantized

GOLDENS = json.loads(fp8_cases.GOLDENS.read_text())  # tests/te/test_fp8_reference.py says how they were made

SIDES = st.integers(1, 300)
FORMATS = st.sampled_from([E4M3, E5M2])


def quantised(kind: str, x_RC: Tensor) -> Quantized:
    if kind.startswith("mx"):
        return fp8.quantize_mx(x_RC)
    if kind.startswith("tensor"):
        format = E5M2 if kind.endswith("e5m2") else E4M3
        return fp8.quantize_tensor(x_RC, format, fp8.scale_of(fp8.amax(x_RC), format))
    return fp8.quantize_blocks(x_RC, E4M3, (1, 128) if kind == "block 1x128" else (128, 128))


def drawn(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (2 * torch.randn(rows, 1, generator=generator)).exp()
    return (torch.randn(rows, columns, generator=generator) * size).to(dtype)


def same(a: Quantized, b: Quantized) -> bool:
    """To the bit, zeros' signs and nan included."""
    codes = torch.equal(a.codes.contiguous().view(torch.uint8), b.codes.contiguous().view(torch.uint8))
    return codes and torch.equal(a.inverse, b.inverse)


# ---- against other people's code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", fp8_cases.cases(), ids=lambda case: case.name)
def test_codes_and_scales_are_those_of_the_references(case: Case) -> None:
    found = quantised(case.kind, fp8_cases.matrix(case))
    assert fp8_cases.golden(found.codes, found.inverse) == GOLDENS[case.name]


# ---- what holds for all ----------------------------------------------------------------------------------------------


@given(kind=st.sampled_from(fp8_cases.KINDS), rows=SIDES, columns=SIDES, seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_what_is_quantised_is_near_and_never_larger_than_the_largest(
    kind: str, rows: int, columns: int, seed: int
) -> None:
    """Half a unit of the last place, or half of the smallest number; for shapes that no block divides."""
    x = drawn(rows, columns, seed)
    found = quantised(kind, x)
    assert found.codes.shape == x.shape
    format = found.codes.dtype
    values = found.codes.float()
    assert values.abs().max() <= fp8.largest(format)
    assert values.isfinite().all()
    step = 2.0**-4 if format is E4M3 else 2.0**-3
    smallest = 2.0**-9 if format is E4M3 else 2.0**-16
    unit = Quantized(codes=torch.ones_like(x).to(format), inverse=found.inverse, block=found.block).dequantized()
    assert ((found.dequantized() - x).abs() <= torch.maximum(step * x.abs(), smallest / 2 * unit) * (1 + 1e-6)).all()


@given(
    kind=st.sampled_from(fp8_cases.KINDS),
    power=st.integers(-40, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_a_power_of_two_moves_the_scales_alone(kind: str, power: int, dtype: torch.dtype, seed: int) -> None:
    x = drawn(20, 200, seed, dtype)
    one, other = quantised(kind, x), quantised(kind, x * 2.0**power)
    assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
    assert torch.equal(one.dequantized() * 2.0**power, other.dequantized())


@given(
    kind=st.sampled_from(["block 1x128", "block 128x128", "mx 1x32"]),
    rows=SIDES,
    columns=SIDES,
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_with_powers_of_two_for_scales_a_second_time_changes_nothing(
    kind: str, rows: int, columns: int, seed: int
) -> None:
    once = quantised(kind, drawn(rows, columns, seed)).dequantized()
    assert torch.equal(quantised(kind, once).dequantized(), once)


@given(format=FORMATS, seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_with_the_same_scale_a_second_time_changes_nothing(format: torch.dtype, seed: int) -> None:
    x = drawn(16, 16, seed)
    scale = fp8.scale_of(fp8.amax(x), format)
    once = fp8.quantize_tensor(x, format, scale)
    assert same(fp8.quantize_tensor(once.codes.float() / scale, format, scale), once)


@pytest.mark.parametrize("kind", fp8_cases.KINDS)
def test_zeros_stay_zeros(kind: str) -> None:
    """All of a tensor, and blocks of one that has others."""
    for x in (torch.zeros(130, 200), drawn(130, 200, 0).index_fill(0, torch.arange(0, 128), 0.0)):
        found = quantised(kind, x).dequantized()
        assert torch.equal(found == 0, x == 0)
    assert quantised(kind, torch.zeros(8, 16)).codes.float().abs().sum() == 0


def test_nothing_has_a_scale_of_one() -> None:
    assert fp8.amax(torch.empty(0, 8)) == 0
    for amax in (0.0, math.inf, math.nan):
        assert fp8.scale_of(torch.tensor(amax), E4M3) == 1
    assert fp8.scale_of(torch.tensor(1e-45), E4M3) == torch.finfo(torch.float32).max
    assert fp8.scale_of(torch.tensor(1e-45), E4M3, power_of_two=True) == 2.0**127


def test_infinity_is_the_largest_and_nan_stays() -> None:
    x = torch.tensor([[math.inf, -math.inf, 1.0, math.nan] + [0.5] * 28])
    one = fp8.quantize_tensor(x, E4M3, torch.tensor(1.0))
    assert one.codes.float()[0, :3].tolist() == [448, -448, 1]
    assert one.codes.float()[0, 3].isnan()
    assert fp8.quantize_tensor(x, E5M2, torch.tensor(1.0)).codes.float()[0, 0] == 57344
    infinite = fp8.quantize_mx(x[:, :3].repeat(1, 11)[:, :32])
    assert infinite.inverse.tolist() == [[254]]
    assert infinite.codes.float()[0, :3].tolist() == [448, -448, 0]
    unknown = fp8.quantize_mx(x)
    assert unknown.inverse.tolist() == [[255]]
    assert unknown.dequantized().isnan().all()


def test_exponents_are_the_next_power_of_two() -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 2.0**-127, 2.0**-126, 1.01 * 2.0**-127, 0.0, 3.4e38, math.inf, 2.0**-149])
    assert fp8.exponent_of(values).tolist() == [127, 128, 128, 0, 1, 1, 0, 254, 254, 0]
    every = torch.arange(255, dtype=torch.uint8)
    assert fp8.power_of_two(every).double().log2().tolist() == [e - 127 for e in range(255)]


@given(st.lists(st.floats(0.0, 1e30), min_size=1, max_size=12), st.integers(1, 4), st.booleans())
def test_delayed_scaling_knows_the_largest_of_so_many_steps(amaxes: list[float], length: int, recent: bool) -> None:
    """By a plain list; what is 0 is as if it had not been."""
    history, scale, seen = torch.zeros(length, 1), torch.ones(1), []
    for amax in torch.tensor(amaxes).tolist():
        history[0] = amax
        history, scale = fp8.next_scales(history, scale, E5M2, margin=1, most_recent=recent)
        seen += [amax] if amax else []
        kept = seen[-length:]
        if kept:
            wanted = torch.tensor(57344 / 2) / torch.tensor(kept[-1] if recent else max(kept))
            assert scale.item() == min(wanted.item(), torch.finfo(torch.float32).max)
        assert history[0] == 0


def test_delayed_scaling_keeps_its_scale_through_what_is_no_number() -> None:
    """An infinite amax keeps the scale as long as it is in the history, nan is passed over."""
    history, scale = torch.zeros(3, 1), torch.ones(1)
    found = []
    for amax in (2.0, math.inf, 1.0, 1.0, 1.0, math.nan, 4.0):
        history[0] = amax
        history, scale = fp8.next_scales(history, scale, E4M3)
        found.append(scale.item())
    assert found == [224, 224, 224, 224, 448, 448, 112]


@pytest.mark.parametrize("kind", ["tensor e4m3", "block 128x128"])
def test_transposed_is_the_transpose(kind: str) -> None:
    x = drawn(150, 270, 1)
    assert torch.equal(quantised(kind, x).transposed().dequantized(), quantised(kind, x).dequantized().t())
    assert same(quantised(kind, x).transposed(), quantised(kind, x.t()))
