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
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise InputError(f"--out {out}: can't be written to ({error.strerror}); name another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
