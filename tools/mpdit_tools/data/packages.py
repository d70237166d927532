"""Packages out of registries: fetched by the tool a machine has for it, pinned by hash, kept in a folder."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mpdit.errors import InputError

TIMEOUT = 600  # seconds for one package


def default_cache(kind: str) -> Path:
    """``$XDG_CACHE_HOME/mpdit/KIND``, by default ``~/.cache/mpdit/KIND``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mpdit" / kind


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetched(path: Path, sha256: str, spec: str, command: Sequence[str], install: str) -> Path:
    """`path`, which is in the cache or is what `command` leaves in the folder it is run in; no script of it is run.

    `spec`: the package and its version; `install`: how to get the command. Raises InputError when the command is
    missing or fails, or when what it brings is not the file with the hash `sha256`.
    """
    if path.is_file() and sha256_of(path) == sha256:
        return path
    by_hand = f"or put {path.name} into {path.parent} yourself"
    tool = shutil.which(command[0])
    if tool is None:
        raise InputError(f"{command[0]} is not installed, and {spec} is fetched with it: {install}, {by_hand}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            brought = _run([tool, *command[1:]], Path(folder), spec, by_hand)
            found = sha256_of(brought)
            if found != sha256:
                raise InputError(
                    f"{spec}: {command[0]} brought a file with sha256 {found}, the pinned one has {sha256}; nothing of "
                    f"it was used. Check the registry that {command[0]} is set up with."
                )
            brought.replace(path)
    except OSError as error:
        raise InputError(
            f"--cache {path.parent}: cannot be written to ({error.strerror}); name another folder."
        ) from error
    return path


def _run(command: list[str], folder: Path, spec: str, by_hand: str) -> Path:
    """The one file that the command left in `folder`."""
    name = " ".join([Path(command[0]).name, command[1]])
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{name} {spec} took more than {TIMEOUT} s: check the network, {by_hand}.") from error
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode != 0 or len(files) != 1:
        told = " ".join((done.stderr or done.stdout).split())[-300:] or "it said nothing"
        raise InputError(
            f"{name} {spec} failed with exit code {done.returncode} ({told}): check the network, {by_hand}."
        )
    return files[0]
