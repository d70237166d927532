"""`mpdit track sync`: whatever MLflow missed of a run is added, once, and nothing that is secret is said."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlflow_stores import SECRET, files_with, server, store, wait_for
from mpdit import cli
from mpdit.config import dump, from_dict, to_dict
from mpdit.train.metrics import Metrics
from mpdit.train.mlflow_run import Point
from mpdit.train.tracking import Tracker

pytestmark = pytest.mark.usefixtures("alone")

STEPS = 30
CONFIG = {"optim": {"lr": 0.002}, "train": {"steps": STEPS}, "run": {"experiment": "icons"}}


def row(step: int, time_s: float = 1.7e9) -> dict[str, Any]:
    value = {"val_loss": 0.5 / (step + 1)} if step % 10 == 9 else {}
    loss = None if step == 3 else 1 / (step + 1)
    return {"step": step, "time": time_s + step, "loss": loss, "samples": "0f", "data_s": 0.25, **value}


def write(run_dir: Path, steps: range = range(STEPS)) -> None:
    """What a run leaves beside what it told MLflow."""
    with Metrics(run_dir / "metrics.jsonl", steps.start) as metrics:
        for step in steps:
            metrics.log(row(step))
    (run_dir / "config.yaml").write_text(dump(from_dict(CONFIG)))
    (run_dir / "mup_table.json").write_text("[]\n")
    (run_dir / "samples").mkdir(exist_ok=True)
    (run_dir / "samples" / "step_0000010.png").write_bytes(b"ten")


def sync(capsys: Any, run_dir: Path, *words: str) -> dict[str, Any]:
    assert cli.main(["track", "sync", str(run_dir), "--json", *words]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    added: dict[str, Any] = json.loads(said.out)
    return added


def refused(capsys: Any, code: int, *words: object) -> str:
    assert cli.main(["track", *map(str, words)]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert SECRET not in said.err
    return str(said.err)


def same(run_dir: Path, run_id: str, steps: range = range(STEPS)) -> None:
    """MLflow has each number of metrics.jsonl, with its time, and no other."""
    client = store(run_dir)
    truth = [Point.of({k: v for k, v in row(step).items() if v is not None}) for step in steps]
    for key in ("loss", "data_s", "val_loss"):
        found = [(p.step, p.timestamp, p.value) for p in client.get_metric_history(run_id, key)]
        assert sorted(found) == [(p.step, p.time_ms, p.values[key]) for p in truth if key in p.values]
    assert client.get_metric_history(run_id, "time") == client.get_metric_history(run_id, "samples") == []


def test_a_run_that_mlflow_never_heard_of(run_dir: Path, capsys: Any) -> None:
    """Its server was away from the first to the last step; it is synced to another store, then to no avail again."""
    write(run_dir)
    with server("dead") as port:
        uri = f"http://me:{SECRET}@127.0.0.1:{port}"
        params = {**to_dict(from_dict(CONFIG)), "parallel": {"micro_batch": 7}}
        tracker = Tracker(run_dir, uri=uri, experiment="icons", params=params, tags={"kind": "x"}, warn=lambda _: None)
        tracker.close("FAILED")
    assert "start it" in refused(capsys, 1, "sync", run_dir)
    good = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    added = sync(capsys, run_dir, "--uri", good)
    assert added["created"]
    assert (added["points"], added["points_by_metric"]) == (62, {"data_s": 30, "loss": 29, "val_loss": 3})
    assert (added["status"], added["uri"], added["files"]) == (
        "FAILED",
        good,
        ["mup_table.json", "samples/step_0000010.png"],
    )
    same(run_dir, added["run_id"])
    run = store(run_dir).get_run(added["run_id"])
    assert (run.info.run_name, run.info.status, run.info.start_time) == ("run 1", "FAILED", 1_700_000_000_000)
    assert run.info.end_time == 1_700_000_029_000
    assert (run.data.params["optim.lr"], run.data.params["parallel.micro_batch"]) == ("0.002", "7")
    assert run.data.tags["kind"] == "x"
    assert store(run_dir).get_experiment(run.info.experiment_id).name == "icons"
    assert [path.read_bytes() for path in (run_dir.parent / "mlartifacts").rglob("*.png")] == [b"ten"]

    again = sync(capsys, run_dir, "--uri", good)
    assert again == {
        **added,
        **{"created": False, "points": 0, "points_by_metric": {}, "params": 0, "tags": 0, "files": []},
    }
    same(run_dir, added["run_id"])
    assert cli.main(["track", "sync", str(run_dir), "--uri", good]) == 0
    assert capsys.readouterr().out.endswith("FAILED\nadded: 0 points, 0 params, 0 tags, 0 files\n")
    assert files_with(SECRET, run_dir.parent) == []


@pytest.mark.parametrize("seed", range(3))
def test_what_is_missing_is_added_and_nothing_twice(run_dir: Path, capsys: Any, seed: int) -> None:
    """Of what a run logged anything may have been lost; a resumed run has logged some steps twice, once in vain."""
    write(run_dir)
    dice, abandoned = random.Random(seed), 0
    with Tracker(run_dir) as tracker:
        for step in range(STEPS):
            if dice.random() < 0.5:
                tracker.log({k: v for k, v in row(step).items() if dice.random() < 0.5 or k in ("step", "time")})
        tracker.log({**row(20, 1.6e9), "loss": 77.0})  # of the attempt before the resume
        abandoned = 1
        wait_for(lambda: tracker.run_id)
    added = sync(capsys, run_dir)
    assert (added["run_id"], added["created"], added["status"]) == (tracker.run_id, False, "FINISHED")
    client = store(run_dir)
    found = [(p.step, p.value) for p in client.get_metric_history(added["run_id"], "loss")]
    assert len(found) == len(set(found)) == 29 + abandoned
    assert {(step, row(step)["loss"]) for step in range(STEPS) if step != 3} < set(found)
    assert len(client.get_metric_history(added["run_id"], "val_loss")) == 3
    assert sync(capsys, run_dir)["points"] == 0


def test_a_folder_older_than_tracking_json_and_killed(run_dir: Path, capsys: Any) -> None:
    write(run_dir, range(12))
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 12, "lo')
    added = sync(capsys, run_dir)
    assert (added["created"], added["status"], added["points"]) == (True, "KILLED", 11 + 12 + 1)
    same(run_dir, added["run_id"], range(12))
    run = store(run_dir).get_run(added["run_id"])
    assert run.data.params["optim.lr"] == "0.002"
    write(run_dir, range(12, STEPS))  # it went on and finished, without a word to MLflow
    assert sync(capsys, run_dir)["status"] == "FINISHED"
    same(run_dir, added["run_id"])


LOCKED = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_is_being_trained_is_synced_up_to_now(run_dir: Path, capsys: Any) -> None:
    write(run_dir)
    command = [sys.executable, "-c", LOCKED, str(run_dir / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        job.stdout.readline()
        assert "is being trained, and that job opens its MLflow run itself" in refused(capsys, 2, "sync", run_dir)
        tracker = Tracker(run_dir)
        wait_for(lambda: tracker.run_id)
        added = sync(capsys, run_dir)
        assert (added["status"], added["points"], added["run_id"]) == ("RUNNING", 62, tracker.run_id)
        assert store(run_dir).get_run(tracker.run_id).info.status == "RUNNING"
        tracker.close()
        job.communicate()
    assert sync(capsys, run_dir)["status"] == "FINISHED"


@pytest.mark.parametrize("kind", ["dead", "mute", "failing"])
def test_a_server_that_is_away_is_one_sentence(run_dir: Path, capsys: Any, kind: str) -> None:
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1"
    write(run_dir)
    with server(kind) as port:
        said = refused(capsys, 1, "sync", run_dir, "--uri", f"http://me:{SECRET}@127.0.0.1:{port}?key={SECRET}")
    assert f"the MLflow store http://***@127.0.0.1:{port}?key=*** does not answer as it should" in said
    assert "MLFLOW_TRACKING_PASSWORD" in said
    assert files_with(SECRET, run_dir) == []


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: Any) -> None:
    assert f"{tmp_path}: is no run folder" in refused(capsys, 2, "sync", tmp_path)
    assert "there is sync" in refused(capsys, 2, "snyc", tmp_path)
