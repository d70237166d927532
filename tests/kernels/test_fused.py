"""The Triton kernels against float64: in the interpreter on any machine, compiled where there is a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import model_runs
from kernels.cases import HEADS, LAYOUTS, WIDTHS, Rows, rows_errors
from mpdit_kernels import switch

ROOT = Path(__file__).parents[2]
INTERPRETED = sorted(path.name for path in Path(__file__).with_name("interpreted").glob("*s.py"))


def test_every_interpreted_file_is_started() -> None:
    assert INTERPRETED == ["heads.py", "models.py", "norms.py", "properties.py", "residuals.py", "sums.py"]


@pytest.mark.parametrize("file", INTERPRETED)
def test_in_the_interpreter(file: str, request: pytest.FixtureRequest) -> None:
    """In a process of its own: Triton looks for TRITON_INTERPRET when it is imported, and megatron-core imports it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if profile := request.config.getoption("--hypothesis-profile"):
        command.append(f"--hypothesis-profile={profile}")
    done = subprocess.run(
        [*command, f"tests/kernels/interpreted/{file}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ---- on a GPU --------------------------------------------------------------------------------------------------------

TYPES = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # bounds, relative to the largest value


@pytest.fixture
def tritons() -> Iterator[None]:
    switch.use("triton")
    yield
    switch.use("auto")


def on_gpu(test):
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(missing(pytest.mark.usefixtures("tritons")(test)))


@on_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, 1024, 2048, 4096])
@pytest.mark.parametrize("operation", ["layer_norm_modulate", "gated_residual", "gated_residual_modulate"])
def test_compiled_widths(operation: str, width: int, dtype: torch.dtype) -> None:
    for rows in (
        Rows(shape=(300, 3, width), modulation=(1, 3, width)),
        Rows(shape=(3, 300, width), modulation=(3, 1, width)),
    ):
        found = rows_errors(operation, rows, dtype, "cuda", multiplier=0.7 if "gated" in operation else None)
        assert max(found.values()) <= TYPES[dtype], found


@on_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "operation",
    ["layer_norm_modulate", "gated_residual", "gated_residual_modulate", "layer_norm", "residual_layer_norm"],
)
def test_compiled_layouts(operation: str, layout: str) -> None:
    found = rows_errors(operation, LAYOUTS[layout], device="cuda")
    assert max(found.values()) <= TYPES[torch.float32], found


@on_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", HEADS)
def test_compiled_heads(case: str, dtype: torch.dtype) -> None:
    found = HEADS[case].errors(dtype, "cuda")
    assert max(found.values()) <= TYPES[dtype], found


@on_gpu
def test_offsets_beyond_32_bits() -> None:
    """The last of 2^31 numbers and a row more: an offset of 32 bits would be negative."""
    S, D = 2**31 // 5120 + 2, 5120
    x = torch.zeros(S, 1, D, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(D, device="cuda") % 7
    one = torch.ones(1, 1, D, dtype=torch.bfloat16, device="cuda")
    from mpdit_kernels.modulate import gated_residual, layer_norm_modulate

    expected = layer_norm_modulate(x[-1:].clone(), one, one)
    assert torch.equal(layer_norm_modulate(x, one, one)[-1:], expected)
    assert torch.equal(gated_residual(x, one, x)[-1], 2 * x[-1])


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", model_runs.ARCHITECTURES)
def test_losses_of_models_are_those_of_the_references(name: str, precision: str) -> None:
    wanted_losses, wanted_norms = model_runs.trained(name, "torch", steps=10, precision=precision)
    losses, norms = model_runs.trained(name, "triton", steps=10, precision=precision)
    bound = {"fp32": 1e-5, "bf16": 3e-2}[precision]
    assert losses == pytest.approx(wanted_losses, rel=bound)
    assert norms == pytest.approx(wanted_norms, rel=10 * bound)
