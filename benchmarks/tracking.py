"""What tracking costs a training step: a real run beside a real `mlflow server` that answers, hangs and is dead.

    python benchmarks/tracking.py        # needs the extra `ui`; about three minutes on two cores

The server (loopback, sqlite) is stopped with SIGSTOP, killed and started again in turns under one run, so that its
phases are compared within the run; steps while the server itself starts, which takes both cores, are left out. Then the
calls that a step makes: Metrics.log, with its fsync thread and the same lines without, and Tracker.log.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

_TURNS = 3  # of answering and hanging, before it is killed
_STEPS = 30  # in a phase, at least
MODEL = {"width": 64, "depth": 4, "head_dim": 32, "patch": 2, "image_size": 12, "text_tokens": 8}


def write_config(folder: Path, uri: str) -> Path:
    import yaml

    import tiny

    data = tiny.build_set(folder)
    tree: dict[str, Any] = {**tiny.BASE, "model": MODEL, "data": {"path": str(data)}}
    tree["train"] = {"steps": 10**6, "batch_size": 8, "val_images": 2}
    tree["run"] = {"dir": str(folder / "run"), "mlflow_uri": uri}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_beside_server(folder: Path, phase_s: float, rounds: int) -> dict[str, list[float]]:
    """Seconds from step to step, by what the server did then."""
    from mlflow_stores import RealServer, wait_for

    if why := RealServer.missing():
        raise SystemExit(why)
    server = RealServer(folder)
    server.start()
    config, metrics = write_config(folder, server.uri), folder / "run" / "metrics.jsonl"
    phases: list[tuple[str, float, float]] = []

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def phase(name: str) -> None:
        began, end = time.time(), lines() + _STEPS
        time.sleep(phase_s)
        wait_for(lambda: lines() >= end, 300)
        phases.append((name, began + 1, time.time()))  # what it did before has worn off

    environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    command = [sys.executable, "-m", "mpdit", "train", str(config)]
    with (folder / "train.log").open("wb") as log:
        training = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: lines() > 20, 300)
        wait_for((folder / "run" / "mlflow_run_id").exists, 120)
        wait_for(server.quiet, 120)
        for _ in range(rounds):
            for _ in range(_TURNS):  # short ones in turns: the load of other programs drifts
                phase("answers")
                server.signal(signal.SIGSTOP)
                phase("hangs")
                server.signal(signal.SIGCONT)
            server.kill()
            phase("is dead")
            phase("is dead")
            server.start()
            wait_for(server.quiet, 120)
    finally:
        training.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            training.wait(60)
        training.kill()
        server.kill()
    times = [json.loads(line)["time"] for line in metrics.read_text().splitlines()]
    seconds: dict[str, list[float]] = {}
    for before, after in itertools.pairwise(times):
        for name, began, ended in phases:
            if began <= before and after <= ended:
                seconds.setdefault(name, []).append(after - before)
    return seconds


def calls(folder: Path, count: int) -> dict[str, list[float]]:
    """Seconds of each call, at some 500 steps a second; the tracker's store is dead."""
    from mpdit.train.metrics import Metrics
    from mpdit.train.tracking import Tracker

    row = dict.fromkeys(("loss", "lr", "grad_norm", "epoch", "step_s", "data_s", "images_per_s"), 0.123456789)
    row |= {"time": time.time(), "images": 1.0}
    folder.mkdir()
    tracker = Tracker(folder, uri="http://127.0.0.1:9", warn=lambda _: None)
    seconds: dict[str, list[float]] = {"Metrics.log": [], "write and flush": [], "Tracker.log": []}
    with Metrics(folder / "metrics.jsonl") as metrics, (folder / "plain.jsonl").open("w") as plain:

        def write_and_flush(row: dict[str, Any]) -> None:
            plain.write(json.dumps(row) + "\n")
            plain.flush()

        tasks = {"Metrics.log": metrics.log, "write and flush": write_and_flush, "Tracker.log": tracker.log}
        for step in range(count):
            for name, call in tasks.items():
                began = time.perf_counter()
                call({"step": step, **row})
                seconds[name].append(time.perf_counter() - began)
            time.sleep(0.002)
    tracker.close(timeout=1)
    return seconds


def table(seconds: dict[str, list[float]], unit: float, name: str) -> None:
    print(f"{'':<18}{'count':>8}{f'median {name}':>12}{'90 %':>9}{'99 %':>9}{'largest':>10}{'ratio':>8}")
    first = statistics.median(next(iter(seconds.values())))
    for what, values in seconds.items():
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        row = [statistics.median(values), cuts[89], cuts[98], max(values)]
        cells = "".join(f"{value * unit:>{width}.1f}" for value, width in zip(row, (12, 9, 9, 10), strict=True))
        print(f"{what:<18}{len(values):>8}{cells}{row[0] / first:>8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase-s", type=float, default=6.0, help="seconds of each phase at least (default 6)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracking_") as name:
        print(f"load {os.getloadavg()[0]:.1f}\n\na step while the server …")
        table(run_beside_server(Path(name), arguments.phase_s, arguments.rounds), 1e3, "ms")
        print("\na call")
        table(calls(Path(name) / "calls", arguments.calls), 1e6, "us")


if __name__ == "__main__":
    main()
