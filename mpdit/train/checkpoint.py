"""What a checkpoint holds of a run, put in and taken out: fp32 weights, moments and EMA in the shape of the parameters,
whatever layout, optimizer or precision wrote them, and where the run stands.

``checkpoints/step_N/`` is written beside the training (saver.py), found and verified by checkpoints.py.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mpdit
from mpdit.config import Config, to_dict
from mpdit.data.text import Tokenizer
from mpdit.errors import InputError
from mpdit.models import repa
from mpdit.parallel import backend, fp8_rules, groups, optimizer, sharded
from mpdit.train import checkpoints
from mpdit.train.session import Network, Session

KINDS = ("param", "exp_avg", "exp_avg_sq", "ema")  # of a parameter, in the order in which they are written
SCALES = "fp8_scales"  # of a layer, after all parameters: plain numbers, where Transformer Engine would pickle them


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands: steps done, the plan that turns the step into samples, the tokenizer's hash; `skipped`: how
    many of the steps are not in the weights, since they were skipped or rolled back."""

    step: int
    plan_hash: str
    tokenizer_sha256: str
    skipped: int = 0


# ---- what is written -------------------------------------------------------------------------------------------------


def _tensors(session: Session) -> Iterator[tuple[str, str, Tensor, nn.Parameter]]:
    """(kind, name, tensor, parameter), one parameter after another; collective. The tensor is good until the next."""
    for name, parameter, state in optimizer.whole_state(session.network.ctx, session.network.chunks, session.optimizer):
        for kind, value in (*state.items(), ("ema", session.ema.values[name])):
            yield kind, name, value, parameter
        yield from _averages(session, name, parameter)
    for name, layer in _scaled_layers(session.network).items():
        scales = backend.scales(session.network.ctx, layer)
        if scales is not None:
            yield SCALES, name, scales, nn.Parameter(scales, requires_grad=False)  # whole on every tensor rank


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


def keyed(session: Session) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
    """(the name in a checkpoint, tensor, parameter) of all that this rank holds; collective."""
    return ((f"{kind}.{name}", value, parameter) for kind, name, value, parameter in _tensors(session))


def state_text(config: Config, position: Position, ranks: int) -> str:
    """state.json: where the run stands, of what network, and who wrote it."""
    state = {"format": checkpoints.FORMAT, **dataclasses.asdict(position), **_network(config)}
    state["posthoc_ema"] = list(config.train.posthoc_ema)
    return json.dumps({**state, "written": written(config, ranks)}, indent=1) + "\n"


def written(config: Config, ranks: int) -> dict[str, Any]:
    """Who wrote a checkpoint."""
    layout = {key: value for key, value in to_dict(config.parallel).items() if key in _LAYOUT}
    return {"version": mpdit.__version__, "ranks": ranks, "layout": layout}


_LAYOUT = ("tp", "sp", "pp", "vpp", "cp", "distributed_optimizer", "precision", "backend", "fp8_recipe")


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

    `warn` is called on rank 0. Raises InputError on every rank if there are checkpoints, but none is good.
    """

    def check(path: Path) -> None:
        try:
            checkpoints.verify(path, (groups.rank(), groups.world_size()))
            mine = None
        except InputError as error:
            mine = str(error)
        found = groups.decided_together(mine, lambda every: next(filter(None, every), None))
        if found:
            raise InputError(found)

    listed = groups.decided_by_rank_0(lambda: [path for step, path in checkpoints.steps(run_dir) if step < before])
    return checkpoints.newest(run_dir, warn if groups.rank() == 0 else lambda _: None, check, listed)


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


def scales_note(path: Path, config: Config) -> str:
    """What becomes of FP8 scales between a checkpoint and a run that goes on from it; empty if both have them, or none.

    Raises InputError for a metadata file that holds anything but metadata.
    """
    has, keeps = any(map(_is_scales, sharded.Stored(path).shapes)), fp8_rules.keeps_scales(config.parallel)
    if has and not keeps:
        return f"{path}: its FP8 scales, of parallel.fp8_recipe delayed, are left out."
    return f"{path}: holds no FP8 scales; those of parallel.fp8_recipe delayed start anew." if keeps > has else ""


def _is_scales(key: str) -> bool:
    return key.startswith(f"{SCALES}.")


def scales_keys(stored: Container[str], names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's keys that are the scales of layers whose parameters are `names`, in their order."""
    wanted = (f"{SCALES}.{name.removesuffix('.weight')}" for name in names if name.endswith(".weight"))
    return [key for key in wanted if key in stored]


def load(session: Session, path: Path, step: int, skipped: int = 0) -> None:
    """Put a verified checkpoint into a session of any layout; collective. Adam has then taken `step` - `skipped` steps,
    the schedule stands at `step`."""
    network, layers = session.network, _scaled_layers(session.network)
    loaded = _read(network, path, KINDS, layers)
    for name, layer in layers.items():
        if SCALES in loaded.get(name, {}):
            backend.set_scales(network.ctx, layer, loaded[name][SCALES])
    with session.settled():
        optimizer.restore(network.chunks, session.optimizer, loaded, step - skipped)
    for name, value in session.ema.values.items():
        value.copy_(loaded[name]["ema"])
    del loaded
    power = session.ema.power
    power.updates = step - skipped
    for width in power.widths:
        kind = average_kind(width)
        for name, kinds_of in _read(network, path, (kind,)).items():
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


def _read(
    network: Network, path: Path, kinds: tuple[str, ...], layers: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """name -> kind -> tensor, fp32, in this layout's shapes; of `layers` their FP8 scales, where the checkpoint has
    them."""
    wanted = {(kind, name): p for name, p in _parameters(network).items() for kind in kinds}
    if layers:
        there = sharded.Stored(path).shapes
        like = nn.Parameter(torch.empty(fp8_rules.SCALES_SHAPE), requires_grad=False)
        wanted |= {(SCALES, name): like for name in layers if there.get(f"{SCALES}.{name}") == like.shape}
    flat = sharded.load({f"{kind}.{name}": _target(f"{kind}.{name}", p) for (kind, name), p in wanted.items()}, path)
    found: dict[str, dict[str, Any]] = {}
    for kind, name in wanted:
        found.setdefault(name, {})[kind] = flat[f"{kind}.{name}"]
    return found


def _target(key: str, parameter: nn.Parameter) -> Any:
    return sharded.tensor(key, torch.empty(parameter.shape, dtype=torch.float32), parameter)


def _stages(network: Network) -> list[nn.Module]:
    """Without DDP around them."""
    return [getattr(chunk, "module", chunk) if hasattr(chunk, "ddp_config") else chunk for chunk in network.chunks]


def _parameters(network: Network) -> dict[str, nn.Parameter]:
    return {name: p for stage in _stages(network) for name, p in stage.named_parameters()}


def _scaled_layers(network: Network) -> dict[str, nn.Module]:
    return {name: layer for stage in _stages(network) for name, layer in backend.scaled_layers(network.ctx, stage)}
