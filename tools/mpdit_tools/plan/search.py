"""Which layouts of so many GPUs fit, which is likely the fastest, and why the others are out."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

from mpdit.config import Config, Parallel
from mpdit.errors import InputError
from mpdit.parallel import stages
from mpdit.train import pieces
from mpdit.train.pieces import Part
from mpdit_tools.plan.estimate import Estimate, estimate
from mpdit_tools.plan.gpus import Machine
from mpdit_tools.plan.resolve import resolve

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_CONTEXTS = (1, 2)
_MOST_STAGES = 16
_MOST_CHUNKS = 4  # a pipeline rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout with its plan, or with the reason why there is none. `reason` is empty where it fits."""

    parallel: Parallel
    plan: Estimate | None
    reason: str

    @property
    def fits(self) -> bool:
        return not self.reason


def rank(config: Config, gpus: int, machine: Machine) -> list[Candidate]:
    """Every layout of `gpus` GPUs worth a look: those that fit by expected time, then the others.

    Tensor parallelism stays within a node. Raises InputError if there is no layout at all.
    """
    if gpus < 1:
        raise InputError(f"--search needs the number of GPUs, but --gpus is {gpus}; give at least 1.")
    found: list[Candidate] = []
    refused: list[Candidate] = []
    alone: dict[int, list[Part]] = {}  # on one rank, by micro-batch
    for tp, cp, micro_batch in itertools.product(_powers(machine.gpus_per_node), _CONTEXTS, _MICRO_BATCHES):
        width = dataclasses.replace(
            config.parallel, tp=tp, cp=cp, sp=tp > 1, pp=1, vpp=1, pp_split=None, micro_batch=micro_batch
        )
        if gpus % (tp * cp) or config.train.batch_size % micro_batch:
            continue
        try:
            asked = _checked(config, width)
            parts = pieces.measure(asked)
        except InputError as error:
            refused.append(Candidate(parallel=width, plan=None, reason=str(error)))
            continue
        whole = alone.get(micro_batch) or alone.setdefault(micro_batch, pieces.measure_whole(asked))
        found += [_candidate(config, p, parts, whole, gpus, machine) for p in _deeper(config, width, gpus)]
    if not found:
        batch = f"train.batch_size {config.train.batch_size} does not divide by the data-parallel ranks that any leaves"
        why = refused[0].reason if refused else f"{batch}; a multiple of {gpus} does."
        raise InputError(f"no layout of {gpus} GPUs works: {why}")
    ordered = sorted(found, key=lambda one: (not one.fits, one.plan.step_s if one.plan else 0.0))
    return [*ordered, *refused]


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4 ... up to `most`."""
    return itertools.takewhile(lambda size: size <= most, (2**i for i in itertools.count()))


def _checked(config: Config, parallel: Parallel) -> Config:
    """`config` in a layout of one stage and one data-parallel rank. Raises InputError where it can't be."""
    train = dataclasses.replace(config.train, batch_size=parallel.micro_batch)
    resolve(dataclasses.replace(config, parallel=parallel, train=train), parallel.tp * parallel.cp)
    return dataclasses.replace(config, parallel=parallel)


def _deeper(config: Config, parallel: Parallel, gpus: int) -> Iterator[Parallel]:
    """`parallel` with pipelines that its data-parallel ranks' share of the batch fills, with and without recompute."""
    depth = config.model.depth
    for pp in _powers(min(_MOST_STAGES, depth)):
        model_ranks = parallel.tp * parallel.cp * pp
        if gpus % model_ranks:
            continue
        data_ranks = gpus // model_ranks
        share, left = divmod(config.train.batch_size, data_ranks)
        if left or not share or share % parallel.micro_batch:
            continue
        count = share // parallel.micro_batch
        for vpp in range(1, _MOST_CHUNKS + 1) if pp > 1 else (1,):
            if pp * vpp > depth or (vpp > 1 and count % pp):
                continue
            recomputes: tuple[Literal["none", "full"], ...] = ("none", "full")
            for recompute in recomputes:
                yield dataclasses.replace(
                    parallel,
                    pp=pp,
                    vpp=vpp,
                    pp_split=None if depth % (pp * vpp) == 0 else even(depth, pp * vpp),
                    recompute=recompute,
                    distributed_optimizer=data_ranks * parallel.cp > 1,
                    overlap_grad_reduce=data_ranks > 1,
                    overlap_param_gather=data_ranks > 1,
                )


def even(depth: int, chunks: int) -> tuple[int, ...]:
    """Blocks of each chunk, as equal as can be; the first and the last, which hold embedder and head, the fewer."""
    small, more = divmod(depth, chunks)
    order = sorted(range(chunks), key=lambda index: (index == 0, index == chunks - 1))
    larger = set(order[:more])
    return tuple(small + (index in larger) for index in range(chunks))


def _candidate(
    config: Config, parallel: Parallel, parts: list[Part], whole: list[Part], gpus: int, machine: Machine
) -> Candidate:
    asked = dataclasses.replace(config, parallel=parallel)
    try:
        stages.split(asked)
        chunks = pieces.on_stages(asked, parts)
    except InputError as error:
        return Candidate(parallel=parallel, plan=None, reason=str(error))
    plan = estimate(asked, chunks, whole, gpus, machine)
    most, has = plan.memory[plan.fullest].peak, machine.gpu.memory_bytes
    reason = "" if most <= has else f"needs {most / 1e9:.0f} GB of {has / 1e9:.0f}"
    return Candidate(parallel=parallel, plan=plan, reason=reason)


def overrides(parallel: Parallel) -> str:
    """The layout as overrides for the command line."""
    words = []
    for field in dataclasses.fields(Parallel):
        value = getattr(parallel, field.name)
        if value != field.default and value is not None:
            shown = str(value).lower() if isinstance(value, bool) else value
            if isinstance(value, tuple):
                shown = "[" + ",".join(map(str, value)) + "]"
            words.append(f"parallel.{field.name}={shown}")
    return " ".join(words)


def as_json(found: list[Candidate]) -> list[dict[str, Any]]:
    return [
        {
            "parallel": dataclasses.asdict(one.parallel),
            "fits": one.fits,
            "reason": one.reason or None,
            "step_s": one.plan.step_s if one.plan else None,
            "mfu": one.plan.mfu if one.plan else None,
            "bubble": one.plan.timeline.bubble if one.plan else None,
            "peak_bytes": one.plan.memory[one.plan.fullest].peak if one.plan else None,
        }
        for one in found
    ]


def table(found: list[Candidate], top: int) -> str:
    """The best that fit, and the fastest of those that don't, each with its numbers and the overrides to train so."""
    fit, out = [one for one in found if one.fits], [one for one in found if not one.fits]
    lines = [f"{len(fit):,} layouts fit, {len(out):,} do not", "", _row_header()]
    lines += [_row(one) for one in fit[:top]]
    if out:
        lines += ["", "do not fit:", *(_row(one) for one in out[:top])]
    if fit:
        lines += ["", f"to train so: {overrides(fit[0].parallel)}"]
    return "\n".join(lines)


_COLUMNS = ("TP", "CP", "PP", "VPP", "DP", "micro", "recompute", "s/step", "MFU", "bubble", "GB")


def _row_header() -> str:
    return " ".join(f"{name:>9}" for name in _COLUMNS)


def _row(one: Candidate) -> str:
    parallel, plan = one.parallel, one.plan
    cells = [parallel.tp, parallel.cp, parallel.pp, parallel.vpp]
    if plan is None:
        known = " ".join(f"{cell:>9}" for cell in (*cells, "", parallel.micro_batch, parallel.recompute))
        return f"{known}  {one.reason}"
    numbers = [
        *map(str, (*cells, plan.data_ranks, parallel.micro_batch)),
        parallel.recompute,
        f"{plan.step_s:.3g}",
        f"{plan.mfu:.1%}",
        f"{plan.timeline.bubble:.1%}",
        f"{plan.memory[plan.fullest].peak / 1e9:.0f}",
    ]
    return " ".join(f"{cell:>9}" for cell in numbers) + (f"  {one.reason}" if one.reason else "")
