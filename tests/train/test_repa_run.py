"""A run with REPA: what it records and saves, how it goes on, what it refuses, and that pictures need no teacher."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import commands
import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError

REPA = {"repa_weight": 0.5, "repa_block": 2}


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """A projector of 64 features, in the ranks too: they are forked from here."""
    ranks.warm()
    from mpdit.models import repa

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repa, "HIDDEN", 64)
        yield


def train(rank: int, world: int, config: Config) -> None:
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()


def run_config(data: Path, folder: Path, objective: dict[str, Any], steps: int = 4, **parallel: Any) -> Config:
    sections = {"objective": objective, "parallel": parallel, "optim": {"warmup_steps": 1, "schedule": "constant"}}
    config = tiny.config(data, train={"steps": steps, "save_every": 2, "keep_last": 0}, **sections)
    return tiny.with_run_dir(config, folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in PP2 with a checkpoint of two and of four."""
    folder = tmp_path_factory.mktemp("repa") / "run"
    ranks.run(2, train, config=run_config(tiny_set, folder, REPA, pp=2))
    return folder


@pytest.mark.dist
def test_the_run_folder_has_it(trained: Path) -> None:
    rows = metrics(trained)
    assert len(rows) == 4
    assert all(0 < row["repa_loss"] < 2 for row in rows)
    assert rows[-1]["repa_loss"] < rows[0]["repa_loss"]
    table = {row["name"]: row["role"] for row in json.loads((trained / "mup_table.json").read_text())}
    assert table["repa.linear_1.weight"] == "output"


@pytest.mark.dist
def test_the_logged_loss_is_the_objectives_alone(trained: Path, tiny_set: Path, tmp_path: Path) -> None:
    """At step 0 nothing has been learned, so REPA can't have changed it."""
    ranks.run(1, train, config=run_config(tiny_set, tmp_path, {}, steps=2))
    plain, aligned = metrics(tmp_path), metrics(trained)
    assert aligned[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert aligned[0]["grad_norm"] > plain[0]["grad_norm"] * (1 + 1e-4)
    assert all("repa_loss" not in row for row in plain)


@pytest.mark.dist
def test_it_goes_on_in_another_layout(trained: Path, tiny_set: Path, tmp_path: Path) -> None:
    """The projector, its moments and its average are in the checkpoint."""
    ranks.run(2, train, config=run_config(tiny_set, tmp_path, REPA, pp=2))
    (tmp_path / "checkpoints" / "step_4" / "manifest.json").unlink()
    ranks.run(2, train, config=run_config(tiny_set, tmp_path, REPA, tp=2, sp=True))
    for key in ("loss", "repa_loss", "grad_norm"):
        assert [row[key] for row in metrics(tmp_path)] == pytest.approx([r[key] for r in metrics(trained)], rel=1e-5)
    assert metrics(tmp_path)[-1]["val_loss"] == pytest.approx(metrics(trained)[-1]["val_loss"], rel=1e-5)


@pytest.mark.dist
def test_another_projector_is_refused(trained: Path, tiny_set: Path, tmp_path: Path) -> None:
    for objective in ({}, {**REPA, "repa_block": 3}, {**REPA, "repa_weight": 0.0}):
        with pytest.raises(ranks.RankFailed, match=r"InputError: .*is of another model, with objective\.repa 'after"):
            ranks.run(1, train, config=run_config(tiny_set, trained, objective, steps=5))
    ranks.run(1, train, config=run_config(tiny_set, tmp_path, {}, steps=2))
    with pytest.raises(ranks.RankFailed, match=r"objective\.repa None where the config has 'after block 2, teacher"):
        ranks.run(1, train, config=run_config(tiny_set, tmp_path, REPA))


@pytest.mark.dist
def test_how_heavy_it_weighs_may_change(tiny_set: Path, tmp_path: Path) -> None:
    ranks.run(1, train, config=run_config(tiny_set, tmp_path, REPA, steps=2))
    ranks.run(1, train, config=run_config(tiny_set, tmp_path, {**REPA, "repa_weight": 0.1}, steps=3))
    assert len(metrics(tmp_path)) == 3


@pytest.mark.dist
def test_pictures_need_no_teacher(trained: Path, tmp_path: Path) -> None:
    config = trained / "config.yaml"
    asked = config.read_text()
    config.write_text(asked.replace("efficientnet_lite0", "gone/efficientnet_lite0"))
    assert config.read_text() != asked
    (tmp_path / "prompts.txt").write_text("a red square at 0 0\n")
    argv = [str(trained), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    try:
        code, _, error = commands.run("sample", *argv)
        assert (code, error) == (0, "")
    finally:
        config.write_text(asked)
    assert (tmp_path / "out" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.repa_block=5"], ["objective.repa_block is 5", "model.depth is 4", "1 to 4, or 0"]),
        (["objective.repa_block=-1"], ["objective.repa_block is -1"]),
        (["objective.repa_weight=-0.5"], ["objective.repa_weight is -0.5"]),
        (["objective.repa_teacher=nowhere"], ["objective.repa_teacher is 'nowhere'", "efficientnet_lite0"]),
    ],
)
def test_bad_input_is_told_before_any_rank_starts(overrides: list[str], words: list[str], tiny_set: Path) -> None:
    from mpdit.train import preflight

    config = tiny.config(tiny_set, "objective.repa_weight=0.5", *overrides)
    with pytest.raises(InputError) as caught:
        preflight.check(config, 1)
    said = str(caught.value)
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said


def test_a_third_of_the_depth_is_the_default() -> None:
    from mpdit.models import repa

    def block(depth: int, asked: int = 0) -> int:
        return repa.block_index(tiny.config(Path(), model={"depth": depth}, objective={"repa_block": asked})) + 1

    assert [block(depth) for depth in (1, 2, 4, 12, 28)] == [1, 1, 1, 4, 9]
    assert block(12, 8) == 8
