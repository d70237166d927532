"""metrics.jsonl is the truth; MLflow behind it works when it can and costs nothing when it can't."""

import http.server
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mpdit.train.metrics import Metrics, read_metrics
from mpdit.train.tracking import Tracker, flatten, redact_uri

SECRET = "open-sesame"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Variables of its own, and no thread left behind: other tests fork this process."""
    before = set(threading.enumerate())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A new sqlite store: 65 tables by migrations, seconds of work, so made once and copied."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    code = "import sys; from mlflow.tracking import MlflowClient; MlflowClient(sys.argv[1]).search_experiments()"
    variables = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", code, f"sqlite:///{path}"]
    subprocess.run(command, env=variables, capture_output=True, check=True, timeout=300)
    return path


@pytest.fixture
def run_dir(tmp_path, template):
    shutil.copy(template, tmp_path / "mlflow.db")
    run = tmp_path / "run 1"
    run.mkdir()
    return run


def store(run_dir):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")


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


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_one_strict_json_object_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"nan": float("nan"), "inf": -float("inf"), "np": np.float32(0.5), "torch": torch.tensor(2), "s": "ö"}
    with Metrics(path) as metrics:
        metrics.log({"step": 0, **values, "list": [1.0, float("nan")]})
        with pytest.raises(ValueError, match="step"):
            metrics.log({"loss": 1.0})
    text = path.read_text()
    assert text.count("\n") == 1
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told == {"step": 0, "nan": None, "inf": None, "np": 0.5, "torch": 2, "s": "ö", "list": [1.0, None]}


@pytest.mark.parametrize("torn", [b"", b'{"step": 10, "lo', b"\0\0\0\0\n\0\0", b'{"step": 10, "loss": 1.0}', b"5\n"])
def test_resumed_file_is_the_unbroken_runs(tmp_path, torn):
    with Metrics(tmp_path / "unbroken.jsonl") as metrics:
        for step in range(20):
            metrics.log(row(step))
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        for step in range(10):
            metrics.log(row(step))
    with path.open("ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(path)][:10] == list(range(10))
    with Metrics(path, 7) as metrics:
        assert metrics.kept == 7
        assert metrics.removed == 3 + torn.count(b"\n") + (not torn.endswith(b"\n") and torn != b"")
        for step in range(7, 20):
            metrics.log(row(step))
    assert path.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    with Metrics(path, 2) as metrics:
        metrics.log({"step": 2})
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]


def test_a_killed_process_has_every_line(tmp_path):
    code = (
        "import os, sys; from mpdit.train.metrics import Metrics\n"
        "metrics = Metrics(sys.argv[1])\n"
        "for step in range(5): metrics.log({'step': step})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(read_metrics(tmp_path / "m.jsonl")) == 5


# ---- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        ("http://me:p@w@host", "http://***@host"),
        ("https://token@host/?api_key=abc&x=1", "https://***@host/?api_key=***&x=***"),
        ("postgresql+psycopg2://me:p%40w@db/runs?sslmode=require", "postgresql+psycopg2://***@db/runs?sslmode=***"),
        ("http://it's:me@host", "http://***@host"),
        ("mlflow_uri: 'http://me:pw@host?t=a'\nnext: 1", "mlflow_uri: 'http://***@host?t=***'\nnext: 1"),
        ("sqlite:////data/a@b/mlflow.db?timeout=1", "sqlite:////data/a@b/mlflow.db?timeout=1"),
        ("http://host:5000", "http://host:5000"),
        ("databricks", "databricks"),
        ("a cat @ home?a=b", "a cat @ home?a=b"),
    ],
)
def test_redact_uri(uri, told):
    assert redact_uri(uri) == told


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


def rename_table(run_dir, old, new):
    with sqlite3.connect(run_dir.parent / "mlflow.db", timeout=60) as database:
        database.execute(f"ALTER TABLE {old} RENAME TO {new}")
    database.close()


def test_a_store_that_comes_back_gets_everything(run_dir):
    tracker = Tracker(run_dir, retry_after=[0.1] * 600)
    wait_for(lambda: tracker.run_id)
    rename_table(run_dir, "metrics", "gone")
    tracker.log(row(0))
    time.sleep(1.5)
    rename_table(run_dir, "gone", "metrics")
    wait_for(lambda: store(run_dir).get_metric_history(tracker.run_id, "loss"))
    tracker.close()
    assert tracker.lost == 0


def test_a_store_that_breaks_halfway_turns_it_off(run_dir):
    warnings = []
    tracker = Tracker(run_dir, retry_after=[0.1], warn=warnings.append)
    wait_for(lambda: tracker.run_id)
    rename_table(run_dir, "metrics", "gone")
    for step in range(5):
        tracker.log(row(step))
    wait_for(lambda: warnings)
    tracker.log(row(5))
    tracker.close("FAILED")
    assert "no such table" in warnings[0]
    assert (len(warnings), tracker.lost) == (1, 6)


# ---- MLflow, when it doesn't -----------------------------------------------------------------------------------------


class Failing(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500)
        self.end_headers()
        self.wfile.write(f"no, {SECRET}".encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def port(request):
    """Of a server that is dead, mute (accepts and never answers) or failing (500)."""
    if request.param == "failing":
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server.server_address[1]
            server.shutdown()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            if request.param == "dead":
                server.close()
            yield port


@pytest.mark.parametrize("port", ["dead", "failing"], indirect=True)
def test_a_server_that_refuses_costs_one_line(run_dir, port, capfd):
    uri = f"http://me:{SECRET}@127.0.0.1:{port}/?token={SECRET}"
    tracker, seconds, warnings = train(run_dir, range(2000), uri=uri, retry_after=[], params={"uri": uri})
    assert seconds < 5
    wait_for(lambda: warnings)
    tracker.log(row(2000))
    began = time.monotonic()
    tracker.close(timeout=20)
    assert time.monotonic() - began < 10
    assert len(warnings) == 1
    assert "MLflow is off" in warnings[0]
    assert "metrics.jsonl" in warnings[0]
    assert tracker.lost == 2001
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 2000
    assert not (run_dir / "mlflow_run_id").exists()
    written = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    told = "".join(warnings) + "".join(capfd.readouterr())
    assert SECRET not in told
    assert not any(SECRET.encode() in file for file in written)


@pytest.mark.parametrize("port", ["mute"], indirect=True)
def test_a_mute_server_holds_nothing_up(run_dir, port):
    uri = f"http://127.0.0.1:{port}"
    tracker, seconds, warnings = train(run_dir, range(2000), uri=uri, capacity=100)
    assert seconds < 5
    assert tracker.lost == 1900  # the newest hundred wait for the server
    began = time.monotonic()
    tracker.close(timeout=0.5)
    tracker.close(timeout=60)
    assert time.monotonic() - began < 10
    assert len(warnings) == 1
    assert "did not answer within 0.5 s" in warnings[0]
    assert tracker.lost == 2000
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 2000


@pytest.mark.parametrize("port", ["mute"], indirect=True)
def test_a_process_ends_while_its_server_is_mute(run_dir, port):
    code = (
        "import sys, time; from mpdit.train.tracking import Tracker\n"
        "tracker = Tracker(sys.argv[1], uri=sys.argv[2])\n"
        "assert 'mlflow.tracking' not in sys.modules\n"
        "tracker.log({'step': 0, 'loss': 1.0})\n"
        "while 'mlflow.store.tracking.rest_store' not in sys.modules: time.sleep(0.05)\n"
        "time.sleep(0.5); tracker.close(timeout=0.2); print('closed')"
    )
    variables = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
    command = [sys.executable, "-c", code, str(run_dir), f"http://127.0.0.1:{port}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "closed\n")
    assert done.stderr.startswith("mpdit: MLflow is off: ")
    assert done.stderr.count("\n") == 1


def test_without_mlflow(run_dir, monkeypatch):
    for name in ("mlflow", "mlflow.entities", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, None)
    tracker, _, warnings = train(run_dir, range(5))
    tracker.close()
    assert "ModuleNotFoundError" in warnings[0]
    assert (len(warnings), tracker.lost) == (1, 5)


def test_a_file_that_is_gone_costs_itself_alone(run_dir):
    tracker, _, warnings = train(run_dir, range(3))
    tracker.log_file(run_dir / "gone.png")
    tracker.log(row(3))
    tracker.close()
    assert len(store(run_dir).get_metric_history(tracker.run_id, "loss")) == 4
    assert store(run_dir).get_run(tracker.run_id).info.status == "FINISHED"
    assert (tracker.lost, len(warnings)) == (1, 1)


def test_importing_the_module_imports_no_mlflow():
    code = "import sys, mpdit.train.tracking, mpdit.train.environment; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
