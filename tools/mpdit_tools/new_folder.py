"""A folder that is there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mpdit.errors import InputError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which becomes `out` (not there yet, or empty) when all went well and is gone if not.

    Raises InputError if it can't be written.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    make(partial, out)
    with becoming(partial, out):
        yield partial
        partial.rename(out)


def make(partial: Path, out: Path) -> None:
    """The folder that is to become `out`, before anything that takes long. Raises InputError if it can't be made."""
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(out, error) from error


@contextlib.contextmanager
def becoming(partial: Path, out: Path) -> Iterator[None]:
    """While the caller fills `partial` and renames it to `out`; it is gone if that fails.

    Raises InputError if it can't be written.
    """
    try:
        yield
    except OSError as error:
        if error.filename and not _within(error.filename, partial, out):
            raise InputError(f"{error.filename}: {error.strerror}; mend the storage, then start again.") from error
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _within(file: str, *folders: Path) -> bool:
    return any(Path(file).absolute().is_relative_to(folder.absolute()) for folder in folders)


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"--out {out}: can't be written to ({error.strerror or error}); name another folder.")
