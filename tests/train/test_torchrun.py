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

import pytest
import yaml

import ranks
import tiny
from data.make_shards import reseal
from mpdit.data.mixture import Mixture
from mpdit.train.metrics import read_metrics

OVERRIDES = ["train.steps=5", "optim.warmup_steps=1", "train.val_images=1"]


def command(*words: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    start = [*torchrun, "-m", "mpdit"] if ranks else [sys.executable, "-m", "mpdit"]
    return subprocess.run(
        [*start, "train", *words], capture_output=True, text=True, timeout=300, check=False, env={**os.environ}
    )


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def yaml_file(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return yaml_of(tiny_set, tmp_path_factory.mktemp("commands"))


@pytest.mark.dist
def test_torchrun_and_one_process_write_the_same_losses(yaml_file: Path, tmp_path: Path) -> None:
    one = command(str(yaml_file), "--profile", *OVERRIDES, f"run.dir={tmp_path / 'one'}")
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
    assert {path.name for path in (tmp_path / "one/profile").iterdir()} == {"rank_0.json.gz", "rank_0.txt"}
    of_one, of_four = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "four"))
    for row, gpus in ((of_one, 1), (of_four, 4)):
        assert row["images_per_s_per_gpu"] == pytest.approx(row["images_per_s"] / gpus, rel=1e-3)
        assert row["tflops_per_gpu"] > 0
        assert row["memory_gb"] > 0.1
    assert 0 < of_four["bubble"] < 1
    assert "bubble" not in of_one
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
def test_what_one_rank_alone_reads_is_told_by_that_rank(labelled_set: Path, tmp_path: Path) -> None:
    """A caption that is no class. The other rank waits for it in vain: what counts is that the sentence is not lost."""
    data = copied(labelled_set, tmp_path)
    offset, size = second_rank_s(data, column=2)
    with (data / "train-00000.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(b"x" * size)
    reseal(data)
    words = [f"data.path={data}", "data.text=labels", "model.text_tokens=1", f"run.dir={tmp_path / 'run'}"]
    world = ranks.start(2, train_command, timeout_s=60, words=[str(yaml_of(data, tmp_path)), *words])
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
    assert "x" * (size - 1) in said


@pytest.mark.dist
def test_a_bad_image_takes_no_batch_down(tiny_set: Path, tmp_path: Path) -> None:
    """Though one rank of two alone reads it; the losses are those of one process."""
    data = copied(tiny_set, tmp_path)
    offset, size = second_rank_s(data, column=0)
    with (data / "train-00000.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(b"x" * size)
    yaml_file, rows = yaml_of(data, tmp_path), []
    for name, world in (("one", 1), ("two", 2)):
        run_dir = tmp_path / name
        words = [str(yaml_file), *OVERRIDES, f"run.dir={run_dir}", "data.max_bad_fraction=0.02"]
        assert ranks.run(world, train_command, words=words) == [(0, "")] * world
        (bad,) = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
        assert (bad["reason"], bad["step"]) == ("image damaged", 0)
        rows.append([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])
    one, two = rows
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["samples"] for row in two] == [row["samples"] for row in one]
    assert [row.get("bad_samples") for row in two] == [row.get("bad_samples") for row in one]
    words = [str(yaml_file), *OVERRIDES, f"run.dir={tmp_path / 'strict'}"]
    ((code, told), _) = ranks.run(2, train_command, words=words)
    assert code == 1
    assert "1 of 55 samples are damaged, more than data.max_bad_fraction 0.01 allows" in told
    assert f"{bad['where']} (image damaged)" in told


def copied(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "damaged")
    return tmp_path / "damaged"


def second_rank_s(data: Path, *, column: int) -> tuple[int, int]:
    """Of a sample that the second of two data ranks reads in the first step: offset and size of image (0) or caption
    (2) in the tar."""
    config = tiny.config(data)
    train = Mixture.open(config.data, "train")
    victim = int(train.plan(config).batch(0).sample_ids[-1])
    offset, size = train.sets[0]._span(victim)[column : column + 2]
    return offset, size


def yaml_of(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tiny.BASE, "data": {"path": str(data)}}))
    return path
