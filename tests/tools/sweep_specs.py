"""Small specs of sweeps for tests."""

from pathlib import Path
from typing import Any

import yaml

import tiny

EXAMPLES = Path(__file__).parents[2] / "examples" / "sweep"


def write(folder: Path, tree: dict[str, Any] | str, name: str = "spec.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return folder / name


def tree(data: Path | str = "data", **keys: Any) -> dict[str, Any]:
    """A small valid spec."""
    proxy = {**tiny.BASE, "mup": {"base_width": 32}, "data": {"path": str(data)}}
    search = {"optim.lr": {"grid": ["2^-7", "2^-6", "2^-5"]}}
    return {"proxy": proxy, "mode": "grid", "search": search, **keys}
