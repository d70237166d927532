"""Must show: every file of a checkpoint damaged in turn (truncated, a byte flipped, emptied, removed), every one
detected, and the run goes on from the checkpoint before, to the unbroken run's losses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import checkpoint_folders as folders
import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError
from mpdit.train import checkpoints

LAYOUT = {"tp": 2, "distributed_optimizer": True}  # two ranks: two files of tensors
FLIPS = 8  # bytes of each file, from the first to the last


def train(rank: int, world: int, config: Config) -> None:
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()


def config_of(data: Path, folder: Path, parallel: dict[str, Any]) -> Config:
    settings = {"steps": 6, "save_every": 2, "keep_last": 0}
    return tiny.with_run_dir(tiny.config(data, parallel=parallel, train=settings, optim={"warmup_steps": 1}), folder)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    ranks.run(2, train, config=config_of(tiny_set, folder, LAYOUT))
    return folder


def files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints/step_6").iterdir())


def damages(path: Path) -> list[tuple[str, int]]:
    size = path.stat().st_size
    flips = [("flipped", index * (size - 1) // (FLIPS - 1)) for index in range(FLIPS)]
    return [*flips, *((how, 0) for how in folders.DAMAGES if how != "flipped")]


def test_every_file_damaged_in_turn_is_detected_and_the_one_before_used(finished: Path) -> None:
    newest, before = finished / "checkpoints/step_6", finished / "checkpoints/step_4"
    found = files(finished)
    assert {".metadata", "common.pt", "manifest.json", "metadata.json", "state.json"} < set(found)
    assert sum(name.endswith(".distcp") for name in found) == 2
    checkpoints.verify(newest)
    count = 0
    for name in found:
        whole = (newest / name).read_bytes()
        for how, at in damages(newest / name):
            folders.damage(newest / name, how, at)
            said: list[str] = []
            assert checkpoints.newest(finished, said.append) == before, (name, how, at)
            assert len(said) == 1
            assert name in said[0], (how, said)
            try:
                problems = checkpoints.problems(newest)
            except InputError as error:
                problems = [str(error)]
            assert len(problems) == 1, "no other file is blamed"
            (newest / name).write_bytes(whole)
            count += 1
    checkpoints.verify(newest)
    print(f"\n{count} damages to {len(found)} files, all detected, the checkpoint before used each time")


def goes_on(finished: Path, folder: Path, data: Path, name: str, how: str, world: int, parallel: Any) -> float:
    """The run again, without its last two steps' work: the largest difference of a loss to the unbroken run's."""
    shutil.copytree(finished, folder)
    folders.damage(folder / "checkpoints/step_6" / name, how, at=folder.stat().st_ino)
    ranks.run(world, train, config=config_of(data, folder, parallel))
    checkpoints.verify(folder / "checkpoints/step_6")
    found, wanted = losses(folder), losses(finished)
    assert found[:4] == wanted[:4], "it went on from step 4"
    assert len(found) == len(wanted)
    return max(abs(a - b) / b for a, b in zip(found, wanted, strict=True))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "how", "world", "parallel"),
    [
        ("__1_0.distcp", "flipped", 2, LAYOUT),  # each rank reads one of the two: rank 1 has to tell rank 0
        ("__0_0.distcp", "truncated", 1, {}),
        ("manifest.json", "removed", 2, {"pp": 2}),
    ],
    ids=["flipped", "truncated, other layout", "removed, other layout"],
)
def test_a_run_goes_on_from_the_one_before(
    name: str, how: str, world: int, parallel: dict[str, Any], finished: Path, tiny_set: Path, tmp_path: Path
) -> None:
    assert goes_on(finished, tmp_path / "run", tiny_set, name, how, world, parallel) <= 1e-5


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_goes_on_whatever_file_is_damaged(finished: Path, tiny_set: Path, tmp_path: Path) -> None:
    layouts = [(2, LAYOUT), (1, {}), (2, {"pp": 2}), (2, {"distributed_optimizer": True})]
    worst, runs = 0.0, 0
    for name in files(finished):
        for how in folders.DAMAGES:
            world, parallel = layouts[runs % len(layouts)]
            folder = tmp_path / str(runs)
            worst, runs = max(worst, goes_on(finished, folder, tiny_set, name, how, world, parallel)), runs + 1
            shutil.rmtree(folder)
    print(f"\n{runs} runs, each with another damage, went on from the checkpoint before; worst difference {worst:.1e}")
    assert worst <= 1e-5
