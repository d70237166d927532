"""A small launch folder that is really launched, for tests."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

import commands
import tiny
from mpdit import config as configs

ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
TRAIN = [sys.executable, "-m", "mpdit", "train"]


def folder(data_set: Path, home: Path, steps: int = 6) -> Path:
    """A launch folder of a tiny target on a real data set, in TP2 x PP2, from a tiny proxy."""
    home.mkdir(exist_ok=True)
    model = {**tiny.BASE["model"], "width": 16}
    data = {"path": str(data_set)}
    train = {**tiny.BASE["train"], "steps": steps}
    proxy = {**tiny.BASE, "model": model, "data": data, "train": train}
    (home / "proxy.yaml").write_text(yaml.safe_dump(proxy))
    (home / "wide.yaml").write_text("model: {width: 32}\nparallel: {tp: 2, pp: 2}\ntrain: {save_every: 2}\n")
    out = home / "launch"
    argv = ["--from", home / "proxy.yaml", "--to", home / "wide.yaml", "--gpus-per-node", 2, "--out", out]
    code, _, error = commands.run("transfer", *argv)
    assert code == 0, error
    return out


def trained(folder: Path, steps: int = 6) -> None:
    """The run has all its steps, with what the launch folder promised."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(steps)]
    assert lines[-1]["val_loss"] > 0
    assert json.loads((folder / "run" / "environment.json").read_text())["world_size"] == 4
    tables = [json.loads((path / "mup_table.json").read_text()) for path in (folder, folder / "run")]
    assert tables[0] == tables[1]
    assert configs.load(folder) == configs.load(folder / "run")


def wait(done: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
