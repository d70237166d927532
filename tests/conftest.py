import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Ranks are forked from this process: an OpenMP pool in it would hang every child that wants threads of its own.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import ranks
import tiny

# What is started in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 60 little pictures. Built in a child: ranks are forked from the parent, so it stays without threads."""
    folder = tmp_path_factory.mktemp("tiny")
    ranks.run(1, lambda rank, world: str(tiny.build_set(folder)))
    return folder / "set"


@pytest.fixture(scope="session")
def labelled_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in four classes, built in a child too."""
    folder = tmp_path_factory.mktemp("labelled")
    ranks.run(1, lambda rank, world: str(tiny.build_set(folder, labelled=True)))
    return folder / "set"


@pytest.fixture(scope="session")
def mixed_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, for the buckets of tiny.BUCKETS, built in a child too."""
    folder = tmp_path_factory.mktemp("mixed")
    ranks.run(1, lambda rank, world: str(tiny.build_set(folder, mixed=True)))
    return folder / "set"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Variables of its own, and no thread left behind: other tests fork this process."""
    before = set(threading.enumerate())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new sqlite store: 65 tables by migrations, seconds of work, so made once and copied."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    code = "import sys; from mlflow.tracking import MlflowClient; MlflowClient(sys.argv[1]).search_experiments()"
    variables = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", code, f"sqlite:///{path}"]
    subprocess.run(command, env=variables, capture_output=True, check=True, timeout=300)
    return path


@pytest.fixture
def run_dir(tmp_path: Path, mlflow_template: Path) -> Path:
    """An empty run folder beside a store."""
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    run = tmp_path / "run 1"
    run.mkdir()
    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands in the layouts that it ran."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["layouts"] = [*ranks.layouts_run]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    ranks.layouts_run.update(getattr(node, "workeroutput", {}).get("layouts", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed, skipped = (len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "skipped"))
    layouts = len(ranks.layouts_run)
    terminalreporter.write_line(
        f"{passed} tests passed, {skipped} skipped{' (why: above)' if skipped else ''}, on {layouts} layouts of real "
        "ranks (precision counted in)."
    )
