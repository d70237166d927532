"""Places for MLflow runs, for tests: a good one (sqlite) and servers that are dead, mute or failing."""

import contextlib
import http.server
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

SECRET = "open-sesame"


def store(run_dir: Path) -> Any:
    """A client for the store beside `run_dir`."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Failing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(500)
        self.end_headers()
        self.wfile.write(f"no, {SECRET}".encode())

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def server(kind: str) -> Iterator[int]:
    """The port of a server that is dead, mute (accepts and never answers) or failing (500)."""
    if kind == "failing":
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as failing:
            threading.Thread(target=failing.serve_forever, daemon=True).start()
            yield failing.server_address[1]
            failing.shutdown()
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if kind == "dead":
            listener.close()
        yield port


class RealServer:
    """`mlflow server` on loopback over sqlite, of the full mlflow package; it can hang, go on, die and come back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def missing() -> str:
        """Why there can be none; empty where it is installed."""
        try:
            importlib.metadata.version("mlflow")
        except importlib.metadata.PackageNotFoundError:
            return "mlflow's server is not installed: pip install 'mpdit[ui]'"
        return ""

    def start(self) -> None:
        """Start it, and wait until it answers."""
        store = ["--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        place = ["--artifacts-destination", str(self._folder / "artifacts"), "--host", "127.0.0.1"]
        command = [sys.executable, "-m", "mlflow", "server", *store, *place, "--workers", "1"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self._port)], stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._answers, 300)

    def quiet(self) -> bool:
        """Whether it has taken less than a fifth of a core for a second: it answers before it has loaded everything."""
        began = self._cpu_s()
        time.sleep(1)
        return self._cpu_s() - began < 0.2

    def _cpu_s(self) -> float:
        assert self._process is not None
        family = [psutil.Process(self._process.pid)]
        family += family[0].children(recursive=True)
        return sum(sum(process.cpu_times()[:2]) for process in family)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def signal(self, number: int) -> None:
        """To it and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def files_with(secret: str, folder: Path) -> list[Path]:
    """Files under `folder` that hold `secret`."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
