"""Transformer Engine on a GPU: bf16 against this project's own layers, FP8 against its emulation, a run against a run.

Not run on a GPU yet.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from mpdit import config as configs
from mpdit.parallel import fp8_rules, te_install
from parallel import te_gpu_runs

pytestmark = pytest.mark.gpu
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")


def gpu() -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Compute capability and torch's CUDA; asked of the driver, so that this process can still fork."""
    if not torch.cuda.is_available():
        return None
    code = "import torch; print(*torch.cuda.get_device_capability(), *torch.version.cuda.split('.')[:2])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    a, b, c, d = map(int, told.split())
    return (a, b), (c, d)


@pytest.fixture(scope="module")
def hardware() -> tuple[tuple[int, int], tuple[int, int]]:
    found = gpu()
    if found is None:
        pytest.skip("torch sees no GPU")
    te = te_install.find_te()
    if te.state != "whole":
        pytest.skip(f"Transformer Engine is {te.state}{': ' if te.why else ''}{te.why}")
    return found


def asked(*words: str) -> dict[str, float]:
    """The answer of te_gpu_runs.py."""
    command = [sys.executable, te_gpu_runs.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("arch", te_gpu_runs.ARCHITECTURES)
def test_a_network_in_bf16_is_that_of_the_local_backend(arch: str, hardware: Any) -> None:
    """To bf16's roundings: of the prediction and of every parameter's gradient."""
    found = asked("block", arch)
    assert found.pop("prediction") < 1e-2
    assert {name: off for name, off in found.items() if off > 5e-2} == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_in_fp8_is_its_emulation(recipe: str, hardware: Any) -> None:
    """Within 1e-2, where the emulation is 4 to 6 % from the unrounded product: Hopper's accumulator is narrower."""
    if recipe not in fp8_rules.recipes(*hardware):
        pytest.skip(f"a GPU of compute capability {hardware[0]} has no {recipe}")
    found = asked("linear", recipe)
    assert {name: off for name, off in found.items() if off > 1e-2} == {}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("te")
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; import tiny; tiny.build_set(__import__('pathlib').Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(tiny.__file__).parent), str(folder)], check=True)
    return folder / "set"


def losses(data: Path, folder: Path, **parallel: Any) -> list[float]:
    model = {"width": 128, "head_dim": 32, "text_tokens": 16, "vocab_size": 0}
    sections: dict[str, Any] = {"model": model, "mup": {"base_width": 64}, "train": {"steps": 20, "batch_size": 16}}
    config = tiny.with_run_dir(tiny.config(data, **sections, parallel=parallel), folder)
    (folder / "given.yaml").write_text(configs.dump(config))
    command = [sys.executable, "-m", "mpdit", "train", str(folder / "given.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_twenty_steps_in_bf16_are_those_of_the_local_backend(
    recompute: str, data: Path, tmp_path: Path, hardware: Any
) -> None:
    runs = []
    for backend in ("te", "local"):
        (tmp_path / backend).mkdir()
        parallel = {"backend": backend, "precision": "bf16", "recompute": recompute}
        runs.append(losses(data, tmp_path / backend, **parallel))
    assert runs[0] == pytest.approx(runs[1], rel=2e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_in_fp8_are_those_of_the_emulation(recipe: str, data: Path, tmp_path: Path, hardware: Any) -> None:
    if recipe not in fp8_rules.recipes(*hardware):
        pytest.skip(f"a GPU of compute capability {hardware[0]} has no {recipe}")
    runs = []
    for backend, precision in (("te", "fp8"), ("local", "fp8_emulated")):
        (tmp_path / backend).mkdir()
        parallel = {"backend": backend, "precision": precision, "fp8_recipe": recipe}
        runs.append(losses(data, tmp_path / backend, **parallel))
    assert runs[0] == pytest.approx(runs[1], rel=3e-2)
