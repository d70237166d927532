"""Guards `mpdit sweep` with real processes: what becomes of trials that diverge, crash, are hopeless or cut short,
several workers on one sweep, and that what it writes is what it ran."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sweep_stand_in
import yaml
from sweep_specs import EXAMPLES, tree, write

import commands
import ranks
import tiny
from mpdit import config as configs
from mpdit_tools.sweep import space, spec, trial  # all that a sweep imports: forked ones start warm

PATIENCE_S = 300


# ---- real processes --------------------------------------------------------------------------------------------------


def sweeping(rank: int, world: int, argv: Sequence[object], real: bool, mlflow: bool) -> commands.Done:
    """``mpdit sweep ARGV`` for ranks.run; unless `real`, trials are those of sweep_stand_in.py."""
    if not real:
        trial.TRAIN = [sys.executable, sweep_stand_in.__file__]
    if not mlflow:
        sys.modules["mlflow"] = sys.modules["mlflow.entities"] = None  # type: ignore[assignment]
    return commands.commands(rank, world, [["sweep", *argv]])[0]


def sweep(*argv: object, real: bool = False, mlflow: bool = False) -> commands.Done:
    done: commands.Done = ranks.run(1, sweeping, timeout_s=PATIENCE_S, argv=argv, real=real, mlflow=mlflow)[0]
    return done


@contextlib.contextmanager
def started(*argv: object, step_s: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[ranks.World]:
    monkeypatch.setenv("STAND_IN_STEP_S", str(step_s))
    world = ranks.start(1, sweeping, timeout_s=PATIENCE_S, argv=argv, real=False, mlflow=False)
    try:
        yield world
    finally:
        world.close()


def wait_for(condition: Any) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def starts(run: Path, name: str = "starts") -> list[int]:
    """The process of each start of a trial, or of each that came to its end."""
    path = run / name
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "zombie" not in Path(f"/proc/{pid}/status").read_text() if Path("/proc").exists() else True
    return False


def test_what_a_sweep_writes_is_what_it_ran(tmp_path: Path, tiny_set: Path) -> None:
    """Values by hand from the stand-in's loss; one trial diverges, one crashes with a secret in its last words."""
    search = {"optim.lr": {"grid": ["2^-8", "2^-6", "2^5"]}, "optim.warmup_steps": {"choice": [3, 7]}}
    path = write(tmp_path, tree(tiny_set, search=search, confirm={"top": 1, "seeds": [4]}))
    code, out, error = sweep(path, "--out", tmp_path / "s", "--workers", "2")
    assert (code, error) == (0, ""), out
    rows = lines(tmp_path / "s")
    assert [row["number"] for row in rows] == list(range(7))
    by = {(row["params"]["optim.lr"], row["params"]["optim.warmup_steps"], row["seed"]): row for row in rows}
    code, planned, _ = commands.run("plan", tmp_path / "s" / "proxy.yaml", "--json")
    per_image = json.loads(planned)["model_flops_per_image"]
    crashed = "RuntimeError: no space left on http://***@host/disk"
    for exponent in (-8, -6, 5):
        good, bad = by[2.0**exponent, 3, 0], by[2.0**exponent, 7, 0]
        value = sweep_stand_in.final_loss(exponent, 0) if exponent < 5 else None
        state, images = ("complete", 160) if exponent < 5 else ("diverged", 24)
        seen = {name: good[name] for name in ("state", "value", "images", "flops", "seed")}
        work = images * per_image
        assert seen == {"state": state, "value": value, "images": images, "flops": work, "seed": 0}
        assert (bad["state"], bad["value"], bad["error"]) == ("failed", None, crashed)
    assert by[2.0**-6, 3, 4]["value"] == sweep_stand_in.final_loss(-6, 4)
    best = configs.load(tmp_path / "s" / "best.yaml")
    assert best == space.filled(spec.load(path).proxy, {"optim.lr": 2.0**-6}, "")
    report = (tmp_path / "s" / "REPORT.md").read_text()
    assert "2^-6" in report
    assert crashed in report
    assert all((tmp_path / "s" / f"{name}.png").stat().st_size > 5000 for name in ("response", "progress"))
    assert not any((tmp_path / "s").glob("trials/*/checkpoints"))
    assert not [
        p for p in tmp_path.rglob("*") if p.is_file() and p.name != "stderr.log" and b"open-sesame" in p.read_bytes()
    ]
    assert out.count("trial ") >= 7
    code, out, _ = sweep("report", tmp_path / "s", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["best"]["params"] == {"optim.lr": 2.0**-6, "optim.warmup_steps": 3}
    assert told["trials"] == rows


def test_sigkill_of_one_of_two_workers_loses_nothing(
    tmp_path: Path, tiny_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands share a sweep; one is killed outright in the middle of a trial. That trial's process ends with
    it, the other worker runs the trial again under its number, and every other trial ran once."""
    search = {"optim.lr": {"log_uniform": ["2^-10", "2^-2"]}}
    path = write(tmp_path, tree(tiny_set, mode="tpe", trials=6, search=search))
    folder = tmp_path / "s"
    argv = (path, "--out", folder)
    with (
        started(*argv, step_s=0.1, monkeypatch=monkeypatch) as first,
        started(*argv, step_s=0.1, monkeypatch=monkeypatch) as second,
    ):
        running = wait_for(
            lambda: [t for t in folder.glob("trials/*") if starts(t)][1:] and sorted(folder.glob("trials/*"))
        )
        first.kill()
        pids = {pid: one for one in running for pid in starts(one)}
        victim = wait_for(lambda: next((one for pid, one in pids.items() if not alive(pid)), None))
        second.results()
    rows = lines(folder)
    assert [(row["number"], row["state"]) for row in rows] == [(n, "complete") for n in range(6)]
    assert len({row["params"]["optim.lr"] for row in rows}) == 6
    again = {one: len(starts(one)) for one in sorted(folder.glob("trials/*"))}
    assert again[victim] == 2
    assert sum(again.values()) == 7
    assert starts(victim)[1:] == starts(victim, "ends"), "the killed worker's trial trained on"
    for row in rows:
        assert row["value"] == sweep_stand_in.final_loss(math.log2(row["params"]["optim.lr"]), 0)


def test_ctrl_c_ends_in_order_and_the_same_command_goes_on(
    tmp_path: Path, tiny_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, tree(tiny_set))
    folder = tmp_path / "s"
    with started(path, "--out", folder, step_s=0.1, monkeypatch=monkeypatch) as world:
        (pid,) = wait_for(lambda: starts(folder / "trials" / "0000"))
        wait_for(lambda: (folder / "trials" / "0000" / "metrics.jsonl").exists())
        os.kill(world.pids[0], signal.SIGINT)
        code, out, _ = world.results()[0]
    assert code == 130
    assert "stopped; trials that will be run again by the same command: 0\n" in out
    assert not alive(pid)
    other = write(tmp_path, tree(tiny_set, seeds=[5]), "other.yaml")
    assert "holds a sweep with seeds [0], but now it is [5]" in sweep(other, "--out", folder)[2]
    monkeypatch.setenv("STAND_IN_STEP_S", "0")
    code, out, _ = sweep(path, "--out", folder)
    assert code == 0
    assert len(starts(folder / "trials" / "0000")) == 2
    assert [row["state"] for row in lines(folder)] == ["complete"] * 3


@pytest.mark.parametrize("kind", ["median", "halving"])
def test_hopeless_trials_are_given_up(
    kind: str, tmp_path: Path, tiny_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three good rates, then three that are worse from the first steps on: those end early, their processes gone,
    their folders there."""
    good, worse = [2.0**e for e in (-7, -6, -5)], [2.0**e for e in (0, 1, 2)]
    prune = {"kind": kind, "every": 2, "warmup_steps": 4, "startup_trials": 2, "reduction": 2}
    spec_tree = tree(tiny_set, search={"optim.lr": {"grid": good + worse}}, prune=prune)
    monkeypatch.setenv("STAND_IN_STEP_S", "0.1")
    code, _, _ = sweep(write(tmp_path, spec_tree), "--out", tmp_path / "s")
    assert code == 0
    rows = {row["params"]["optim.lr"]: row for row in lines(tmp_path / "s")}
    assert rows[2.0**-6]["state"] == "complete"
    for rate in worse:
        run = tmp_path / "s" / "trials" / f"{rows[rate]['number']:04d}"
        assert (rows[rate]["state"], rows[rate]["value"]) == ("pruned", None)
        assert 0 < rows[rate]["images"] < 160
        assert len((run / "metrics.jsonl").read_text().splitlines()) * 8 == rows[rate]["images"]
        assert not any(map(alive, starts(run)))


def test_a_metric_that_runs_do_not_have(tmp_path: Path, tiny_set: Path) -> None:
    code, _, error = sweep(write(tmp_path, tree(tiny_set, metric="val_los")), "--out", tmp_path / "s")
    assert code == 2
    assert error.endswith("has no 'val_los' in any line; did you mean 'val_loss'?.\n")
    assert error.count("\n") == 1


def test_one_crash_after_another_stops_the_sweep_and_can_be_run_again(tmp_path: Path, tiny_set: Path) -> None:
    search = {"optim.lr": {"grid": [2.0**e for e in range(-9, -3)]}, "optim.warmup_steps": {"choice": [7]}}
    path = write(tmp_path, tree(tiny_set, search=search))
    code, _, error = sweep(path, "--out", tmp_path / "s")
    assert code == 1
    assert "3 trials in a row failed" in error
    assert "RuntimeError: no space left" in error
    code, _, error = sweep(path, "--out", tmp_path / "s", "--retry-failed")
    assert code == 1
    assert [row["params"]["optim.lr"] for row in lines(tmp_path / "s")] == [2.0**e for e in (-9, -8, -7)] * 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"proxy": {**tiny.BASE, "model": {**tiny.BASE["model"], "width": 36}}},
            "the proxy can't be trained: model.width 36",
        ),
        ({"search": {"optim.warmup_steps": {"grid": [1, 20]}}}, "optim.warmup_steps 20 can't be trained"),
        ({"search": {"optim.lr": {"grid": [-1.0, 1.0]}}}, "optim.lr -1 can't be trained: optim.lr is -1.0"),
    ],
)
def test_what_can_not_be_trained_is_told_before_anything_is(
    keys: dict[str, Any], said: str, tmp_path: Path, tiny_set: Path
) -> None:
    base = tree(tiny_set, **keys)
    base["proxy"] = {**base["proxy"], "data": {"path": str(tiny_set)}}
    code, out, error = sweep(write(tmp_path, base), "--out", tmp_path / "s")
    assert (code, out) == (2, "")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, tiny_set: Path) -> None:
    path = write(tmp_path, tree(tiny_set))
    code, _, error = sweep(path, "--out", tmp_path)
    assert (code, "holds something else than a sweep" in error) == (2, True)
    assert yaml.safe_load(path.read_text()) == tree(tiny_set), "a spec in its own folder is no sweep"
    assert [p.name for p in tmp_path.iterdir()] == ["spec.yaml"]
    code, _, error = sweep("report", tmp_path / "nothing")
    assert (code, "holds no sweep" in error) == (2, True)


def test_random_draws_depend_on_the_number_alone(tmp_path: Path) -> None:
    """So a resumed sweep does not draw its first values again, and two workers do not draw the same."""
    from mpdit_tools.sweep.study import Ledger

    base = dataclasses.replace(spec.load(EXAMPLES / "mmdit.yaml"), trials=4)
    (tmp_path / "one").mkdir(), (tmp_path / "new").mkdir()
    one = Ledger(tmp_path / "one", base)
    claims = [ledger.claim() for ledger in (one, one, one, one)]
    again = [Ledger(tmp_path / "new", base).claim() for _ in range(4)]
    drawn, redrawn = ([claim.params for claim in some if not isinstance(claim, str)] for some in (claims, again))
    assert drawn == redrawn
    assert len({params["optim.lr"] for params in drawn}) == 4
    assert all(2**-13 <= params["optim.lr"] <= 2**-7 for params in drawn)
    assert {type(params["optim.warmup_steps"]) for params in drawn} == {int}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["Study.ask", "Trial._suggest", "Trial.set_user_attr"])
@pytest.mark.parametrize("name", ["pixart", "mmdit"])
def test_a_process_that_is_killed_while_it_takes_a_trial_leaves_no_half_of_one(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two of the writes to the study; the next one runs every trial of the sweep once."""
    import optuna

    from mpdit_tools.sweep.study import Ledger, Outcome

    base = dataclasses.replace(spec.load(EXAMPLES / f"{name}.yaml"), confirm=None)
    base = base if name == "pixart" else dataclasses.replace(base, trials=5)
    owner, function = (
        {"Study": optuna.study.Study, "Trial": optuna.trial.Trial}[where.split(".")[0]],
        where.split(".")[1],
    )
    done = Outcome(state="complete", value=0.5, images=1, wall_s=0.1)
    with monkeypatch.context() as patched:
        whole = getattr(owner, function)

        def dies(self: Any, *arguments: Any, **more: Any) -> Any:
            if function == "set_user_attr" and arguments[0] != "kind":
                return whole(self, *arguments, **more)
            raise Killed

        patched.setattr(owner, function, dies)
        with contextlib.suppress(Killed):
            Ledger(tmp_path, base).claim()
    ledger = Ledger(tmp_path, base)
    for _ in range(6):
        claim = ledger.claim()
        if isinstance(claim, str):
            break
        ledger.finish(claim, done)
    assert claim == "done"
    assert [record.state for record in ledger.records()] == 5 * ["complete"]
    assert len({record.params["optim.lr"] for record in ledger.records()}) == 5


# ---- the real thing --------------------------------------------------------------------------------------------------


def test_two_real_trials_under_one_mlflow_run(tmp_path: Path, tiny_set: Path) -> None:
    """`mpdit train` itself: what it calls diverged is taken for that; MLflow shows the trials under the sweep."""
    base = tree(tiny_set, search={"optim.lr": {"grid": ["2^-8", 1e30]}})
    base["proxy"]["train"] = {**base["proxy"]["train"], "steps": 6}
    code, out, error = sweep(write(tmp_path, base), "--out", tmp_path / "s", real=True, mlflow=True)
    assert (code, error) == (0, ""), out
    good, bad = lines(tmp_path / "s")
    assert (good["state"], bad["state"], bad["value"], good["images"]) == ("complete", "diverged", None, 48)
    metrics = [json.loads(line) for line in (tmp_path / "s" / "trials" / "0000" / "metrics.jsonl").open()]
    assert good["value"] == metrics[-1]["val_loss"]
    assert configs.load(tmp_path / "s" / "best.yaml").optim.lr == 2**-8
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "mpdit"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {*runs} == {"s", "0000", "0001"}
    parent = runs["s"].info.run_id
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in ("0000", "0001")} == {parent}
    assert (runs["s"].info.status, runs["0000"].info.status, runs["0001"].info.status) == (
        "FINISHED",
        "FINISHED",
        "FAILED",
    )
    assert runs["s"].data.metrics["best"] == pytest.approx(good["value"])
    assert {artifact.path for artifact in client.list_artifacts(parent)} >= {"REPORT.md", "best.yaml"}
