"""The operations by their references, as a CPU runs them, and the sentences about shapes and types that don't fit."""

import subprocess
import sys

import pytest
import torch

from kernels.cases import HEADS, LAYOUTS, USED, rows_errors
from kernels.oracle import random
from mpdit_kernels import heads, modulate

FP32 = 2e-6  # relative to the largest value


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("width")])
@pytest.mark.parametrize("operation", USED)
def test_references_are_what_the_oracle_says(operation: str, layout: str) -> None:
    found = rows_errors(operation, LAYOUTS[layout])
    assert max(found.values()) <= FP32, found


@pytest.mark.parametrize("case", HEADS)
def test_heads_reference_is_what_the_oracle_says(case: str) -> None:
    found = HEADS[case].errors()
    assert max(found.values()) <= FP32, found


def test_the_pair_is_bit_for_bit_its_two_halves() -> None:
    """A CPU's losses must not depend on whether a model calls the pair."""
    x, branch = random(5, 2, 8, seed=1), random(5, 2, 8, seed=2)
    shift, scale, gate = (random(1, 2, 8, seed=seed) for seed in (3, 4, 5))
    for multiplier in (1.0, 0.3):
        r, y = modulate.gated_residual_modulate(x, gate, branch, shift, scale, multiplier)
        assert torch.equal(r, modulate.gated_residual(x, gate, branch, multiplier))
        assert torch.equal(y, modulate.layer_norm_modulate(r, shift, scale))
        r, _ = modulate.gated_residual_modulate(x, None, branch, shift, scale, multiplier)
        assert torch.equal(r, x + multiplier * branch)


X = torch.zeros(4, 3, 8)
M = torch.zeros(1, 3, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: modulate.layer_norm_modulate(X[0], M, M), ["x has shape [3, 8]", "three dimensions"]),
        (lambda: modulate.layer_norm_modulate(X[..., :0], M[..., :0], M[..., :0]), ["x has shape [4, 3, 0]"]),
        (
            lambda: modulate.layer_norm_modulate(X, M[:, :2], M),
            ["shift has shape [1, 2, 8]", "[1, 3, 8], [4, 1, 8] or [1, 1, 8]"],
        ),
        (lambda: modulate.layer_norm_modulate(X, M, M[0]), ["scale has shape [3, 8]"]),
        (lambda: modulate.layer_norm_modulate(X, M, torch.zeros(4, 1, 8)), ["'scale': [4, 1, 8]", "the same along"]),
        (lambda: modulate.gated_residual(X, X, X), ["gate': [4, 3, 8]", "the same along"]),
        (lambda: modulate.gated_residual(X, M, X[1:]), ["branch has shape [3, 3, 8]", "that of x, [4, 3, 8]"]),
        (lambda: modulate.gated_residual(X, M, X.to("meta")), ["branch is on meta", "where x is, on cpu"]),
        (lambda: modulate.layer_norm(X, M, M), ["gain has shape [1, 3, 8]", "should have [8]"]),
        (lambda: modulate.residual_layer_norm(X, X, X[0, 0], X[0, 0, :3]), ["bias has shape [3]", "should have [8]"]),
        (lambda: heads.head_norm(X, X[0, 0]), ["x has shape [4, 3, 8]", "four dimensions"]),
        (lambda: heads.head_norm(X[:, None], X[0, 0, 1:]), ["gain has shape [7]", "should have [8]"]),
        (lambda: heads.head_norm(X[:, None], X[0, 0], 1e-6, X[:, :1, :4]), ["sin is missing"]),
        (lambda: heads.head_norm(X[:, None], X[0, 0], 1e-6, X, X), ["cos has shape [4, 3, 8]", "[4, 1, 4]"]),
        (
            lambda: heads.head_norm(X[:, None], X[0, 0], 1e-6, X[:, :1, :4], X[:1, :1, :4]),
            ["cos has shape [4, 1, 4] and sin [1, 1, 4]"],
        ),
        (
            lambda: heads.head_norm(X[:, None, :, :7], X[0, 0, :7], 1e-6, X, X),
            ["heads of 7 numbers", "even"],
        ),
    ],
)
def test_shapes_that_do_not_fit_get_a_sentence(call, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    said = str(caught.value)
    assert [word for word in words if word not in said] == [], said
    assert said.endswith(".")
    assert "\n" not in said


def test_types_that_triton_does_not_know_get_a_sentence() -> None:
    """On meta tensors nothing is launched, so this needs neither GPU nor interpreter."""
    from mpdit_kernels.fused import heads as fused_heads
    from mpdit_kernels.fused import norm, residual

    x = torch.empty(4, 3, 8, device="meta")
    m = torch.empty(1, 3, 8, device="meta")
    for call in (
        lambda: norm.norm_modulate(x.double(), m, m, 1e-6),
        lambda: residual.residual(x, m.double(), x, 1.0),
        lambda: fused_heads.norm_heads(x[:, None].to(torch.int32), m[0, 0], None, None, 1e-6),
    ):
        with pytest.raises(TypeError, match=r"(x|gate) is (float64|int32), but .* float32, bfloat16 or float16\."):
            call()


def test_the_torch_path_does_not_import_triton() -> None:
    code = (
        "import sys, torch; from mpdit_kernels import heads, modulate; x = torch.ones(2, 2, 8); "
        "modulate.layer_norm(x, x[0, 0], x[0, 0]); heads.head_norm(x[None], x[0, 0]); "
        "assert 'mpdit_kernels.fused' not in sys.modules; assert 'triton.language' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
