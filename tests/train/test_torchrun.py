"""The commands as a person types them: torchrun and one process write the same losses; bad input gets a sentence."""

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import ranks
import tiny
from data.make_shards import reseal
from mpdit.data.plan import Plan
from mpdit.data.shards import Shards

OVERRIDES = ["train.steps=5", "optim.warmup_steps=1", "train.val_images=1"]


def command(*words: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(ranks)]
    start = [*torchrun, "-m", "mpdit"] if ranks else [sys.executable, "-m", "mpdit"]
    return subprocess.run(
        [*start, "train", *words], capture_output=True, text=True, timeout=300, check=False, env={**os.environ}
    )


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def yaml_file(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree: dict[str, Any] = {**tiny.BASE, "data": {"path": str(tiny_set)}}
    path = tmp_path_factory.mktemp("commands") / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.dist
def test_torchrun_and_one_process_write_the_same_losses(yaml_file: Path, tmp_path: Path) -> None:
    one = command(str(yaml_file), *OVERRIDES, f"run.dir={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    four = command(
        str(yaml_file), *OVERRIDES, f"run.dir={tmp_path / 'four'}", "parallel.tp=2", "parallel.pp=2", ranks=4
    )
    assert four.returncode == 0, four.stderr
    found, wanted = losses(tmp_path / "four"), losses(tmp_path / "one")
    assert len(wanted) == 5
    assert found == pytest.approx(wanted, rel=1e-5)
    for line in ("loss", "validation", "images/s", "pictures", "MLflow store", "run folder"):
        assert line in four.stdout
    assert {p.name for p in (tmp_path / "four").iterdir()} >= {
        *("config.yaml", "mup_table.json", "environment.json", "metrics.jsonl", "checkpoints", "samples"),
    }
    # The run folder as the config, in another layout: nothing that was resolved for the first one is in the way.
    other = command(str(tmp_path / "one"), "train.steps=6", "optim.warmup_steps=1", ranks=2)
    assert other.returncode == 0, other.stderr
    assert losses(tmp_path / "one")[:5] == wanted
    assert len(losses(tmp_path / "one")) == 6
    # Started once more, a finished run is left as it is.
    again = command(str(yaml_file), *OVERRIDES, f"run.dir={tmp_path / 'one'}")
    assert again.returncode == 0, again.stderr
    assert "has its 5 steps" in again.stdout
    assert losses(tmp_path / "one")[:5] == wanted


def test_bad_input_is_one_sentence_and_exit_code_2(yaml_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "never"
    for override, words in (
        ("model.widht=64", "unknown key model.widht; did you mean 'width'?"),
        ("model.width=36", "model.width 36 does not divide"),
        ("data.path=nowhere", "nowhere"),
    ):
        result = command(str(yaml_file), override, f"run.dir={run_dir}")
        assert result.returncode == 2, result.stderr
        assert words in result.stderr
        assert "Traceback" not in result.stderr
    assert not run_dir.exists()


def train_command(rank: int, world: int, words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of ``mpdit train`` on one of several ranks."""
    from mpdit import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(["train", *words])
    return code, said.getvalue()


@pytest.mark.dist
def test_an_image_that_one_rank_alone_reads_is_told_by_that_rank(
    yaml_file: Path, tiny_set: Path, tmp_path: Path
) -> None:
    """The other rank waits for it in vain: what counts is that the sentence is not lost."""
    data = tmp_path / "damaged"
    shutil.copytree(tiny_set, data)
    plan = Plan(samples=55, batch_size=8, seed=3, fingerprint=Shards.open(tiny_set, "train").fingerprint)
    victim = int(plan.batch(0).sample_ids[-1])  # of the second data rank's share
    shards = Shards.open(data, "train")
    with (data / "train-00000.tar").open("r+b") as tar:
        offset, size = shards._span(victim)[:2]
        tar.seek(offset)
        tar.write(b"x" * size)
    reseal(data)
    words = [str(yaml_file), f"data.path={data}", f"run.dir={tmp_path / 'run'}"]
    world = ranks.start(2, train_command, timeout_s=60, words=words)
    try:
        done = world.folder / "1.done"
        while not done.exists():
            time.sleep(0.01)
            assert time.monotonic() - world.began < 60
        kind, (code, said) = pickle.loads(done.read_bytes())
    finally:
        world.close()
    assert (kind, code) == ("value", 2)
    assert said.startswith("mpdit: rank 1: ")
    assert f"the image of sample {victim} is damaged" in said
