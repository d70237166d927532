"""The output folder: built under another name, put in place in one step, never half there."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpdit.data.shards import manifest_sha256
from mpdit.errors import InputError

LOCK = ".lock"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a finished build in ``out``, of any version; None when there is none or it is not one of ours."""
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(manifest, dict) and str(manifest.get("format")).startswith("mpdit-shards/")
    return manifest if ours else None


def damage(out: Path, manifest: dict[str, Any]) -> str:
    """What is wrong with the files the manifest lists, as a phrase; empty when all are there with the right size.

    Tars are compared by size, the small files (manifest, indices, tables and tokenizer) by hash.
    """
    if manifest.get("manifest_sha256") != manifest_sha256(manifest):
        return "manifest.json is damaged"
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if _size(out / shard["tar"]) != shard["bytes"]:
                return f"{shard['tar']} is missing or has another size"
            for name in ("index", "table"):
                if _sha256(out / shard[name]) != shard[f"{name}_sha256"]:
                    return f"{shard[name]} is missing or damaged"
    tokenizer = manifest["tokenizer"]
    if _sha256(out / tokenizer["file"]) != tokenizer["sha256"]:
        return f"{tokenizer['file']} is missing or damaged"
    return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Raises InputError unless ``out`` is free, empty, or holds shards that the user wants replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise InputError(f"--out {out}: a file of that name is in the way; name a folder that is not there yet.")
    if not any(out.iterdir()):
        return
    if read_manifest(out) is None:
        raise InputError(f"--out {out}: the folder holds other files and will not be replaced; name another folder.")
    if not overwrite:
        raise InputError(
            f"--out {out}: holds shards of another build (other arguments or inputs); name another folder, or pass "
            "--overwrite to replace it."
        )


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to build in; renamed to ``out`` when the block ends well, removed when it does not.

    What a killed build left behind is removed first. Raises InputError when another build to ``out`` is running.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
        _remove_stale(out, partial)
        partial.mkdir()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written to ({error.strerror}); name a folder that can.") from error
    lock = (partial / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        _put_in_place(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise InputError(
                f"--out {out}: writing failed ({error.strerror}) and nothing was left behind; make room, or name a "
                "folder on another disk."
            ) from error
        raise
    finally:
        lock.close()


def _remove_stale(out: Path, partial: Path) -> None:
    for old in sorted(out.parent.iterdir()):
        if not old.name.startswith(f"{out.name}.partial-") or not old.is_dir():
            continue
        # The lock goes with the process that held it, however it ended.
        if old != partial and (old / LOCK).is_file() and _is_locked(old / LOCK):
            raise InputError(f"--out {out}: another build is writing to it at the moment ({old.name}).")
        shutil.rmtree(old)


def _is_locked(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _put_in_place(partial: Path, out: Path) -> None:
    old = out.with_name(f"{out.name}.partial-old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    # Locked until it has its name, lest another build takes it for a stale one.
    (out / LOCK).unlink()
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    shutil.rmtree(old, ignore_errors=True)
