"""Checkpoints: ``checkpoints/step_N/``, written beside and renamed when whole, loadable into any layout.

A folder holds the sharded tensors (fp32 weights, moments, EMA in model space), ``state.json`` (step, position in the
data, model) and, written last, ``manifest.json`` with the size and SHA-256 of every file: without it a checkpoint is
incomplete, with a file that disagrees it is damaged.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mpdit.config import Config, to_dict
from mpdit.data.text import Tokenizer
from mpdit.errors import InputError
from mpdit.models import repa
from mpdit.parallel import groups, optimizer, sharded
from mpdit.train.session import Network, Session

FORMAT = "mpdit-checkpoint/2"
_MANIFEST, _STATE = "manifest.json", "state.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands: steps done, the plan that turns the step into samples, the tokenizer's hash; `skipped`: how
    many of the steps are not in the weights, since they were skipped or rolled back."""

    step: int
    plan_hash: str
    tokenizer_sha256: str
    skipped: int = 0


def folder_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(session: Session, config: Config, position: Position, run_dir: Path) -> Path:
    """Write ``checkpoints/step_N``, atomically; collective. Older ones beyond ``train.keep_last`` are removed."""
    final = folder_of(run_dir) / f"step_{position.step}"
    partial = final.with_name(final.name + ".partial")
    if groups.rank() == 0:
        for stale in folder_of(run_dir).glob("step_*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    groups.barrier()
    with session.settled():
        sharded.save(_tensors(session), partial)
    groups.barrier()
    if groups.rank() == 0:
        state = {"format": FORMAT, **dataclasses.asdict(position), **_network(config)}
        _write_json(partial / _STATE, state)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        hashes = _sha256s(files)
        manifest = {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": hashes[p]} for p in files}
        _write_json(partial / _MANIFEST, {"format": FORMAT, "files": manifest})
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync(final.parent)
        _prune(run_dir, config.train.keep_last)
    groups.barrier()
    return final


def _network(config: Config) -> dict[str, Any]:
    """What makes it another network: the model, the part of its muP that acts in the forward pass, what it predicts,
    REPA's projector."""
    mup = to_dict(config.mup)
    forward = ("parametrization", "base_width", "base_depth", "base_head_dim", "output_mult")
    objective: dict[str, str] = {"kind": config.objective.kind}
    if config.objective.repa_weight:  # how heavy it weighs may change, what it aligns with what may not
        teacher = Path(config.objective.repa_teacher).name
        objective["repa"] = f"after block {repa.block_index(config) + 1}, teacher {teacher}"
    return {"model": to_dict(config.model), "mup": {key: mup[key] for key in forward}, "objective": objective}


def _tensors(session: Session) -> dict[str, Any]:
    tensors = {}
    for name, parameter, state in optimizer.whole_state(session.network.ctx, session.network.chunks, session.optimizer):
        for kind, value in (*state.items(), ("ema", session.ema.values[name])):
            tensors[f"{kind}.{name}"] = sharded.tensor(f"{kind}.{name}", value, parameter)
    return tensors


def _prune(run_dir: Path, keep_last: int) -> None:
    if keep_last:
        for _, path in steps(run_dir)[keep_last:]:
            shutil.rmtree(path)


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256s(files: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 in hex by file; several at a time, since hashing lets other threads run."""

    def sha256(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = list(files)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(files, pool.map(sha256, files), strict=True))


# ---- finding and reading ---------------------------------------------------------------------------------------------


def steps(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every renamed checkpoint, newest first; what it holds is not looked at."""
    found = []
    for path in folder_of(run_dir).glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdecimal() and path.is_dir():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def newest(run_dir: Path, warn: Callable[[str], None], before: float = math.inf) -> Path | None:
    """The newest checkpoint, of a step below `before`, that is complete and undamaged; None if the run has none at all.

    Damaged ones are named to `warn` and passed over. Raises InputError if there are checkpoints, but none is good.
    """
    broken = None
    for step, path in steps(run_dir):
        if step >= before:
            continue
        try:
            verify(path)
            return path
        except InputError as error:
            broken = error
            warn(f"{error} The one before it is used.")
    if broken is not None:
        raise InputError(f"{folder_of(run_dir)}: holds no complete checkpoint; the last one tried: {broken}")
    return None


def verify(path: Path) -> None:
    """Compare every file with the manifest. Raises InputError for an incomplete or damaged checkpoint."""
    if not path.is_dir():
        raise InputError(f"{path}: there is no such checkpoint folder; it should be RUN/checkpoints/step_N.")
    if not (path / _MANIFEST).is_file():
        raise InputError(f"{path}: is incomplete, it has no {_MANIFEST} (the run was stopped while writing it).")
    files = _read_json(path / _MANIFEST).get("files")
    if not isinstance(files, dict) or _STATE not in files:
        raise InputError(f"{path / _MANIFEST}: is damaged, it lists no files; use another checkpoint.")
    for name, expected in files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path / _MANIFEST}: names {name}, which lies outside the checkpoint; use another one.")
        if not file.is_file():
            raise InputError(f"{file}: is missing, so the checkpoint is incomplete; use another one.")
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            raise InputError(f"{path / _MANIFEST}: is damaged, it lacks a hash for {name}; use another checkpoint.")
    for file, sha256 in _sha256s(path / name for name in files).items():
        if files[str(file.relative_to(path))] != {"bytes": file.stat().st_size, "sha256": sha256}:
            raise InputError(f"{file}: is damaged (its size or SHA-256 is not the manifest's); use another checkpoint.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}); use another checkpoint.") from error
    return value if isinstance(value, dict) else {}


def position(path: Path, config: Config) -> Position:
    """Where a verified checkpoint stands. Raises InputError if it is of another model or format."""
    state = _read_json(path / _STATE)
    if state.get("format") != FORMAT:
        raise InputError(f"{path}: has format {state.get('format')!r}, this version reads {FORMAT!r}.")
    for section, mine in _network(config).items():
        theirs = state.get(section, {})
        for key in sorted((mine.keys() | theirs.keys()) - {"preset"}):
            if mine.get(key) != theirs.get(key):
                raise InputError(
                    f"{path}: is of another model, with {section}.{key} {theirs.get(key)!r} where the config has "
                    f"{mine.get(key)!r}; set it back, or give another run.dir."
                )
    known = {field.name for field in dataclasses.fields(Position)}
    return Position(**{key: value for key, value in state.items() if key in known})


def same_tokenizer(path: Path, at: Position, tokenizer: Tokenizer) -> None:
    """Raises InputError if the data set's tokens or labels are not those that the run was trained with."""
    if tokenizer.sha256 != at.tokenizer_sha256:
        raise InputError(
            f"{path}: was trained with a text model of SHA-256 {at.tokenizer_sha256[:16]}…, but that of "
            f"data.path has {tokenizer.sha256[:16]}…; give the data set that the run was trained on."
        )


def load(session: Session, path: Path, step: int, skipped: int = 0) -> None:
    """Put a verified checkpoint into a session of any layout; collective. Adam has then taken `step` - `skipped` steps,
    the schedule stands at `step`."""
    kinds = ("param", "exp_avg", "exp_avg_sq", "ema")
    loaded = _read(session.network, path, kinds)
    with session.settled():
        optimizer.restore(session.network.chunks, session.optimizer, loaded, step - skipped)
    for name, value in session.ema.values.items():
        value.copy_(loaded[name]["ema"])
    session.scheduler.num_steps = 0
    session.scheduler.step(step)


def load_weights(network: Network, path: Path, *, ema: bool) -> None:
    """Put the weights, or their average, of a verified checkpoint into bare stages of any layout; collective."""
    kind = "ema" if ema else "param"
    loaded = _read(network, path, (kind,))
    for chunk in network.chunks:
        for name, parameter in chunk.named_parameters():
            parameter.data.copy_(loaded[name][kind])


def _read(network: Network, path: Path, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """name -> kind -> tensor, fp32, in this layout's shapes."""
    modules = [getattr(chunk, "module", chunk) if hasattr(chunk, "ddp_config") else chunk for chunk in network.chunks]
    named = {name: p for module in modules for name, p in module.named_parameters()}
    wanted = {
        f"{kind}.{name}": sharded.tensor(f"{kind}.{name}", torch.empty(p.shape, dtype=torch.float32), p)
        for name, p in named.items()
        for kind in kinds
    }
    flat = sharded.load(wanted, path)
    return {name: {kind: flat[f"{kind}.{name}"] for kind in kinds} for name in named}
