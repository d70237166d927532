"""The checkpoints of a run as folders: which there are, which are whole, which are kept. Standard library alone: the
process that writes them (disk.py) needs no more.

A checkpoint holds sharded tensors, ``state.json`` and, written last, ``manifest.json`` with the size and SHA-256 of
every file and of itself: without it a checkpoint is partial, with a file that disagrees it is damaged.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from mpdit.errors import InputError

FORMAT = "mpdit-checkpoint/3"
_READS = ("mpdit-checkpoint/2", FORMAT)  # 2 has no manifest hash and says neither who wrote it nor what was skipped
MANIFEST, STATE = "manifest.json", "state.json"


def folder_of(run_dir: Path, place: str = "checkpoints") -> Path:
    """`place`: checkpoints, or ema for the snapshots of averages, which are folders of the same kind."""
    return run_dir / place


def steps(run_dir: Path, place: str = "checkpoints") -> list[tuple[int, Path]]:
    """(step, folder) of every renamed checkpoint, newest first; what it holds is not looked at."""
    found = []
    for path in folder_of(run_dir, place).glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdecimal() and path.is_dir():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def unfinished(run_dir: Path, place: str = "checkpoints") -> list[Path]:
    """Folders that a save left behind."""
    return sorted(folder_of(run_dir, place).glob("step_*.partial*"))


# ---- is it whole? ----------------------------------------------------------------------------------------------------


def manifest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a manifest of name -> {"bytes", "sha256"}, in its one form: no byte of it can change unseen."""
    content = {"format": FORMAT, "files": {name: dict(files[name]) for name in sorted(files)}}
    return _text({"sha256": hashlib.sha256(_text(content).encode()).hexdigest(), **content})


def _text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def files_of(path: Path) -> dict[str, dict[str, Any]]:
    """name -> {"bytes", "sha256"}, as the manifest has it. Raises InputError for a partial or damaged checkpoint."""
    if not path.is_dir():
        raise InputError(f"{path}: there is no such checkpoint folder; it should be RUN/checkpoints/step_N.")
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{path}: is incomplete, it has no {MANIFEST} (the run was stopped while writing it).")
    found = read_json(file)
    files = found.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise InputError(f"{file}: is damaged, it lists no files; use another checkpoint.")
    if found.get("format") == FORMAT or "sha256" in found:
        content = {key: value for key, value in found.items() if key != "sha256"}
        whole = hashlib.sha256(_text(content).encode()).hexdigest() == found.get("sha256")
        if not whole or _text(found).encode() != file.read_bytes():
            raise InputError(f"{file}: is damaged (it is not what its own SHA-256 says); use another checkpoint.")
    for name, expected in files.items():
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise InputError(f"{file}: names {name}, which lies outside the checkpoint; use another one.")
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            raise InputError(f"{file}: is damaged, it lacks a hash for {name}; use another checkpoint.")
    return files


def problems(path: Path, share: tuple[int, int] = (0, 1), *, read: bool = True) -> list[str]:
    """What is wrong with each file of a checkpoint, a sentence each, against its manifest.

    `share`, (i, n): the i-th of n parts of the files alone, by size. `read` False: presence and size alone.
    Raises InputError for a partial checkpoint and for a damaged manifest.
    """
    expected = files_of(path)
    mine = sorted(expected, key=lambda name: (-_size(expected[name]), name))[share[0] :: share[1]]
    found, whole = [], []
    for name in mine:
        file = path / name
        try:
            size = file.stat().st_size if file.is_file() else None
        except OSError as error:
            found.append(_unread(file, error.strerror))
            continue
        if size is None:
            found.append(f"{file}: is missing, so the checkpoint is incomplete; use another one.")
        elif size != expected[name]["bytes"]:
            found.append(
                f"{file}: is damaged (it has {size} bytes, the manifest says {expected[name]['bytes']}); use another "
                "checkpoint."
            )
        else:
            whole.append(name)
    if read:
        for file, sha256 in _sha256s(path / name for name in whole).items():
            if sha256.startswith("!"):
                found.append(_unread(file, sha256[1:]))
            elif sha256 != expected[str(file.relative_to(path))]["sha256"]:
                found.append(f"{file}: is damaged (its SHA-256 is not the manifest's); use another checkpoint.")
    return found


def _size(expected: Mapping[str, Any]) -> int:
    return expected["bytes"] if isinstance(expected["bytes"], int) else 0


_UNREAD = "can't be read"


def _unread(file: Path, why: object) -> str:
    return (
        f"{file}: {_UNREAD} ({why}); mend the storage and start again, or remove the checkpoint to go on from the one "
        "before."
    )


class Unreadable(InputError):
    """Of a checkpoint that may be whole: its storage does not answer. It is not passed over, as a later save would then
    remove it for good."""


def _sha256s(files: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 in hex by file, or ! and why not; several at a time, since hashing lets other threads run."""

    def sha256(path: Path) -> str:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"!{error.strerror}"

    files = list(files)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(files, pool.map(sha256, files), strict=True))


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Compare every file, or a share of them, with the manifest. Raises InputError for a partial or damaged one,
    Unreadable where the storage fails."""
    try:
        found = problems(path, share)
    except OSError as error:
        raise Unreadable(_unread(path, error.strerror)) from error
    for sentence in found:
        if _UNREAD in sentence:
            raise Unreadable(sentence)
    if found:
        raise InputError(found[0])


def newest(
    run_dir: Path,
    warn: Callable[[str], None],
    check: Callable[[Path], None] = verify,
    candidates: list[Path] | None = None,
) -> Path | None:
    """The newest checkpoint that is complete and undamaged; None if the run has none at all.

    Damaged ones are named to `warn` and passed over. Raises InputError if there are checkpoints, but none is good, and
    Unreadable at the first that can't be looked at.
    """
    broken = None
    for path in [path for _, path in steps(run_dir)] if candidates is None else candidates:
        try:
            check(path)
            return path
        except Unreadable:
            raise
        except InputError as error:
            broken = error
            warn(f"{error} The one before it is used.")
    if broken is not None:
        raise InputError(f"{folder_of(run_dir)}: holds no complete checkpoint; the last one tried: {broken}")
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Raises InputError for a file that is no JSON object, Unreadable where the storage fails."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: is missing; use another checkpoint.") from error
    except OSError as error:
        raise Unreadable(_unread(path, error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read ({error}); use another checkpoint.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; use another checkpoint.")
    return value


def state(path: Path) -> dict[str, Any]:
    """What state.json says of a verified checkpoint. Raises InputError for a format that this version does not read."""
    found = read_json(path / STATE)
    written = found.get("format")
    if written not in _READS:
        later = isinstance(written, str) and written.rpartition("/")[2].isdecimal() and written > FORMAT
        why = "a later mpdit wrote it, use that" if later else "use a run of this version"
        raise InputError(f"{path}: has format {written!r}, this version reads {' and '.join(_READS)}; {why}.")
    return found


# ---- looking at them -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A checkpoint as ``mpdit checkpoint list`` has it; what can't be told of it is None."""

    path: str
    step: int | None
    status: str  # complete, damaged or partial; sizes are compared, contents are not read
    problem: str | None
    bytes: int
    age_s: float
    format: str | None
    ranks: int | None
    layout: dict[str, Any] | None


def entry(path: Path, now: float) -> Entry:
    """What a look at the folder tells. `now`: seconds since the epoch."""
    files = [file for file in path.rglob("*") if file.is_file()]
    step, found = path.name.removeprefix("step_").partition(".")[0], []
    try:
        found = problems(path, read=False)
        status = "damaged" if found else "complete"
    except InputError as error:
        found, status = [str(error)], "damaged" if (path / MANIFEST).is_file() else "partial"
    try:
        said = read_json(path / STATE)
    except InputError:
        said = {}
    written = said.get("written") if isinstance(said.get("written"), dict) else {}
    return Entry(
        path=str(path),
        step=int(step) if step.isdecimal() else None,
        status=status if ".partial" not in path.name else "partial",
        problem=found[0] if found else None,
        bytes=sum(file.stat().st_size for file in files),
        age_s=round(max(0.0, now - max((f.stat().st_mtime for f in files), default=path.stat().st_mtime)), 1),
        format=said.get("format"),
        ranks=(written or {}).get("ranks"),
        layout=(written or {}).get("layout"),
    )


# ---- changing them: called by the process that writes ----------------------------------------------------------------


def complete(folder: Path, final: Path, text: str) -> None:
    """Mark `folder` complete with its manifest's `text` and give it its name. Raises OSError."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        sync_file(file)
    sync(folder)
    old = final.with_name(f"{folder.name}.old")
    if final.exists():
        final.rename(old)
    folder.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(
    run_dir: Path,
    step: int,
    keep_last: int,
    keep_every: int,
    tick: Callable[[], None] = lambda: None,
    place: str = "checkpoints",
) -> list[str]:
    """Remove what is not to be kept now that `step` is complete; what could not be removed, a sentence each.

    Those of later steps go as well: they were damaged, or the run would not have gone on from before them. `tick` is
    called at every file.
    """
    found = steps(run_dir, place)
    old = [(at, path) for at, path in found if at <= step]
    gone = [(at, path) for at, path in found if at > step]
    if keep_last:
        gone += [(at, path) for at, path in old[keep_last:] if not (keep_every and at % keep_every == 0)]
    left = []
    for _, path in gone:
        try:
            (path / MANIFEST).unlink(missing_ok=True)  # first: half removed, it is partial and not damaged
            for file in path.iterdir():
                file.unlink()
                tick()
            path.rmdir()
        except OSError as error:
            left.append(f"{path} could not be removed ({error.strerror})")
    return left


def hashed(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> {"bytes", "sha256"} of every file in a folder, for its manifest. Raises OSError."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    hashes = _sha256s(files)
    unread = [f"{path}: {sha256[1:]}" for path, sha256 in hashes.items() if sha256.startswith("!")]
    if unread:
        raise OSError(unread[0])
    return {path.name: {"bytes": path.stat().st_size, "sha256": hashes[path]} for path in files}


def sync_file(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
