"""The average of another width, out of a run's snapshots: a mixture of them, tensor by tensor."""

import contextlib
import dataclasses
import json
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpdit.errors import CheckFailed, InputError
from mpdit.parallel import packed, sharded
from mpdit.parallel.packed import Chunk, Place
from mpdit.train import checkpoint, checkpoints, profiles, snapshots
from mpdit.train.profiles import Mixture, Profile
from mpdit_tools import new_folder
from mpdit_tools.checkpoint.reshard import Files

# ---- which averages there are ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A verified folder; `widths` of the averages in it."""

    step: int
    updates: int
    widths: tuple[float, ...]
    folder: Path


def find(run_dir: Path) -> list[Snapshot]:
    """All good snapshots, oldest first. Raises InputError if there is none, or one is damaged."""
    found = []
    for step, folder in sorted(_folders(run_dir)):
        checkpoints.verify(folder)
        state = checkpoints.state(folder)
        widths = tuple(float(width) for width in state.get("posthoc_ema", []))
        found.append(Snapshot(step=step, updates=step - state.get("skipped", 0), widths=widths, folder=folder))
    return found


def _folders(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each. Raises InputError if there is none."""
    found = checkpoints.steps(run_dir, snapshots.PLACE)
    if not found:
        raise InputError(f"{run_dir / snapshots.PLACE}: has no snapshots; train with train.posthoc_ema=[0.05,0.1].")
    return found


def wanted(found: list[Snapshot], sigma_rel: float, step: int | None) -> Profile:
    """The profile asked for. Steps that were skipped before `step` are those of the snapshot before it."""
    last = found[-1]
    step = last.step if step is None else step
    if not 0 < step <= last.step:
        raise InputError(f"--step {step}: should be between 1 and {last.step}, the step of the last snapshot.")
    before = [snapshot for snapshot in found if snapshot.step <= step]
    skipped = before[-1].step - before[-1].updates if before else 0
    return Profile(width=sigma_rel, updates=step - skipped)


# ---- making another --------------------------------------------------------------------------------------------------


def make(run_dir: Path, sigma_rel: float, step: int | None, out: Path | None, max_error: float) -> dict[str, Any]:
    """Write the average as a folder like a checkpoint's, with the weights alone; what was made.

    Raises InputError as :func:`find`, or for an `out` that is there or can't be written; CheckFailed above `max_error`.
    """
    last, _ = max(_folders(run_dir))
    out = out or run_dir / snapshots.PLACE / f"sigma_{sigma_rel:g}-step_{last if step is None else step}"
    if out.exists():
        raise InputError(f"--out {out}: is there already; name a folder that is not.")
    partial = out.absolute().with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    new_folder.make(partial, out)
    with new_folder.becoming(partial, out):
        return _made(run_dir, sigma_rel, step, partial, out, max_error)


def _made(
    run_dir: Path, sigma_rel: float, step: int | None, partial: Path, out: Path, max_error: float
) -> dict[str, Any]:
    found = find(run_dir)
    profile = wanted(found, sigma_rel, step)
    step = found[-1].step if step is None else step
    given = [(snapshot, width) for snapshot in found for width in snapshot.widths]
    mixed = profiles.mixture([Profile(width=width, updates=one.updates) for one, width in given], profile)
    if mixed.error > max_error:
        raise CheckFailed(
            f"{run_dir}: its {len(found)} snapshots make sigma_rel {sigma_rel:g} after step {step} only within "
            f"{mixed.error:.2g}, more than --max-error {max_error:g}; a width between those of train.posthoc_ema, or "
            "more snapshots (train.posthoc_every), come nearer."
        )
    places = _write(given, mixed, partial)
    state = checkpoints.state(found[-1].folder)
    about = {"sigma_rel": sigma_rel, "updates": profile.updates, "error": mixed.error}
    state |= {"step": step, "skipped": step - profile.updates, "posthoc_ema": [], "average": about}
    texts = packed.index_files(places) | {checkpoints.STATE: (json.dumps(state, indent=1) + "\n").encode()}
    for name, content in texts.items():
        (partial / name).write_bytes(content)
    checkpoints.complete(partial, out.absolute(), checkpoints.manifest(checkpoints.hashed(partial)))
    return {"out": str(out), "sigma_rel": sigma_rel, "step": step, "averages": len(given), "error": mixed.error}


def _write(given: list[tuple[Snapshot, float]], mixed: Mixture, folder: Path) -> list[Place]:
    """The mixture of every parameter; one tensor in memory at once, added up in double precision."""
    stored = {snapshot.folder: sharded.Stored(snapshot.folder) for snapshot, _ in given}
    parts = [(stored[one.folder], checkpoint.average_kind(width)) for one, width in given]
    first, kind = parts[0]
    names = [key.removeprefix(f"{kind}.") for key in first.shapes if key.startswith(f"{kind}.")]
    with contextlib.closing(Files(folder, 0)) as files:
        for name in names:
            value = _mixed(parts, mixed, name)
            shape = tuple(value.shape)
            files.put(Chunk(key=f"param.{name}", whole=shape, offset=(0,) * len(shape), shape=shape), value)
    return files.places


def _mixed(parts: list[tuple[sharded.Stored, str]], mixed: Mixture, name: str) -> Tensor:
    total: Tensor | None = None
    for (stored, kind), coefficient in zip(parts, mixed.coefficients, strict=True):
        key = f"{kind}.{name}"
        if key not in stored.shapes:
            raise InputError(f"{stored.folder}: has no {key}; it is a snapshot of another model.")
        value = stored.read(key)
        if total is None:
            total = torch.zeros(value.shape, dtype=torch.float64)
        total.add_(value, alpha=coefficient)
    assert total is not None
    return total.float()
