"""Law 5: a run that is killed and goes on, in the same or another layout, is the unbroken run."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError

TP2_PP2 = {"tp": 2, "pp": 2}
DP2 = {"distributed_optimizer": True}
BOUND = 1e-5


def train(rank: int, world: int, config: Config) -> float:
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()
    return [row["val_loss"] for row in metrics(Path(config.run.dir)) if "val_loss" in row][-1]


def run_config(data: Path, folder: Path, parallel: dict[str, Any], /, **sections: Any) -> Config:
    train_section = {"save_every": 4, "keep_last": 2, **sections.pop("train", {})}
    return tiny.with_run_dir(tiny.config(data, parallel=parallel, train=train_section, **sections), folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_written(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same_run(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    assert [row["step"] for row in found] == list(range(len(wanted)))
    assert [row["samples"] for row in found] == [row["samples"] for row in wanted]
    assert [row["lr"] for row in found] == [row["lr"] for row in wanted]
    return max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def unbroken(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], float]:
    folder = tmp_path_factory.mktemp("unbroken")
    val_loss = ranks.run(4, train, config=run_config(tiny_set, folder, TP2_PP2))[0]
    return metrics(folder), val_loss


@pytest.mark.dist
@pytest.mark.parametrize(("then", "world"), [(TP2_PP2, 4), (DP2, 2), ({"cp": 2}, 2)], ids=["same", "DP2", "CP2"])
def test_sigkill_and_resume(
    then: dict[str, Any],
    world: int,
    tiny_set: Path,
    tmp_path: Path,
    unbroken: tuple[list[dict[str, Any]], float],
) -> None:
    wanted, val_loss = unbroken
    at = random.randrange(6, 18)  # a step after the first checkpoint, before the end
    first = ranks.start(4, train, config=run_config(tiny_set, tmp_path, TP2_PP2))
    try:
        deadline = time.monotonic() + 120
        while steps_written(tmp_path) < at:
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.002)
        first.kill()
    finally:
        first.close()
    killed_at = steps_written(tmp_path)
    resumed = ranks.run(world, train, config=run_config(tiny_set, tmp_path, then))[0]
    worst = same_run(metrics(tmp_path), wanted)
    print(f"\nkilled after step {killed_at}, resumed as {then}: largest relative loss difference {worst:.1e}")
    assert worst <= BOUND
    assert resumed == pytest.approx(val_loss, rel=BOUND)


# (saved in, loaded in): both kinds of optimizer, both precisions, every axis once.
RESHARDS = {
    "TP2+SP dist-opt -> PP4": ((2, {"tp": 2, "sp": True, **DP2}), (4, {"pp": 4})),
    "DP4 dist-opt -> TP2xPP2xVPP2": ((4, DP2), (4, {**TP2_PP2, "vpp": 2, "micro_batch": 2})),
    "PP2 -> DP2 dist-opt overlap": (
        (2, {"pp": 2}),
        (2, {**DP2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", RESHARDS)
def test_reshard(name: str, tiny_set: Path, tmp_path: Path, unbroken: tuple[list[dict[str, Any]], float]) -> None:
    (world_a, a), (world_b, b) = RESHARDS[name]
    # Stopped by its own end at step 8 of a schedule of 20: kill it there instead of shortening the schedule.
    first = ranks.start(world_a, train, config=run_config(tiny_set, tmp_path, a))
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "step_8").exists():
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.002)
        first.kill()
    finally:
        first.close()
    val_loss = ranks.run(world_b, train, config=run_config(tiny_set, tmp_path, b))[0]
    worst = same_run(metrics(tmp_path), unbroken[0])
    print(f"\n{name}: largest relative loss difference {worst:.1e}")
    assert worst <= BOUND
    assert val_loss == pytest.approx(unbroken[1], rel=BOUND)


# (sections, saved in, loaded in): tables, norms, skips and a convolution, which an MMDiT has not.
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = {
    "dit, TP2xPP2+SP -> DP2 dist-opt": (
        {"model": {"arch": "dit", "text_tokens": 1, "learn_sigma": True}, "data": {"text": "labels"}},
        (4, {**TP2_PP2, "sp": True}),
        (2, DP2),
    ),
    "pixart, DP2 dist-opt -> TP2+SP": (
        {"model": {"arch": "pixart", "learn_sigma": True}},
        (2, DP2),
        (2, {"tp": 2, "sp": True}),
    ),
    "uvit, TP2xCP2+SP -> PP2": (
        {"model": {"arch": "uvit", "depth": 5, "text_tokens": 7}},
        (4, {"tp": 2, "cp": 2, "sp": True}),
        (2, {"pp": 2, "pp_split": [3, 2]}),
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_goes_on_in_another_layout(name: str, tiny_set: Path, labelled_set: Path, tmp_path: Path) -> None:
    sections, (world_a, a), (world_b, b) = NETWORKS[name]
    data = labelled_set if "data" in sections else tiny_set
    sections = {"objective": {"kind": "ddpm"}, "train": {"steps": 8}, **sections}
    val_loss = ranks.run(world_a, train, config=run_config(data, tmp_path, a, **sections))[0]
    wanted = metrics(tmp_path)
    (tmp_path / "checkpoints" / "step_8" / "manifest.json").unlink()
    resumed = ranks.run(world_b, train, config=run_config(data, tmp_path, b, **sections))[0]
    assert metrics(tmp_path)[:4] == wanted[:4], "it went on, with the clock's lines of before, and did not start again"
    assert same_run(metrics(tmp_path), wanted) <= BOUND
    assert resumed == pytest.approx(val_loss, rel=BOUND)


@pytest.mark.dist
def test_bf16_run_resumes_bit_for_bit(tiny_set: Path, tmp_path: Path) -> None:
    """Master weights, not their bf16 copies, are what a checkpoint holds."""
    config = run_config(tiny_set, tmp_path, {"precision": "bf16"}, train={"save_every": 5, "keep_last": 0})
    ranks.run(1, train, config=config)
    wanted = metrics(tmp_path)
    for later in (15, 20):
        (tmp_path / "checkpoints" / f"step_{later}" / "manifest.json").unlink()
    ranks.run(1, train, config=config)
    assert [row["loss"] for row in metrics(tmp_path)] == [row["loss"] for row in wanted]


@pytest.mark.dist
def test_another_model_or_data_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    completep = {"parametrization": "completep", "base_depth": 2}  # its residual multipliers act in the forward pass
    short: dict[str, Any] = {"train": {"steps": 4}, "optim": {"warmup_steps": 1}}
    ranks.run(1, train, config=run_config(tiny_set, tmp_path, {}, mup=completep, **short))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for sections, word in (
        ({"model": {"width": 64}}, "model.width"),
        ({"train": {"seed": 4, "steps": 8}}, "train.seed"),
        ({"mup": {"base_width": 8}}, "mup.base_width"),
        ({"mup": {"base_depth": 4}}, "mup.base_depth"),
        ({"mup": {"output_mult": 3.0}}, "mup.output_mult"),
        ({"objective": {"kind": "ddpm"}}, "objective.kind"),
    ):
        sections["mup"] = {**completep, **sections.get("mup", {})}
        with pytest.raises(ranks.RankFailed, match=f"InputError.*{word}"):
            ranks.run(1, train, config=run_config(tiny_set, tmp_path, {}, **sections))
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_damaged_checkpoints_are_passed_over(tiny_set: Path, tmp_path: Path) -> None:
    """Truncated, flipped, removed or emptied: named, and the one before it is used."""
    from mpdit.train import checkpoints

    settings: dict[str, Any] = {"train": {"steps": 6, "save_every": 2, "keep_last": 0}, "optim": {"warmup_steps": 1}}
    ranks.run(1, train, config=run_config(tiny_set, tmp_path, {}, **settings))
    newest = tmp_path / "checkpoints" / "step_6"
    checkpoints.verify(newest)
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {".metadata", "manifest.json", "metadata.json", "state.json"}
    assert any(p.suffix == ".distcp" for p in files)
    for path in files:
        whole = path.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        for damage in (whole[: len(whole) // 2], flipped, b"", None):
            path.unlink() if damage is None else path.write_bytes(damage)
            said: list[str] = []
            assert checkpoints.newest(tmp_path, said.append) == tmp_path / "checkpoints" / "step_4", path
            assert len(said) == 1
            assert "step_6" in said[0]
            path.write_bytes(whole)
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"step_{step}" / "manifest.json").unlink()
    with pytest.raises(InputError, match="no complete checkpoint"):
        checkpoints.newest(tmp_path, print)


@pytest.mark.dist
def test_a_diverged_run_stops_and_keeps_its_checkpoints(tiny_set: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"save_every": 1, "keep_last": 2}, "optim": {"lr": 1e30, "clip": 0.0}}
    with pytest.raises(ranks.RankFailed, match=r"CheckFailed: step .* the run has diverged"):
        ranks.run(2, train, config=run_config(tiny_set, tmp_path, {}, **settings))
    from mpdit.train import checkpoints

    kept = checkpoints.newest(tmp_path, print)
    assert kept is not None
    *good, first, second, third = metrics(tmp_path)
    assert all(abs(row["loss"]) < float("inf") for row in good)
    assert all(row["skipped"].startswith("the ") for row in (first, second, third))
    assert kept.name == f"step_{len(good)}"


@pytest.mark.dist
def test_a_run_folder_that_another_job_writes_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    first = ranks.start(1, train, config=run_config(tiny_set, tmp_path, {}, train={"steps": 100_000}))
    try:
        while steps_written(tmp_path) < 1:
            time.sleep(0.01)
        with pytest.raises(ranks.RankFailed, match=r"InputError: run\.dir .* another job is training there"):
            ranks.run(2, train, config=run_config(tiny_set, tmp_path, DP2))
        before = steps_written(tmp_path)
        while steps_written(tmp_path) == before:  # the first one goes on undisturbed
            time.sleep(0.01)
    finally:
        first.close()
