"""Guards what a run makes of trouble between its steps: slow storage, data that differs between nodes, a full disk."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import ranks
import tiny
from mpdit.config import Config
from mpdit.data.quarantine import Bad
from mpdit.errors import CheckFailed

BAD = Bad(sample=7, where="train-00000.tar: 00000007.png", reason="image damaged")


def train(rank: int, world: int, config: Config) -> tuple[str, str]:
    """This rank's terminal, and the sentence with which the run failed."""
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config, failed = preflight.check(config, world), ""
    groups.start(config.parallel, config.train.seed)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            loop.train(config)
        except CheckFailed as error:
            failed = str(error)
    groups.stop()
    return out.getvalue(), failed


def a_run(tiny_set: Path, folder: Path, **sections: Any) -> Config:
    given: dict[str, Any] = {"train": {"steps": 5}, "optim": {"warmup_steps": 1}, **sections}
    return tiny.with_run_dir(tiny.config(tiny_set, **given), folder)


# ---- slow storage ----------------------------------------------------------------------------------------------------


def train_on_slow_storage(rank: int, world: int, config: Config, seconds: float) -> Any:
    """Storage that takes `seconds` for a save, a byte now and then."""
    from mpdit.train.saver import Saver

    plain = Saver.poll

    def poll(saver: Saver, all_done: bool | None = None) -> Any:
        save = saver._save
        return None if save and time.monotonic() - save.began < seconds else plain(saver, all_done)

    Saver.poll = poll  # type: ignore[method-assign]
    return train(rank, world, config)


@pytest.mark.dist
def test_a_save_that_takes_longer_than_a_hang_is_no_hang(tiny_set: Path, tmp_path: Path) -> None:
    config = a_run(tiny_set, tmp_path, guard={"hang_timeout_s": 1.5})
    ((_, failed),) = ranks.run(1, train_on_slow_storage, config=config, seconds=6.0)
    assert failed == ""
    assert (tmp_path / "checkpoints/step_5/manifest.json").exists()


# ---- data that is not the same everywhere ----------------------------------------------------------------------------


def train_on_other_data(rank: int, world: int, config: Config, differs: bool) -> Any:
    """Rank 1 alone finds a sample damaged in step 2; `differs`: and puts another one in its place."""
    from mpdit.train import batches

    plain, step = batches.TrainFeed.next, iter(range(100))
    found: list[Bad] = []

    def next_step(feed: batches.TrainFeed) -> Any:
        micro_batches = plain(feed)
        if next(step) == 2 and rank == 1:
            found.append(BAD)
            if differs:
                micro_batches[0] = dataclasses.replace(micro_batches[0], sample_key=micro_batches[0].sample_key + 1)
        return micro_batches

    def take_bad(feed: batches.TrainFeed) -> list[Bad]:
        taken, found[:] = [*found], []
        return taken

    batches.TrainFeed.next, batches.TrainFeed.take_bad = next_step, take_bad  # type: ignore[method-assign]
    return train(rank, world, config)


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}])
def test_ranks_of_one_copy_of_the_model_train_on_the_same_samples(
    layout: dict[str, Any], tiny_set: Path, tmp_path: Path
) -> None:
    config = a_run(tiny_set, tmp_path, parallel=layout, data={"max_bad_fraction": 0.5})
    for _, failed in ranks.run(2, train_on_other_data, config=config, differs=True):
        assert failed.startswith("step 2: the ranks of one copy of the model have read different samples")
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == dataclasses.asdict(BAD) | {"step": 2}


@pytest.mark.dist
def test_what_any_rank_finds_damaged_is_written_down(tiny_set: Path, tmp_path: Path) -> None:
    config = a_run(tiny_set, tmp_path, parallel={"tp": 2}, data={"max_bad_fraction": 0.5})
    (said, failed), _ = ranks.run(2, train_on_other_data, config=config, differs=False)
    assert failed == ""
    assert "step 2: 1 damaged samples were met and replaced, 1 so far" in said
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == dataclasses.asdict(BAD) | {"step": 2}


# ---- a full disk -----------------------------------------------------------------------------------------------------


def train_on_a_full_disk(rank: int, world: int, config: Config) -> Any:
    """Neither pictures nor bad steps can be written, and the loss of step 2 is not finite."""
    from mpdit.sample import grid
    from mpdit.train import guards, session

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    grid.save = guards.write = full  # type: ignore[assignment]
    plain, step = session.Session.forward_backward, iter(range(100))

    def forward_backward(run: session.Session, micro_batches: Any) -> float:
        loss = plain(run, micro_batches)
        return float("nan") if next(step) == 2 else loss

    session.Session.forward_backward = forward_backward  # type: ignore[method-assign]
    return train(rank, world, config)


@pytest.mark.dist
def test_pictures_and_bad_steps_that_cannot_be_written_stop_no_run(tiny_set: Path, tmp_path: Path) -> None:
    config = a_run(tiny_set, tmp_path, train={"steps": 5, "sample_every": 2})
    ((said, failed),) = ranks.run(1, train_on_a_full_disk, config=config)
    assert failed == ""
    assert "step 4  its pictures could not be written (No space left on device)" in said
    assert "step 2 is skipped: " in said
    assert "; what it takes to run it again could not be written (No space left on device)" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
