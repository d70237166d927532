"""What a checkpoint holds of a run, put in and taken out: fp32 weights, moments and EMA in the shape of the parameters,
whatever layout, optimizer or precision wrote them, and where the run stands.

``checkpoints/step_N/`` is written beside the training (saver.py), found and verified by checkpoints.py.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mpdit
from mpdit.config import Config, to_dict
from mpdit.data.text import Tokenizer
from mpdit.errors import InputError
from mpdit.models import repa
from mpdit.parallel import backend, fp8, fp8_rules, groups, optimizer, sharded
from mpdit.train import checkpoints
from mpdit.train.session import Network, Session

KINDS = ("param", "exp_avg", "exp_avg_sq", "ema")  # of a parameter, in the order in which they are written


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands: steps done, the plan that turns the step into samples, the tokenizer's hash; `skipped`: how
    many of the steps are not in the weights, since they were skipped or rolled back."""

    step: int
    plan_hash: str
    tokenizer_sha256: str
    skipped: int = 0


# ---- what is written -------------------------------------------------------------------------------------------------


def _tensors(session: Session) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(kind, name, tensor, what lies in the layout as it does), one parameter after another; collective. The tensor is
    good until the next."""
    scales = backend.scales(session.network.ctx, session.network.chunks)
    for name, parameter, state in optimizer.whole_state(session.network.ctx, session.network.chunks, session.optimizer):
        for kind, value in (*state.items(), ("ema", session.ema.values[name])):
            yield kind, name, value, parameter
        yield from _averages(session, name, parameter)
        for kind, value in scales.get(name, {}).items():
            yield kind, name, value, value


def _averages(session: Session, name: str, parameter: nn.Parameter) -> Iterator[tuple[str, str, Tensor, nn.Parameter]]:
    power = session.ema.power
    return ((average_kind(width), name, power.whole(width, name), parameter) for width in power.widths)


def average_kind(width: float) -> str:
    """Of the power-function average of a width."""
    return f"posthoc_{width!r}"


def keyed_averages(session: Session) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
    """:func:`keyed` of the power-function averages alone: a snapshot for ``mpdit ema``."""
    for name, first in session.ema.parameters.items():
        yield from ((f"{kind}.{name}", value, p) for kind, _, value, p in _averages(session, name, first))


def keyed(session: Session) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name in a checkpoint, tensor, what lies in the layout as it does) of all that this rank holds; collective."""
    return ((f"{kind}.{name}", value, parameter) for kind, name, value, parameter in _tensors(session))


def state_text(config: Config, position: Position, ranks: int) -> str:
    """state.json: where the run stands, of what network, and who wrote it."""
    state = {"format": checkpoints.FORMAT, **dataclasses.asdict(position), **_network(config)}
    state["posthoc_ema"] = list(config.train.posthoc_ema)
    state["fp8"] = fp8_rules.remembers(config)
    return json.dumps({**state, "written": written(config, ranks)}, indent=1) + "\n"


def written(config: Config, ranks: int) -> dict[str, Any]:
    """Who wrote a checkpoint."""
    layout = {key: value for key, value in to_dict(config.parallel).items() if key in _LAYOUT}
    return {"version": mpdit.__version__, "ranks": ranks, "layout": layout}


_LAYOUT = ("tp", "sp", "pp", "vpp", "cp", "distributed_optimizer", "precision")


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


# ---- what is read ----------------------------------------------------------------------------------------------------


def newest(run_dir: Path, warn: Callable[[str], None], before: float = math.inf) -> Path | None:
    """:func:`checkpoints.newest` of a step below `before`, by all ranks together: each reads a share of the files.

    `warn` is called on rank 0. Raises InputError on every rank if there are checkpoints, but none is good, or if the
    storage of the newest fails.
    """

    def check(path: Path) -> None:
        mine: InputError | None = None
        try:
            checkpoints.verify(path, (groups.rank(), groups.world_size()))
        except InputError as error:
            mine = error
        found = groups.decided_together(mine, _worst)
        if found:
            raise found

    listed = groups.decided_by_rank_0(lambda: [path for step, path in checkpoints.steps(run_dir) if step < before])
    return checkpoints.newest(run_dir, warn if groups.rank() == 0 else lambda _: None, check, listed)


def _worst(every: list[InputError | None]) -> InputError | None:
    found = [error for error in every if error is not None]
    return next((error for error in found if isinstance(error, checkpoints.Unreadable)), found[0] if found else None)


def position(path: Path, config: Config) -> Position:
    """Where a verified checkpoint stands. Raises InputError if it is of another model or format."""
    state = checkpoints.state(path)
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


def same_averages(path: Path, config: Config) -> None:
    """Raises InputError if the config asks for power-function averages that were not kept from the run's start on."""
    had = checkpoints.state(path).get("posthoc_ema", [])
    new = [width for width in config.train.posthoc_ema if width not in had]
    if new:
        raise InputError(
            f"{path}: has no average of train.posthoc_ema {new[0]:g}, which is of the whole run, but "
            f"{', '.join(f'{width:g}' for width in had) or 'none'}; set that, or give another run.dir."
        )


def load(session: Session, path: Path, step: int, skipped: int = 0) -> None:
    """Put a verified checkpoint into a session of any layout; collective. Adam has then taken `step` - `skipped` steps,
    the schedule stands at `step`."""
    loaded = _read(session.network, path, KINDS)
    with session.settled():
        optimizer.restore(session.network.chunks, session.optimizer, loaded, step - skipped)
    for name, value in session.ema.values.items():
        value.copy_(loaded[name]["ema"])
    del loaded
    _load_scales(session.network, path)
    power = session.ema.power
    power.updates = step - skipped
    for width in power.widths:
        kind = average_kind(width)
        for name, kinds_of in _read(session.network, path, (kind,)).items():
            power.restore(width, name, kinds_of[kind])
    session.scheduler.num_steps = 0
    session.scheduler.step(step)


def load_weights(network: Network, path: Path, *, ema: bool) -> None:
    """Put the weights, or their average, of a verified checkpoint into bare stages of any layout; collective."""
    kind = "ema" if ema else "param"
    loaded = _read(network, path, (kind,))
    for chunk in network.chunks:
        for name, parameter in chunk.named_parameters():
            parameter.data.copy_(loaded[name][kind])
    _load_scales(network, path)


def note_on_scales(path: Path, config: Config) -> str:
    """What a person should know of the state of FP8 in a checkpoint that `config` goes on from; often nothing."""
    theirs, mine = _remembered(path), fp8_rules.remembers(config)
    if theirs == mine:
        return ""
    left = f"FP8's state in {path} is of {_said(theirs)} and is left out; " if theirs else ""
    return left + (f"the scales of {_said(mine)} start at 1" if mine else "none is needed here")


def _remembered(path: Path) -> dict[str, Any]:
    """How the state of FP8 in a checkpoint came about; empty where there is none, as with averages alone."""
    found: dict[str, Any] = checkpoints.state(path).get("fp8") or {}
    kept = found and any(key.startswith(f"{fp8.STATE[0]}.") for key in sharded.Stored(path).shapes)
    return found if kept else {}


def _said(remembered: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in remembered.items())


def _load_scales(network: Network, path: Path) -> None:
    """What delayed scaling remembers, where the checkpoint has it of the same recipe; else as it is at the start."""
    wanted = backend.scales(network.ctx, network.chunks)
    if not wanted or _remembered(path) != fp8_rules.remembers(network.ctx.config):
        return
    stored = sharded.Stored(path)
    kept = {  # a block that has come into FP8 since is not in it
        name: {kind: stored.read(key) for kind in kinds if (key := f"{kind}.{name}") in stored.shapes}
        for name, kinds in wanted.items()
    }
    backend.set_scales(network.ctx, network.chunks, kept)


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
