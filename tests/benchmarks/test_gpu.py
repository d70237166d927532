"""Benchmarks that only a GPU can make measure something run to their end, every part of them, and say what failed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NO_GPU = "there is no CUDA device, so there is nothing to measure; --dry-run shows that this program runs.\n"


def program(name: str, *arguments: object, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="module")
def dry_run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """gpu.json's parts by name."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = program("gpu.py", "--dry-run", "--out", out, "--data", tiny_set)
    logs = "".join(log.read_text() for log in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    return {part["part"]: part for part in found["parts"]}


@pytest.mark.dist
def test_a_dry_run_goes_through_every_part(dry_run: dict[str, Any]) -> None:
    assert list(dry_run) == ["tests", "kernels", "te", "demo", "layouts", "stage"]
    assert dry_run["tests"]["found"]["tests"] > 20
    assert len(dry_run["layouts"]["found"]["four"]) == 10
    assert dry_run["layouts"]["found"]["largest relative difference"] < 1e-5
    assert dry_run["demo"]["found"]["last"]["step"] == 3


@pytest.mark.dist
def test_every_operation_and_contender_of_the_kernels(dry_run: dict[str, Any]) -> None:
    results = dry_run["kernels"]["found"]["results"]
    assert [row["operation"] for row in results] == ["modulate", "residual", "sum + modulate", "heads"]
    assert all(row["ms"].keys() == {"triton", "torch", "compiled", "copy"} for row in results)


@pytest.mark.dist
def test_every_variant_of_the_stage(dry_run: dict[str, Any]) -> None:
    rows = {row["variant"]: row for row in dry_run["stage"]["found"]["rows"]}
    assert rows.keys() == {"bf16, local", "fp8_emulated, local"}
    assert rows["bf16, local"]["speedup"] == 1.0
    assert rows["bf16, local"]["loss_gap"] == 0.0
    assert 0 < abs(rows["fp8_emulated, local"]["loss_gap"]) < 0.05


def test_what_fails_is_told_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = program("gpu.py", "--dry-run", "--out", out, "--data", tmp_path, "--only", "demo", "te")
    assert done.returncode == 1
    demo, te = json.loads((out / "gpu.json").read_text())["parts"]
    assert not demo["ok"]
    assert "exit code 2" in demo["said"]
    assert "dataset" in demo["said"] or str(tmp_path) in demo["said"]
    assert te["ok"]
    again = program("gpu.py", "--dry-run", "--out", out)
    assert again.returncode == 2
    assert "not empty" in again.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize("name", ["kernels.py", "stage.py", "gpu.py"])
def test_without_a_gpu_it_says_so(name: str, tmp_path: Path) -> None:
    done = program(name, *(["--out", tmp_path / "out"] if name == "gpu.py" else []))
    assert done.returncode == 2
    assert done.stdout == NO_GPU
