"""Steps that must not reach the weights: all ranks skip them together, and a run that goes on skips the same ones."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import poison
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ranks
import tiny
from mpdit.config import Config, Guard
from mpdit.errors import InputError
from mpdit.train import guards
from mpdit.train.guards import BadStep, Judge, Limits, Verdict

DP2 = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
BOUND = 1e-5


def good(step: int, loss: float = 1.0, norm: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": norm}


def skipped(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": None, "grad_norm": None, "skipped": "the loss is nan", **more}


# ---- judging ---------------------------------------------------------------------------------------------------------


def test_a_spike_is_measured_by_the_median_of_good_steps() -> None:
    judge = Judge(Guard(spike_factor=2.0, window=3))
    for step, loss in enumerate((1.0, 9.0)):
        judge.note(good(step, loss, 10 * loss))
    assert judge.limits == Limits()  # too few to say
    judge.note(good(2, 3.0, 30.0))
    judge.note(skipped(3))  # says nothing of what is usual
    assert judge.limits == Limits(loss=6.0, grad_norm=60.0)
    for loss, norm, verdict, reason in (
        (6.0, 60.0, Verdict.GOOD, None),
        (6.1, 60.0, Verdict.LOSS_SPIKE, "the loss is 6.1, above 6"),
        (6.0, 60.5, Verdict.NORM_SPIKE, "the gradient norm is 60.5, above 60"),
        (math.nan, math.inf, Verdict.LOSS_NOT_FINITE, "the loss is nan"),
        (1.0, math.inf, Verdict.NORM_NOT_FINITE, "the gradient norm is inf"),
    ):
        judge.weigh(loss, norm)
        assert judge.verdict is verdict
        assert reason is None or judge.limits.reason(judge.verdict, loss, norm) == reason


def test_a_rollback_that_does_not_help_is_followed_by_one_that_goes_further_back() -> None:
    judge = Judge(Guard(max_skipped=2))
    judge.note(good(7))
    judge.note(skipped(8))
    assert (judge.in_a_row, judge.before, judge.out_of_patience) == ([8], 9, False)
    judge.note(skipped(9, rolled_back_to=6))
    assert (judge.in_a_row, judge.before, judge.rollbacks) == ([], 6, 1)
    judge.note(skipped(10))
    assert judge.before == 6
    judge.note(good(11))
    assert (judge.in_a_row, judge.before) == ([], None)


@given(st.lists(st.sampled_from(["good", "skipped", "rolled back"]), max_size=30), st.integers(0, 30))
def test_a_judge_made_from_the_metrics_is_the_one_that_saw_the_steps(kinds: list[str], start: int) -> None:
    settings, seen = Guard(spike_factor=2.0, window=4), Judge(Guard(spike_factor=2.0, window=4))
    rows = [
        good(step, 1.0 + step, 2.0 + step)
        if kind == "good"
        else skipped(step, **({"rolled_back_to": step // 2} if kind == "rolled back" else {}))
        for step, kind in enumerate(kinds)
    ]
    for row in rows[:start]:
        seen.note(row)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(lines)
        file.flush()
        found = Judge.after(settings, Path(file.name), start)
    assert vars(found) == vars(seen)


BAD = BadStep(
    step=3,
    reason="the loss is nan",
    verdict=Verdict.LOSS_NOT_FINITE,
    loss=math.nan,
    grad_norm=math.inf,
    limits=Limits(loss=2.5),
    sample_ids=[4, 1],
    visits=[0, 1],
    seed=3,
    plan_hash="abc",
    micro_batch=1,
)


def test_what_is_written_down_is_read_again(tmp_path: Path) -> None:
    path = guards.write(tmp_path, BAD)
    assert path == tmp_path / "bad_steps" / "step_3.json"
    assert json.loads(path.read_text())["loss"] == "nan"  # JSON that any reader takes
    found = guards.read(path)
    assert math.isnan(found.loss)
    assert dataclasses.replace(found, loss=0.0) == dataclasses.replace(BAD, loss=0.0)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "{}", '{"format": "mpdit-bad-step/1"}', '{"format": "mpdit-bad-step/1", "limits": 3}']
)
def test_a_file_that_is_none_gets_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "step_3.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"step_3\.json: "):
        guards.read(path)


# ---- real ranks ------------------------------------------------------------------------------------------------------


def norms(rank: int, world: int, config: Config, victim: int) -> tuple[float, float, float]:
    """The loss, the gradient norm, and the norm when one weight's gradient on one rank alone is not finite."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    sets, run = Sets.open(config), session.build(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    loss, norm = run.forward_backward(feed.next()), float(run.gradient_norm())
    run.update()
    if rank == victim:
        weight = max(run.network.chunks[-1].module.parameters(), key=torch.numel)
        weight.register_hook(lambda gradient: gradient * math.nan)
    run.forward_backward(feed.next())
    feed.close()
    return loss, norm, float(run.gradient_norm())


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "parallel", "victim"),
    [
        pytest.param(4, {"tp": 2, "pp": 2, "sp": True}, 0, id="TP2xPP2+SP"),
        pytest.param(2, DP2, 1, id="DP2 dist-opt overlap"),
        pytest.param(2, {"cp": 2}, 0, id="CP2", marks=pytest.mark.slow),
        pytest.param(2, {}, 1, id="DP2", marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_is_nan_on_one_rank_is_so_in_every_ranks_norm(
    world: int, parallel: dict[str, Any], victim: int, tiny_set: Path
) -> None:
    found = ranks.run(world, norms, config=tiny.config(tiny_set, parallel=parallel), victim=victim)
    assert len({(loss, norm) for loss, norm, _ in found}) == 1
    assert math.isfinite(found[0][1])
    assert all(math.isnan(norm) for _, _, norm in found)


SETTINGS: dict[str, Any] = {
    "train": {"steps": 9, "save_every": 2, "keep_last": 0},
    "guard": {"spike_factor": 6.0, "window": 3},
}


def run_config(data: Path, folder: Path, /, **sections: Any) -> Config:
    return tiny.with_run_dir(tiny.config(data, **{**SETTINGS, **sections}), folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for key in ("step", "samples", "lr", "rolled_back_to"):
        assert [row.get(key) for row in found] == [row.get(key) for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.get("skipped", "")[:12] == b.get("skipped", "")[:12]
        for key in ("loss", "grad_norm"):
            assert a[key] == (None if b[key] is None else pytest.approx(b[key], rel=BOUND))


def saved(folder: Path) -> dict[int, int]:
    """step: steps that are not in the weights, of every checkpoint."""
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoints/step_*/state.json")]
    return {state["step"]: state["skipped"] for state in states}


def tensors(rank: int, world: int, config: Config, step: int) -> dict[str, Any]:
    """Weights, moments and average of a checkpoint, and the steps that Adam counts once it is loaded."""
    from mpdit.parallel import groups, optimizer
    from mpdit.train import checkpoint, checkpoints, preflight, session

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run = session.build(config)
    path = checkpoints.folder_of(Path(config.run.dir)) / f"step_{step}"
    at = checkpoint.position(path, config)
    checkpoint.load(run, path, at.step, at.skipped)
    counts = {int(slot.state["step"]) for slot in optimizer.slots(run.optimizer).values()}
    loaded = checkpoint._read(run.network, path, ("param", "exp_avg", "exp_avg_sq", "ema"))
    return {"steps": counts} | {
        f"{kind} {name}": value.tolist() for name, kinds in loaded.items() for kind, value in kinds.items()
    }


@pytest.mark.dist
def test_bad_steps_are_skipped_on_all_ranks_and_after_a_resume(tiny_set: Path, tmp_path: Path) -> None:
    """A nan at step 3, a spike at step 6 and a nan at the last step, each from one sample that one rank alone has."""
    config = run_config(tiny_set, tmp_path / "a", parallel=DP2)
    last = {step: poison.plan_of(config).batch(step) for step in (3, 6, 8)}
    ids = {step: (int(batch.sample_ids[-1]), int(batch.visits[-1])) for step, batch in last.items()}
    factors = {ids[3]: math.nan, ids[6]: 30.0, ids[8]: math.nan}
    ranks.run(2, poison.train, config=config, factors=factors)
    wanted = metrics(tmp_path / "a")
    reasons = {row["step"]: row["skipped"] for row in wanted if "skipped" in row}
    assert [*reasons] == [3, 6, 8]
    assert reasons[3] == reasons[8] == "the loss is nan"
    assert reasons[6].startswith("the loss is ")
    assert "above" in reasons[6]
    # What was due after step 3 came after the next good step; the end always has one.
    assert saved(tmp_path / "a") == {2: 0, 5: 1, 6: 1, 8: 2, 9: 3}
    before, after = (ranks.run(1, tensors, config=run_config(tiny_set, tmp_path / "a"), step=at)[0] for at in (8, 9))
    assert before == after  # nothing of the last step's batch: not the weights, the moments or the average

    ranks.run(1, poison.train, config=run_config(tiny_set, tmp_path / "b"), factors=factors)
    same(metrics(tmp_path / "b"), wanted)

    # From step 5, where the window of the spike at 6 is history, Adam has taken 4 steps and the schedule 5.
    for step in (6, 8, 9):
        (tmp_path / "a" / "checkpoints" / f"step_{step}" / "manifest.json").unlink()
    ranks.run(2, poison.train, config=run_config(tiny_set, tmp_path / "a", parallel={"pp": 2}), factors=factors)
    assert metrics(tmp_path / "a")[:5] == wanted[:5]
    same(metrics(tmp_path / "a"), wanted)


@pytest.mark.dist
def test_a_rollback_goes_on_past_the_batches_and_survives_a_resume(tiny_set: Path, tmp_path: Path) -> None:
    sections = {"guard": {"max_skipped": 2, "then": "rollback"}}
    config = run_config(tiny_set, tmp_path, **sections)
    plan = poison.plan_of(config)
    spoiled = [plan.batch(step) for step in (5, 6)]
    pairs = [pair for batch in spoiled for pair in zip(batch.sample_ids, batch.visits, strict=True)]
    factors = {(int(sample), int(visit)): math.nan for sample, visit in pairs}
    ranks.run(1, poison.train, config=config, factors=factors)
    wanted = metrics(tmp_path)
    assert [row["step"] for row in wanted] == [*range(9)]
    assert {row["step"]: row.get("rolled_back_to") for row in wanted if "skipped" in row} == {5: None, 6: 4}
    # Steps 4, 5 and 6 are not in the weights of step 8.
    assert saved(tmp_path) == {2: 0, 4: 0, 7: 3, 8: 3, 9: 3}
    at_4, at_7 = (ranks.run(1, tensors, config=config, step=step)[0] for step in (4, 7))
    assert at_4["steps"] == {4}
    assert at_4 == at_7
    for step in (8, 9):
        (tmp_path / "checkpoints" / f"step_{step}" / "manifest.json").unlink()
    ranks.run(2, poison.train, config=run_config(tiny_set, tmp_path, parallel=DP2, **sections), factors=factors)
    same(metrics(tmp_path), wanted)

    # A checkpoint from before there were skipped steps.
    from mpdit.train import checkpoint

    state = tmp_path / "checkpoints" / "step_4" / "state.json"
    tree = json.loads(state.read_text())
    del tree["skipped"]
    state.write_text(json.dumps(tree))
    model = dataclasses.replace(config.model, vocab_size=tree["model"]["vocab_size"])
    assert checkpoint.position(state.parent, dataclasses.replace(config, model=model)).skipped == 0
