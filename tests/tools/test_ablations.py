"""Guards that every broken rule is caught where it has to be: what examples/ablations shows, run again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_every_broken_rule_is_caught(tmp_path: Path) -> None:
    for name in ("ablations", "coordcheck"):
        shutil.copytree(EXAMPLES / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png", "*.json"))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ablations" / "run.py")], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "ablations" / "results.json").read_text())
    assert len(results) >= 15
    assert all(row["caught"] for rows in results.values() for row in rows)


def test_the_page_shows_every_fault_as_caught() -> None:
    """The results kept beside the page are of all faults there are."""
    sys.path.insert(0, str(EXAMPLES / "ablations"))
    try:
        from faults import FAULTS
    finally:
        sys.path.pop(0)
    results = json.loads((EXAMPLES / "ablations" / "results.json").read_text())
    assert set(results) == set(FAULTS)
    assert {(name, row["arch"]) for name, rows in results.items() for row in rows if row["caught"]} == {
        (name, arch) for name, fault in FAULTS.items() for arch in fault.archs
    }
    page = (EXAMPLES / "ablations" / "README.md").read_text()
    assert all(f"({name}/README.md)" in page for name in FAULTS)
