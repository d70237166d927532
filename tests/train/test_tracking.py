"""MLflow behind metrics.jsonl works when it can, costs nothing when it can't, and is told in the end what it misses."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlflow_stores import SECRET, files_with, server, store, wait_for
from mpdit.train.metrics import Metrics, read_metrics
from mpdit.train.mlflow_run import Told, flatten
from mpdit.train.tracking import Tracker

pytestmark = pytest.mark.usefixtures("alone")


def row(step):
    return {"step": step, "loss": 1 / (step + 1), "images_per_s": 8.5}


def train(run_dir, steps, **settings):
    """What a training loop does with both, and what it costs: the seconds the log calls took, and the warnings."""
    warnings = []
    with Metrics(run_dir / "metrics.jsonl", steps.start) as metrics:
        tracker = Tracker(run_dir, warn=warnings.append, **settings)
        began = time.perf_counter()
        for step in steps:
            metrics.log(row(step))
            tracker.log(row(step))
        return tracker, time.perf_counter() - began, warnings


def test_params_are_flat_texts_without_credentials():
    tree = {
        "a": {"b": 1e-3, "c": None, "d": (1, 2)},
        "run": {"mlflow_uri": f"http://me:{SECRET}@host"},
        "t": "x" * 9999,
    }
    flat = flatten(tree)
    assert flat.pop("t") == "x" * 6000
    assert flat == {"a.b": "0.001", "a.c": "None", "a.d": "[1, 2]", "run.mlflow_uri": "http://***@host"}


# ---- MLflow, when it works -------------------------------------------------------------------------------------------


def test_sqlite_store_and_resume(run_dir, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    params = {"optim": {"lr": 1e-3, "clip": 1.0}, "many": {str(i): i for i in range(150)}}
    tracker, _, warnings = train(run_dir, range(30), params=params, tags={"kind": "proxy"}, experiment="icons")
    (run_dir / "grid.png").write_bytes(b"png")
    tracker.log_file(run_dir / "grid.png", "samples")
    wait_for(lambda: tracker.run_id)
    client = store(run_dir)
    wait_for(lambda: any(key.startswith("system/") for key in client.get_run(tracker.run_id).data.metrics))
    tracker.close()
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["kind"]) == ("FINISHED", "run 1", "proxy")
    assert run.data.params == flatten(params)
    assert (run_dir / "mlflow_run_id").read_text().strip() == tracker.run_id
    assert client.get_experiment(run.info.experiment_id).name == "icons"
    history = client.get_metric_history(tracker.run_id, "loss")
    assert {point.step: point.value for point in history} == {step: 1 / (step + 1) for step in range(30)}
    assert [path.read_bytes() for path in (run_dir.parent / "mlartifacts").rglob("samples/grid.png")] == [b"png"]
    assert list(Path.cwd().iterdir()) == []

    params["optim"]["lr"] = 2e-3
    again, _, more = train(run_dir, range(30, 40), params=params, experiment="icons")
    again.close("KILLED")
    run = client.get_run(tracker.run_id)
    assert again.run_id == tracker.run_id
    assert (run.info.status, run.data.params["optim.lr"]) == ("KILLED", "0.001")
    assert {key: run.data.tags[key] for key in run.data.tags if "changed" in key} == {"changed.optim.lr": "0.002"}
    assert len(client.get_metric_history(tracker.run_id, "loss")) == 40
    assert (tracker.lost, again.lost, warnings, more) == (0, 0, [], [])
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 40


def test_a_run_stands_under_the_one_that_its_config_names(run_dir):
    """As a sweep's trials do; MLflow shows them so by this tag."""
    with Tracker(run_dir, params={"run": {"mlflow_parent": None}}) as parent:
        parent.log(row(0))
    trial = run_dir.parent / "trial"
    trial.mkdir()
    child = Tracker(trial, params={"run": {"mlflow_parent": parent.run_id}}, tags={"kind": "trial"})
    child.close()
    tags = [store(run_dir).get_run(run_id).data.tags for run_id in (parent.run_id, child.run_id)]
    assert [tag.get("mlflow.parentRunId") for tag in tags] == [None, parent.run_id]
    assert tags[1]["kind"] == "trial"


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_status_of_a_run_that_ends_early(run_dir, error, status):
    def train_until_error(tracker):
        with tracker:
            wait_for(lambda: tracker.run_id)
            raise error

    tracker = Tracker(run_dir)
    with pytest.raises(error):
        train_until_error(tracker)
    assert store(run_dir).get_run(tracker.run_id).info.status == status


def test_a_store_that_forgot_the_run_gets_a_new_one(run_dir):
    (run_dir / "mlflow_run_id").write_text("0" * 32)
    with Tracker(run_dir) as first:
        first.log(row(0))
    assert first.lost == 0
    store(run_dir).delete_run(first.run_id)
    with Tracker(run_dir) as second:
        second.log(row(0))
    assert second.run_id not in (None, first.run_id)
    assert (run_dir / "mlflow_run_id").read_text().strip() == second.run_id


def execute(run_dir, statement):
    with sqlite3.connect(run_dir.parent / "mlflow.db", timeout=60) as database:
        database.execute(statement)
    database.close()


def test_a_store_that_breaks_and_comes_back_gets_everything(run_dir):
    warnings = []
    tracker = Tracker(run_dir, pauses=(0.1, 0.3), warn=warnings.append)
    wait_for(lambda: tracker.run_id)
    execute(run_dir, "ALTER TABLE metrics RENAME TO gone")
    for step in range(200):
        tracker.log(row(step))
    wait_for(lambda: warnings)
    tracker.log_file(run_dir / "mlflow_run_id")
    time.sleep(1)
    execute(run_dir, "ALTER TABLE gone RENAME TO metrics")
    tracker.log(row(200))
    wait_for(lambda: len(store(run_dir).get_metric_history(tracker.run_id, "loss")) == 201)
    tracker.close()
    assert tracker.lost == 0
    assert len(warnings) == 1
    assert warnings[0].startswith("MLflow is tried again while the run lives (MlflowException: ")
    assert [file.path for file in store(run_dir).list_artifacts(tracker.run_id)] == ["mlflow_run_id"]


def test_a_store_that_was_away_at_the_start_gets_everything(run_dir):
    warnings = []
    execute(run_dir, "CREATE TRIGGER away BEFORE INSERT ON runs BEGIN SELECT RAISE(FAIL, 'away'); END")
    tracker = Tracker(run_dir, params={"a": 1}, capacity=20, pauses=(0.1, 0.3), warn=warnings.append)
    for step in range(50):
        tracker.log(row(step))
    wait_for(lambda: warnings)
    execute(run_dir, "DROP TRIGGER away")
    wait_for(lambda: tracker.run_id)
    tracker.close()
    client = store(run_dir)
    assert [p.step for p in client.get_metric_history(tracker.run_id, "loss")] == list(range(30, 50)), "the newest"
    assert client.get_run(tracker.run_id).data.params == {"a": "1"}
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert tracker.lost == 30
    assert len(warnings) == 2
    assert "MLflow misses 30 log calls (" in warnings[1]


def test_a_store_that_stays_broken_is_told_of_at_the_end(run_dir):
    warnings = []
    tracker = Tracker(run_dir, pauses=(0.1, 0.1), warn=warnings.append)
    wait_for(lambda: tracker.run_id)
    execute(run_dir, "ALTER TABLE metrics RENAME TO gone")
    (run_dir / "metrics.jsonl").touch()
    for step in range(6):
        tracker.log(row(step))
    wait_for(lambda: warnings)
    tracker.close("FAILED")
    assert tracker.lost == 6
    assert len(warnings) == 2
    assert warnings[1].startswith("MLflow misses 6 log calls (MlflowException")
    assert warnings[1].endswith(f"and this brings MLflow up to it: mpdit track sync '{run_dir}'")
    assert Told.read(run_dir).status == "FAILED"


def test_a_run_whose_creation_was_not_answered_is_found_again(run_dir):
    with Tracker(run_dir) as first:
        first.log(row(0))
    (run_dir / "mlflow_run_id").unlink()  # what is left when the answer never came
    with Tracker(run_dir) as second:
        second.log(row(1))
    assert second.run_id == first.run_id
    assert (run_dir / "mlflow_run_id").read_text().strip() == first.run_id


def test_what_a_store_refuses_costs_itself_alone(run_dir):
    warnings = []
    tracker = Tracker(run_dir, warn=warnings.append)
    tracker.log({"step": 0, "no/such:name!": 1.0})
    wait_for(lambda: tracker.lost)
    tracker.log(row(1))
    tracker.close()
    assert len(store(run_dir).get_metric_history(tracker.run_id, "loss")) == 1
    assert (tracker.lost, len(warnings)) == (1, 1)
    assert "refused" in warnings[0]


# ---- MLflow, when it doesn't -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dead", "failing"])
def test_a_server_that_refuses_costs_two_lines(run_dir, kind, capfd):
    with server(kind) as port:
        uri = f"http://me:{SECRET}@127.0.0.1:{port}/?token={SECRET}"
        tracker, seconds, warnings = train(run_dir, range(2000), uri=uri, pauses=(0.1, 0.2), params={"uri": uri})
        assert seconds < 5
        wait_for(lambda: warnings)
        tracker.log(row(2000))
        began = time.monotonic()
        tracker.close(timeout=20)
        assert time.monotonic() - began < 10
    assert tracker.lost == 2001
    assert len(warnings) == 2
    assert "MLflow is tried again while the run lives" in warnings[0]
    assert "MLflow misses 2001 log calls (MlflowException: " in warnings[1]
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 2000
    assert not (run_dir / "mlflow_run_id").exists()
    assert SECRET not in "".join(warnings) + "".join(capfd.readouterr())
    assert files_with(SECRET, run_dir) == []
    assert Told.read(run_dir).uri == f"http://***@127.0.0.1:{port}/?token=***"


def test_a_mute_server_holds_nothing_up(run_dir, monkeypatch):
    with server("mute") as port:
        tracker, seconds, warnings = train(run_dir, range(2000), uri=f"http://127.0.0.1:{port}", capacity=100)
        assert seconds < 5
        assert tracker.lost == 1900  # the newest hundred wait for the server
        began = time.monotonic()
        tracker.close(timeout=0.5)
        assert time.monotonic() - began < 10
    tracker.close(timeout=60)
    assert len(warnings) == 1
    assert "MLflow misses 2000 log calls" in warnings[0]
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 2000


def test_a_process_ends_while_its_server_is_mute(run_dir):
    code = (
        "import sys, time; from mpdit.train.tracking import Tracker\n"
        "tracker = Tracker(sys.argv[1], uri=sys.argv[2])\n"
        "assert 'mlflow.tracking' not in sys.modules\n"
        "tracker.log({'step': 0, 'loss': 1.0})\n"
        "while 'mlflow.store.tracking.rest_store' not in sys.modules: time.sleep(0.05)\n"
        "time.sleep(0.5); tracker.close(timeout=0.2); print('closed')"
    )
    variables = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
    with server("mute") as port:
        command = [sys.executable, "-c", code, str(run_dir), f"http://127.0.0.1:{port}"]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "closed\n")
    assert done.stderr == ("mpdit: MLflow misses 1 log calls (it did not answer within 0.2 s of the end of the run).\n")


def test_without_mlflow(run_dir, monkeypatch):
    for name in ("mlflow", "mlflow.entities", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, None)
    tracker, _, warnings = train(run_dir, range(5))
    tracker.close()
    assert "MLflow is off (ModuleNotFoundError" in warnings[0]
    assert (len(warnings), tracker.lost) == (2, 5)


def test_a_file_that_is_gone_costs_itself_alone(run_dir):
    tracker, _, warnings = train(run_dir, range(3))
    tracker.log_file(run_dir / "gone.png")
    tracker.log(row(3))
    tracker.close()
    assert len(store(run_dir).get_metric_history(tracker.run_id, "loss")) == 4
    assert store(run_dir).get_run(tracker.run_id).info.status == "FINISHED"
    assert (tracker.lost, len(warnings)) == (1, 1)
    assert "gone.png was gone" in warnings[0]


def test_importing_the_module_imports_no_mlflow():
    code = "import sys, mpdit.train.tracking, mpdit.train.environment; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
