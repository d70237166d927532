"""Small transfers for tests: a proxy, a wider target, and `mpdit transfer` from one to the other."""

import itertools
from pathlib import Path
from typing import Any

import yaml

import commands
from mpdit import config as configs


def write(path: Path, tree: dict[str, Any]) -> Path:
    """`tree` as YAML in `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def merged(tree: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """`tree` with values put into its sections."""
    return {**tree, **{section: {**tree.get(section, {}), **values} for section, values in sections.items()}}


SMALL = {
    "model": {"width": 32, "depth": 3, "head_dim": 8, "patch": 3, "image_size": 12, "text_tokens": 8, "vocab_size": 20},
    "mup": {"base_width": 32, "output_mult": 2.0},
    "optim": {"lr": 2e-3, "clip": 0.5, "warmup_steps": 10, "schedule": "wsd", "decay_steps": 20},
    "data": {"path": "data/none", "caption_drop": 0.2},
    "train": {"batch_size": 16, "steps": 100, "save_every": 7},
    "parallel": {"precision": "bf16", "tp": 2},
    "run": {"dir": "runs/proxy", "experiment": "mine"},
}


class Transfers:
    """`mpdit transfer` to a wider copy of SMALL, each in a process of its own; `folder` is where it all lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = itertools.count()
        self.proxy = write(folder / "proxy.yaml", SMALL)
        self.wide = write(folder / "wide.yaml", {"model": {"width": 128}})

    def __call__(self, *argv: object, source: object = None, to: object = None) -> tuple[configs.Config, str, str]:
        """The config, the report, and what was said on stderr."""
        out = self.folder / f"launch-{next(self.count)}"
        code, _, error = commands.run(*self._argv(argv, source, to, out))
        assert code == 0, error
        return configs.load(out), (out / "REPORT.md").read_text(), error

    def refused(self, *argv: object, source: object = None, to: object = None) -> str:
        """The sentence; exit code 2, and nothing is written."""
        before = sorted(self.folder.rglob("*"))
        code, out, error = commands.run(*self._argv(argv, source, to, self.folder / "never"))
        assert (code, out) == (2, ""), error
        assert sorted(self.folder.rglob("*")) == before
        assert error.startswith("mpdit: ")
        assert error.count("\n") == 1
        return error

    def _argv(self, argv: tuple[object, ...], source: object, to: object, out: Path) -> list[object]:
        where = [] if "--out" in argv else ["--out", out]
        return ["transfer", "--from", source or self.proxy, "--to", to or self.wide, *argv, *where]
