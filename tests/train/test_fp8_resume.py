"""A run under delayed scaling goes on with the scales and histories that it stopped with, in any layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import commands
import ranks
import tiny
from mpdit.config import Config
from train.test_resume import metrics, train

DELAYED = {"precision": "fp8_emulated", "fp8_recipe": "delayed", "micro_batch": 4}
ONE = {**DELAYED, "recompute": "full"}
FOUR = {**DELAYED, "tp": 2, "pp": 2, "sp": True, "distributed_optimizer": True}
STOP, STEPS = 2, 4


def run_config(data: Path, folder: Path, parallel: dict[str, Any]) -> Config:
    train = {"steps": STEPS, "save_every": STOP, "keep_last": 0, "posthoc_ema": [0.1]}
    return tiny.with_run_dir(tiny.config(data, parallel=parallel, train=train), folder)


@pytest.fixture(scope="module")
def unbroken(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    ranks.run(1, train, config=run_config(tiny_set, folder, ONE))
    return folder


def from_stop(unbroken: Path, folder: Path) -> Path:
    """A run folder that stands where the unbroken run was at STOP."""
    shutil.copytree(unbroken / f"checkpoints/step_{STOP}", folder / f"checkpoints/step_{STOP}")
    return folder


def test_going_on_is_the_unbroken_run_to_the_bit(unbroken: Path, tiny_set: Path, tmp_path: Path) -> None:
    ranks.run(1, train, config=run_config(tiny_set, from_stop(unbroken, tmp_path), ONE))
    wanted = metrics(unbroken)
    assert [row["loss"] for row in metrics(tmp_path)] == [row["loss"] for row in wanted[STOP:]]
    assert [row["val_loss"] for row in metrics(tmp_path) if "val_loss" in row] == [wanted[-1]["val_loss"]]
    for name in ("__0_0.distcp", "state.json"):
        path = f"checkpoints/step_{STEPS}/{name}"
        assert (tmp_path / path).read_bytes() == (unbroken / path).read_bytes()


def state_of(rank: int, world: int, path: Path, config: Config, weights: bool) -> tuple[dict[str, Any], str]:
    """What a session, or a bare network, remembers with the checkpoint in it, and the note about it."""
    from mpdit.parallel import fp8, groups
    from mpdit.train import checkpoint, preflight, session

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    if weights:
        network = session.build_network(config)
        checkpoint.load_weights(network, path, ema=True)
    else:
        run = session.build(config)
        checkpoint.load(run, path, STOP)
        network = run.network
    return fp8.state(network.chunks), checkpoint.note_on_scales(path, config)


@pytest.mark.dist
@pytest.mark.parametrize("weights", [False, True], ids=["to train", "to draw"])
def test_every_layout_reads_the_same_scales(weights: bool, unbroken: Path, tiny_set: Path, tmp_path: Path) -> None:
    """PP4 has stages without an FP8 block."""
    path = unbroken / f"checkpoints/step_{STOP}"
    known: dict[str, Any] = {}
    for world, parallel in ((1, ONE), (4, FOUR), (4, {**DELAYED, "pp": 4, "micro_batch": 2})):
        found: dict[str, Any] = {}
        for state, note in ranks.run(
            world, state_of, path=path, config=run_config(tiny_set, tmp_path, parallel), weights=weights
        ):
            assert note == ""
            for name, kinds in state.items():
                for kind, value in kinds.items():
                    assert torch.equal(found.setdefault(f"{kind}.{name}", value), value)
        known = known or found
        assert found.keys() == known.keys()
        assert all(torch.equal(found[key], known[key]) for key in known)
    assert len(known) == 2 * 2 * 8  # of two blocks' eight linears
    assert all((value > 0).all() and (value != 1).all() for key, value in known.items() if key.startswith("fp8_scale"))


@pytest.mark.dist
def test_another_layout_goes_on_with_them(unbroken: Path, tiny_set: Path, tmp_path: Path) -> None:
    """In bf16 losses differ a little; with scales of 1 for the first step it would be by much more."""
    ranks.run(4, train, config=run_config(tiny_set, from_stop(unbroken, tmp_path), FOUR))
    for row, wanted in zip(metrics(tmp_path), metrics(unbroken)[STOP:], strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        (
            {**DELAYED, "fp8_recipe": "tensorwise"},
            "is of fp8_recipe delayed, history 1024, algorithm max and is left out",
        ),
        ({"precision": "bf16"}, "left out; none is needed here"),
    ],
)
def test_another_recipe_leaves_them_out_with_a_word(
    parallel: dict[str, Any], said: str, unbroken: Path, tiny_set: Path, tmp_path: Path
) -> None:
    config = run_config(tiny_set, from_stop(unbroken, tmp_path), parallel)
    code, out, error = commands.run("train", _written(config, tmp_path / "config.yaml"))
    assert code == 0, error
    assert said in out
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(metrics(unbroken)[STOP]["loss"], rel=2e-2)


def test_a_checkpoint_without_them_starts_them_anew(unbroken: Path, tiny_set: Path, tmp_path: Path) -> None:
    """Such as one that bf16 wrote, or an earlier commit: its state.json says nothing of FP8."""
    path = tmp_path / f"step_{STOP}"
    shutil.copytree(unbroken / f"checkpoints/step_{STOP}", path)
    state = json.loads((path / "state.json").read_text())
    assert state.pop("fp8") == {"fp8_recipe": "delayed", "history": 1024, "algorithm": "max"}
    (path / "state.json").write_text(json.dumps(state))
    config = run_config(tiny_set, tmp_path / "run", DELAYED)
    found, note = ranks.run(1, state_of, path=path, config=config, weights=False)[0]
    assert note == "the scales of fp8_recipe delayed, history 1024, algorithm max start at 1"
    assert all((kinds["fp8_scale"] == 1).all() for kinds in found.values())


def test_averages_alone_have_none_and_drawing_with_them_says_so(unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red square\n")
    assert commands.run("ema", unbroken, "--sigma-rel", "0.1", "--out", tmp_path / "average")[0] == 0
    argv = ["sample", unbroken, "--prompts", tmp_path / "prompts.txt", "--steps", 1]
    code, _, error = commands.run(*argv, "--out", tmp_path / "pictures")
    assert (code, error) == (0, "")
    code, _, error = commands.run(*argv, "--out", tmp_path / "more", "--weights", tmp_path / "average")
    assert code == 0
    assert error == "mpdit: the scales of fp8_recipe delayed, history 1024, algorithm max start at 1\n"


def _written(config: Config, path: Path) -> Path:
    from mpdit import config as configs

    path.write_text(configs.dump(config))
    return path


@pytest.mark.dist
def test_reshard_takes_them_along_byte_for_byte(unbroken: Path, tmp_path: Path) -> None:
    source, other, back = unbroken / f"checkpoints/step_{STOP}", tmp_path / "other", tmp_path / "back"
    for argv in (
        [source, "--out", other, "--config", unbroken / "config.yaml", "parallel.tp=2", "parallel.pp=2"],
        [other, "--out", back, "--config", unbroken / "config.yaml"],
    ):
        code, _, error = commands.run("checkpoint", "reshard", *argv)
        assert code == 0, error
    assert len(list(other.glob("*.distcp"))) == 4
    assert (back / "__0_0.distcp").read_bytes() == (source / "__0_0.distcp").read_bytes()
