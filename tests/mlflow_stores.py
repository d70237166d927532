"""Places for MLflow runs, for tests: a good one (sqlite) and servers that are dead, mute or failing."""

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def files_with(secret: str, folder: Path) -> list[Path]:
    """Files under `folder` that hold `secret`."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
