"""Imports between the packages point one way, and only mpdit.parallel knows Megatron (contracts: pyproject.toml)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts() -> None:
    # Beside the python of a venv; a container's own may be elsewhere.
    lint = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert lint
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kept, 0 broken" in result.stdout


def test_models_name_no_process_group() -> None:
    for path in (ROOT / "mpdit" / "models").glob("*.py"):
        text = path.read_text()
        assert "torch.distributed" not in text, path
        assert "parallel_state" not in text, path


def test_help_imports_no_torch() -> None:
    code = "import sys; from mpdit.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_text_waits_to_be_filled_in() -> None:
    for path in ROOT.glob("*.md"):
        assert "@@" not in path.read_text(), path
