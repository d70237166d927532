"""This rank's end of the process that writes checkpoints (disk.py): jobs go in, answers come when they come."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mpdit


class Writer:
    """Started once and kept; `fd` is the image it reads. One job at a time is waited for."""

    def __init__(self, fd: int) -> None:
        source = str(Path(mpdit.__file__).parents[1])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        # An exec of an interpreter that loads no packages: 30 ms, and none of the rank's threads, locks or devices.
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-m", "mpdit.train.disk", str(fd), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._job, self._text = 0, b""
        self.ended = False
        self.heard = time.monotonic()  # when it last gave a sign of life

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, do: str, **arguments: Any) -> None:
        self._job += 1
        self.heard = time.monotonic()
        self._send({"job": self._job, "do": do, **arguments})

    def hurry(self) -> None:
        """Somebody waits: the job under way takes no rests any more."""
        self._send({"do": "hurry"})

    def _send(self, line: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # poll says that it has ended
            self._in.write(json.dumps(line).encode() + b"\n")
            self._in.flush()

    def poll(self) -> dict[str, Any] | None:
        """{"result": ...} or {"error": why} of the job submitted last, None while it is at work; never waits."""
        while not self.ended:
            try:
                data = os.read(self._out.fileno(), 2**16)
            except BlockingIOError:
                break
            self.ended, self._text, self.heard = not data, self._text + data, time.monotonic()
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if answer.get("job") == self._job:
                return dict(answer)
        if self.ended:
            return {"error": f"the process that writes it has ended (exit code {self._process.wait()})"}
        return None

    def kill(self) -> None:
        """On storage that hangs it may not even die: it is left behind, with a folder that no other try uses."""
        self._process.kill()
        self.ended = True

    def close(self) -> None:
        """Let it finish what it has been given, but not for ever."""
        self.hurry()
        with contextlib.suppress(OSError):
            self._in.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0 if self.ended else 5.0)
        self._process.kill()
        self._out.close()
