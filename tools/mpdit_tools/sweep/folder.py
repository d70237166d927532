"""The folder of a sweep: spec.yaml, proxy.yaml, optuna.db, trials/0007/; made whole, and gone on in."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mpdit import config as configs
from mpdit.errors import InputError
from mpdit_tools.new_folder import new_folder
from mpdit_tools.sweep import space, spec
from mpdit_tools.sweep.space import Factors, Range
from mpdit_tools.sweep.spec import Spec

SPEC, PROXY, TRIALS = "spec.yaml", "proxy.yaml", "trials"


def open_spec(folder: Path) -> Spec:
    """The spec of an existing sweep. Raises InputError if `folder` holds none."""
    if not _is_sweep(folder):
        raise InputError(f"{folder} holds no sweep: it has no {SPEC} and {TRIALS}/; give one that `mpdit sweep` wrote.")
    return spec.load(folder / SPEC)


def _is_sweep(folder: Path) -> bool:
    """A spec alone may be the user's own."""
    return (folder / SPEC).is_file() and (folder / TRIALS).is_dir()


def enter(folder: Path, given: Spec) -> None:
    """Make the folder, or go on in it. Raises InputError if it holds another sweep or something else."""
    if _is_sweep(folder):
        spec.same(open_spec(folder), given, folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder} holds something else than a sweep; give a folder that is new or empty.")
    else:
        _make(folder, given)
    # What may change between two starts is that of the last one.
    write(folder / SPEC, lambda path: path.write_text(spec.dump(given), encoding="utf-8"))
    write(folder / PROXY, lambda path: path.write_text(configs.dump(given.proxy), encoding="utf-8"))


def _make(folder: Path, given: Spec) -> None:
    """Of two commands started at once one comes first."""
    try:
        with new_folder(folder) as made:
            (made / TRIALS).mkdir()
            (made / SPEC).write_text(spec.dump(given), encoding="utf-8")
    except InputError:
        if not _is_sweep(folder):
            raise
        spec.same(open_spec(folder), given, folder)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """For one process at a time; the lock goes with the process that holds it, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path: Path, make: Callable[[Path], object]) -> Path:
    """Let `make` write a file beside `path`, then put it there: readers see the old one or the new one."""
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    make(beside)
    beside.replace(path)
    return path


# ---- can it be trained at all? ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What was found on the way: the fingerprint of the training data, and the FLOPs of an image, forward and backward
    (None where the search changes them: of models, or of REPA that is on or off)."""

    data: str
    flops_per_image: int | None


def check(given: Spec) -> Checked:
    """Training's own checks of the proxy and of each axis' ends.

    Raises InputError. A forked child does it: a process that lives for days need not hold torch or a GPU.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as child:
        return child.submit(_check, given).result()


def _check(given: Spec) -> Checked:
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.data.mixture import Mixture
    from mpdit.train import preflight

    try:
        preflight.check(given.proxy, given.ranks)
    except InputError as error:
        raise InputError(f"the proxy can't be trained: {error}") from error
    for axis in given.axes:
        if isinstance(axis, Factors):
            values = [space.scaled(space.of(given.proxy, axis.key), factor) for factor in axis.factors]
        else:
            values = [axis.low, axis.high] if isinstance(axis, Range) else list(axis.values)
        # Data are read once: only what concerns them or a teacher is checked with them again.
        checked = preflight.check if axis.key.startswith(("data.", "objective.")) else preflight.without_data
        for value in values:
            try:
                checked(space.filled(given.proxy, {axis.key: value}, "search"), given.ranks)
            except InputError as error:
                raise InputError(f"search: {axis.key} {space.number(value)} can't be trained: {error}") from error
    return Checked(data=Mixture.open(given.proxy.data, "train").fingerprint, flops_per_image=_flops(given))


def _flops(given: Spec) -> int | None:
    from mpdit_tools.mup_table import with_vocabulary
    from mpdit_tools.plan.resolve import flops_per_image

    working = [a for a in given.axes if a.key.startswith(("model.", "objective.")) and not isinstance(a, Factors)]
    low = {axis.key: axis.low if isinstance(axis, Range) else axis.values[0] for axis in working}
    high = {axis.key: axis.high if isinstance(axis, Range) else axis.values[-1] for axis in working}
    ends = [space.filled(given.proxy, values, "search") for values in ([low, high] if working else [{}])]
    found = {flops_per_image(with_vocabulary(proxy)[0]) for proxy in ends}
    return found.pop() if len(found) == 1 else None
