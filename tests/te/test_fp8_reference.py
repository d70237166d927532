"""Codes and scales are to the bit those of Transformer Engine's own Python code and, for MXFP8, of torchao.

In an environment of its own (`make test-te`): the wheel transformer-engine==2.20.2 over a stand-in for its compiled
half, and torchao==0.18.0. The wheel has references for current scaling and for the update of delayed scaling. That of
blockwise scaling is in TE's repository alone (tests/pytorch/references): current scaling's with power-of-two scales,
block by block, is the same, and the way back is in the wheel. MXFP8 has none in Python: torchao's RCEIL is its rule.

WRITE_GOLDENS=1 python -m pytest tests/te -k golden    writes tests/kernels/goldens/fp8.json
"""

import json
import math
import os

import pytest
import torch
from torch import Tensor

from kernels import fp8_cases
from mpdit_kernels import fp8
from mpdit_kernels.fp8 import E4M3, E5M2, Quantized

pytest.importorskip("transformer_engine")
from transformer_engine.common.recipe import DelayedScaling, MMParams
from transformer_engine.pytorch import constants, quantization
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

SHAPES = [(64, 256), (100, 300), (128, 128), (1, 16), (33, 7)]


def drawn(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of very different size, zeros among them and a whole stretch of them."""
    generator = torch.Generator().manual_seed(seed)
    size = (3 * torch.randn(shape[0], 1, generator=generator)).exp()
    x = torch.randn(shape, generator=generator) * size
    x[0, :140] = 0
    return x.to(dtype)


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.contiguous().view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize("shape", SHAPES)
def test_current_scaling(shape: tuple[int, int], format: torch.dtype, dtype: torch.dtype) -> None:
    for factor in (1.0, 1e-6, 1e6):
        x = drawn(shape, dtype) * factor
        theirs = CurrentScalingQuantizerRef(dtype=format).quantize(x)
        ours = fp8.quantize_tensor(x, format, fp8.scale_of(fp8.amax(x), format))
        assert same(ours.codes, theirs.data)
        assert same(ours.transposed().codes, theirs.data_t)
        assert torch.equal(ours.inverse.view(1), theirs.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_blockwise_scaling(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> None:
    x = drawn(shape, dtype)
    ours = fp8.quantize_blocks(x, E4M3, block)
    codes, inverse = reference(f"block {block[0]}x{block[1]}", x)
    assert same(ours.codes, codes)
    assert torch.equal(ours.inverse, inverse)
    assert torch.equal(ours.dequantized(), _their_dequantized(ours))


def _their_dequantized(q: Quantized) -> Tensor:
    """By TE's own code, which wants the scales of 1 x 128 blocks transposed."""
    square = q.block == (128, 128)
    return Float8BlockwiseQTensorStorage(
        rowwise_data=q.codes.contiguous().view(torch.uint8),
        rowwise_scale_inv=q.inverse if square else q.inverse.t().contiguous(),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=constants.DType.kFloat8E4M3,
        quantizer=None,
        is_2D_scaled=square,
        fake_dtype=torch.float32,
    ).dequantize(dtype=torch.float32)


@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize(("algorithm", "margin"), [("max", 0), ("max", 3), ("most_recent", 0), ("most_recent", 1)])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_delayed_scaling(length: int, algorithm: str, margin: int, format: torch.dtype) -> None:
    """Steps that shrink, grow, overflow fp32's reciprocal and fp32 itself, of two tensors side by side."""
    recipe = DelayedScaling(amax_history_len=length, amax_compute_algo=algorithm, margin=margin)
    history, scale = torch.zeros(length, 2), torch.ones(2)
    their_history, their_scale = history.clone(), scale.clone()
    for step, amax in enumerate([1.0, 2.0, 1e-42, 8.0, math.inf, 1.0, 3.0, 0.5, 0.25, 1e30, 7.0]):
        row = torch.tensor([amax, 1.0 + step])
        history[0], their_history[0] = row, row
        history, scale = fp8.next_scales(history, scale, format, margin=margin, most_recent=algorithm == "most_recent")
        quantization._amax_and_scale_update(their_history, their_scale, fp8.largest(format), recipe)
        assert torch.equal(history, their_history)
        # Their Python code multiplies by a reciprocal, where their kernel, and this code, divides.
        torch.testing.assert_close(scale, their_scale, rtol=2**-22, atol=0)
        their_scale.copy_(scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 256), (128, 128), (3, 32)])
def test_mxfp8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    for factor in (1.0, 1e-20, 1e20):
        x = drawn(shape, dtype) * factor
        codes, exponents = reference("mx 1x32", x)
        ours = fp8.quantize_mx(x)
        assert same(ours.codes, codes)
        assert torch.equal(ours.inverse, exponents)


def test_products_are_those_of_the_reference() -> None:
    """y, dx and dw of an emulated linear against CurrentScalingQuantizerRef's own product of its own codes."""
    pytest.importorskip("megatron.core")
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.parallel.fp8 import Tensorwise

    x, w, dy = drawn((64, 96), torch.bfloat16), drawn((48, 96), torch.bfloat16, 1), drawn((64, 48), torch.bfloat16, 2)
    x.requires_grad_(), w.requires_grad_()
    y = Tensorwise()(x, w, None)
    y.backward(dy)
    forward, backward = CurrentScalingQuantizerRef(dtype=E4M3), CurrentScalingQuantizerRef(dtype=E5M2)
    qx, qw, qdy = forward.quantize(x.detach()), forward.quantize(w.detach()), backward.quantize(dy)
    split = MMParams(use_split_accumulator=True)
    operands = {
        "y": (y, qx.data, qw.data, qx.scale, qw.scale),
        "dx": (x.grad, qdy.data, qw.data_t, qdy.scale, qw.scale),
        "dw": (w.grad, qdy.data_t, qx.data_t, qdy.scale, qx.scale),
    }
    for name, (ours, a, b, a_scale, b_scale) in operands.items():
        theirs = forward.qgemm(a, b, split, torch.bfloat16, a_scale, b_scale)
        assert ours is not None
        torch.testing.assert_close(ours.detach(), theirs, rtol=2**-7, atol=float(theirs.abs().max()) * 2**-16, msg=name)


def reference(kind: str, x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [R, C], inverse scales or exponents) by other people's code."""
    if kind.startswith("mx"):
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_mx

        exponents, codes = to_mx(x_RC, E4M3, 32, ScaleCalculationMode.RCEIL)
        return codes, exponents.view(torch.uint8)
    if kind.startswith("tensor"):
        found = CurrentScalingQuantizerRef(dtype=E5M2 if kind.endswith("e5m2") else E4M3).quantize(x_RC)
        return found.data, found.scale
    r, c = (int(side) for side in kind.removeprefix("block ").split("x"))
    quantizer = CurrentScalingQuantizerRef(dtype=E4M3, pow_2_scales=True)
    rows, inverse = [], []
    for strip in x_RC.split(r):
        blocks = [quantizer.quantize(block.contiguous()) for block in strip.split(c, dim=1)]
        rows.append(torch.cat([block.data.view(torch.uint8) for block in blocks], 1))
        inverse.append(torch.cat([block.scale for block in blocks]))
    return torch.cat(rows).view(E4M3), torch.stack(inverse)


def test_the_golden_values_are_those_of_the_references() -> None:
    pytest.importorskip("torchao")
    found = {case.name: fp8_cases.golden(*reference(case.kind, fp8_cases.matrix(case))) for case in fp8_cases.cases()}
    if os.environ.get("WRITE_GOLDENS"):
        lines = [f"{json.dumps(name)}: {json.dumps(golden)}" for name, golden in found.items()]
        fp8_cases.GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert found == json.loads(fp8_cases.GOLDENS.read_text())
