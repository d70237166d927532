"""`mpdit replay` runs a skipped step again, in one process or any layout, and leaves the run as it is."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import poison
import pytest

import commands
import ranks
import tiny
from mpdit.data.mixture import Mixture
from mpdit.data.shards import Shards
from mpdit.train.replay import _caption

DP2 = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
STEP = 5


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def replay(path: Path, factors: Any, *words: str, world: int = 1) -> commands.Done:
    argv: list[Any] = ["replay", str(path), *words]
    done: commands.Done = ranks.run(world, poison.command, words=argv, factors=factors)[0]
    return done


@pytest.mark.dist
def test_one_process_reproduces_what_one_of_two_ranks_met(tiny_set: Path, tmp_path: Path) -> None:
    """With a skipped step on the way from the checkpoint, and only that step's sample named."""
    sections: dict[str, Any] = {"train": {"steps": 6, "save_every": 3, "keep_last": 0}, "parallel": DP2}
    config = tiny.with_run_dir(tiny.config(tiny_set, **sections), tmp_path / "run")
    plan = poison.plan_of(config)
    batches = {step: plan.batch(step) for step in (4, STEP)}
    pairs = {step: (int(batch.sample_ids[-1]), int(batch.visits[-1])) for step, batch in batches.items()}
    factors = dict.fromkeys(pairs.values(), math.nan)
    ranks.run(2, poison.train, config=config, factors=factors)

    run = tmp_path / "moved"  # a run folder is read wherever it lies,
    shutil.move(tmp_path / "run", run)
    before, path = digest(run), run / "bad_steps" / f"step_{STEP}.json"
    written = json.loads(path.read_text())
    assert written["reason"] == "the loss is nan"
    assert written["sample_ids"] == batches[STEP].sample_ids.tolist()

    shards, (victim, visit) = Shards.open(tiny_set, "train"), pairs[STEP]
    code, out, error = replay(path, factors)
    assert code == 0, out + error
    assert "checkpoints/step_3 at step 3, 2 steps before step 5" in out
    assert float(out.split("the losses of these steps are the run's to ")[1].split()[0]) < 1e-5
    assert "not finite: 1 of 8" in out
    named = f"  loss nan: sample {victim}, visit {visit}, {shards.where(victim)}, caption "
    assert named + json.dumps(shards.caption(victim)) in out

    assert digest(run) == before

    # Two stages; the checkpoints from before are gone.
    shutil.rmtree(run / "checkpoints" / "step_3")
    layout = [f"parallel.{key}=false" for key in DP2]
    code, out, error = replay(path, factors, *layout, "parallel.pp=2", world=2)
    assert code == 0, out + error
    assert "the initial weights at step 0, 5 steps before step 5" in out
    assert named in out

    # The sample has been mended: the step is good, and the largest losses are named.
    code, out, _ = replay(path, {pairs[4]: math.nan})
    assert code == 1
    assert "not reproduced: the step is good" in out
    assert "not finite: 0 of 8" in out

    code, _, error = replay(path, factors, "train.seed=4")
    assert code == 2
    assert "is of other data, train.batch_size or train.seed than the config's" in error
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]))
    code, _, error = replay(path, factors)
    assert code == 2
    assert "lacks step 1 on the way to step 5" in error


@pytest.mark.dist
@pytest.mark.slow
def test_a_rollback_on_the_way_is_gone_through(tiny_set: Path, tmp_path: Path) -> None:
    """Step 7 was run with the weights of step 4, past steps 5 and 6."""
    sections: dict[str, Any] = {
        "train": {"steps": 9, "save_every": 4, "keep_last": 0},
        "guard": {"max_skipped": 2, "then": "rollback"},
    }
    config = tiny.with_run_dir(tiny.config(tiny_set, **sections), tmp_path)
    plan = poison.plan_of(config)
    factors = {
        (int(sample), int(visit)): math.nan
        for step in (5, 6)
        for sample, visit in zip(plan.batch(step).sample_ids, plan.batch(step).visits, strict=True)
    }
    last = plan.batch(8)
    factors[int(last.sample_ids[0]), int(last.visits[0])] = math.nan
    ranks.run(1, poison.train, config=config, factors=factors)
    shutil.rmtree(tmp_path / "checkpoints" / "step_8")
    code, out, error = replay(tmp_path / "bad_steps" / "step_8.json", factors)
    assert code == 0, out + error
    assert "checkpoints/step_4 at step 7, 1 steps before step 8" in out
    assert float(out.split("the losses of these steps are the run's to ")[1].split()[0]) < 1e-5


@pytest.mark.dist
def test_a_stand_in_is_named_for_the_damaged_sample(tiny_set: Path, tmp_path: Path) -> None:
    """Its place's key is the damaged sample's; the pixels and the caption, which the loss is of, are the other's."""
    data, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(tiny_set, data)
    sections: dict[str, Any] = {
        "train": {"steps": 4},
        "data": {"max_bad_fraction": 0.5},
        "parallel": {"micro_batch": 4},
    }
    config = tiny.with_run_dir(tiny.config(data, **sections), run)
    plan = poison.plan_of(config)
    batch = plan.batch(0)
    victim, visit = int(batch.sample_ids[-1]), int(batch.visits[-1])
    damage_caption(data, victim)
    factors = {(victim, visit): math.nan}
    ranks.run(1, poison.train, config=config, factors=factors)

    shards, other = Shards.open(data, "train"), plan.stand_in(batch.bucket, victim, visit, 0)
    code, out, error = replay(run / "bad_steps" / "step_0.json", factors, world=2)
    assert code == 0, out + error
    assert "not finite: 1 of 8" in out
    caption = json.dumps(shards.caption(other))
    named = f"  loss nan: sample {other}, visit {visit}, {shards.where(other)}, caption {caption}"
    assert f"{named}, in the place of sample {victim}, which is damaged\n" in out


def damage_caption(data: Path, sample: int) -> None:
    shards = Shards.open(data, "train")
    tar, caption = Path(shards.where(sample).split(": ")[0]), shards.caption(sample).encode()
    whole = tar.read_bytes()
    assert whole.count(caption) == 1
    tar.write_bytes(whole.replace(caption, caption.swapcase()))


def test_a_caption_damaged_since_it_was_read_is_no_traceback(tiny_set: Path, tmp_path: Path) -> None:
    data = tmp_path / "set"
    shutil.copytree(tiny_set, data)
    damage_caption(data, 3)
    assert _caption(Mixture.open(tiny.config(data).data, "train"), 3) == "unreadable (caption damaged)"
