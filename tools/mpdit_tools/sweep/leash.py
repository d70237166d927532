"""Become a command that ends with whoever asked for it: python leash.py PARENT_PID COMMAND [ARGUMENT ...]

A sweep that is killed outright can't end its trials, and a trial that trains on would be run a second time beside
itself. Linux sends SIGTERM when the parent dies, and keeps the promise over exec; elsewhere the command just runs.
Imports nothing of mpdit, so that it costs no time.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # gone before the promise was made
            sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
