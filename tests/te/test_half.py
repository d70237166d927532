"""These tests' environment has half of Transformer Engine, for real: Python files without anything compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process without the stub."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)


def mpdit(*arguments: object) -> subprocess.CompletedProcess[str]:
    return python("-m", "mpdit", *arguments)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_every_command_that_needs_megatron_ends_with_a_sentence(command: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {steps: 1}")
    done = mpdit(command, tmp_path / "run.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("mpdit: Transformer Engine: the package at ")
    assert "is without its CUDA library (the meta package alone does nothing)" in done.stderr
    assert "pip uninstall transformer-engine, or make it whole" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_megatron_would_have_failed_on_it() -> None:
    """Or there would be nothing to refuse."""
    done = python("-c", "import megatron.core.tensor_parallel")
    assert done.returncode != 0
    assert "Found empty `transformer-engine` meta package" in done.stderr


def test_doctor_says_the_same() -> None:
    done = mpdit("doctor", "--json")
    assert done.returncode == 1
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert {name for name, row in rows.items() if row["verdict"] == "wrong"} == {"Transformer Engine", "megatron-core"}
    assert "half-installed: the package at " in rows["Transformer Engine"]["found"]
    assert "without its CUDA library" in rows["Transformer Engine"]["found"]
    assert "pip uninstall transformer-engine" in rows["Transformer Engine"]["todo"]
    assert rows["megatron-core"]["todo"].startswith("see Transformer Engine")
