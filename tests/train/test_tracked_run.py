"""A whole run beside an MLflow server that is away, hangs, dies and comes back; and no credential in what it leaves."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import commands
import ranks
import tiny
from mlflow_stores import SECRET, RealServer, files_with, server, wait_for
from mpdit import config as configs
from mpdit.config import Config
from mpdit.train.mlflow_run import Told


def train(rank: int, world: int, config: Config) -> None:
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight, tracking

    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"], tracking._PAUSES_S = "2", (0.2, 1.0)
    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
def test_no_credential_gets_into_a_run_folder_and_its_config_starts_it_again(tiny_set: Path, tmp_path: Path) -> None:
    short = {"train": {"steps": 2}, "optim": {"warmup_steps": 1}}
    with server("dead") as port:
        uri = f"http://me:{SECRET}@127.0.0.1:{port}/?token={SECRET}"
        config = tiny.config(tiny_set, run={"dir": str(tmp_path / "run"), "mlflow_uri": uri}, **short)
        ranks.run(1, train, config=config)
        assert files_with(SECRET, tmp_path) == []
        told = Told.read(tmp_path / "run")
        assert told is not None
        assert (told.uri, told.status) == (f"http://***@127.0.0.1:{port}/?token=***", "FINISHED")
        again = configs.load(tmp_path / "run", ["train.steps=4"])
        assert again.run.mlflow_uri == told.uri
        ranks.run(1, train, config=again)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(bool(RealServer.missing()), reason=RealServer.missing() or "-")
def test_a_server_that_is_away_hangs_dies_and_comes_back(tiny_set: Path, tmp_path: Path) -> None:
    """`mlflow server` itself. The run is killed while it is dead; then `mpdit track sync` brings it up to the run."""
    from mlflow.tracking import MlflowClient

    mlflow, run = RealServer(tmp_path), tmp_path / "run"
    config = tiny.config(
        tiny_set,
        parallel={"tp": 2},
        train={"steps": 1_000_000, "sample_every": 100},
        run={"dir": str(run), "mlflow_uri": mlflow.uri},
    )

    def goes_on(seconds: float) -> None:
        """The run does, whatever the server does."""
        before = lines(run)
        time.sleep(seconds)
        wait_for(lambda: lines(run) > before, 300)

    def catches_up() -> None:
        """The tracker is back within the run."""
        before, client = lines(run), MlflowClient(mlflow.uri)
        wait_for((run / "mlflow_run_id").is_file, 300)
        run_id = (run / "mlflow_run_id").read_text().strip()
        wait_for(lambda: client.get_run(run_id).data.metrics.get("images", 0) >= 8 * before, 300)

    try:
        world = ranks.start(2, train, timeout_s=1800, config=config)
        try:
            goes_on(3)  # it is away
            mlflow.start()
            catches_up()
            mlflow.signal(signal.SIGSTOP)
            goes_on(6)
            mlflow.signal(signal.SIGCONT)
            catches_up()
            mlflow.kill()
            goes_on(4)
            mlflow.start()
            catches_up()
            mlflow.kill()
            goes_on(2)
        finally:
            world.close()
        steps = lines(run)
        mlflow.start()
        code, out, error = commands.run("track", "sync", run, "--json")
        assert (code, error) == (0, "")
        added = json.loads(out)
        assert added["status"] == "KILLED"
        assert 0 < added["points"] < 8 * steps, "of the steps while it was dead for good, and of no others"
        client, rows = MlflowClient(mlflow.uri), metrics(run)
        assert len(client.search_runs(["0", *(e.experiment_id for e in client.search_experiments())])) == 1
        for key in ("loss", "lr", "grad_norm", "data_s"):
            found = [(p.step, p.value) for p in client.get_metric_history(added["run_id"], key)]
            assert sorted(found) == [(row["step"], row[key]) for row in rows if key in row]
        pictures = [Path(file.path).name for file in client.list_artifacts(added["run_id"], "samples")]
        assert pictures == sorted(path.name for path in (run / "samples").glob("*.png"))
        again = json.loads(commands.run("track", "sync", run, "--json")[1])
        assert (again["points"], again["files"], again["created"]) == (0, [], False)
        print(f"\n{steps} steps; track sync added {added['points']} points of {added['points_by_metric']}")
    finally:
        mlflow.kill()


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
