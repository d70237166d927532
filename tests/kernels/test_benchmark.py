"""benchmarks/kernels.py runs, though only a GPU can make it measure something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_dry_run_goes_through_every_operation_and_contender(tmp_path: Path) -> None:
    done = benchmark("--dry-run", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times mean nothing" in done.stdout
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [row["operation"] for row in results] == ["modulate", "residual", "sum + modulate", "heads"]
    assert all(row["ms"].keys() == {"triton", "torch", "compiled", "copy"} for row in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so() -> None:
    done = benchmark()
    assert done.returncode == 2
    assert done.stdout == (
        "there is no CUDA device, so there is nothing to measure; --dry-run shows that this program runs.\n"
    )
