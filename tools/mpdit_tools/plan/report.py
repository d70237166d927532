"""A plan in words and as plan.json."""

import dataclasses
from typing import Any

from mpdit.config import Config, to_dict
from mpdit.data import buckets
from mpdit.parallel import fp8_rules
from mpdit_tools.plan.estimate import Estimate
from mpdit_tools.plan.gpus import Machine
from mpdit_tools.plan.memory import Memory


def fits(plan: Estimate, machine: Machine) -> bool:
    return plan.memory[plan.fullest].peak <= machine.gpu.memory_bytes


def as_json(plan: Estimate, config: Config, gpu: str, machine: Machine) -> dict[str, Any]:
    """plan.json: exact counts under their own names, estimates under `estimated`; bytes, seconds, FLOPs."""
    return {
        "gpu": gpu,
        "gpus": plan.gpus,
        "gpus_per_node": machine.gpus_per_node,
        "parallel": to_dict(config)["parallel"],
        "data_ranks": plan.data_ranks,
        "micro_batches": plan.micro_batches,
        "batch_size": config.train.batch_size,
        "parameters": plan.parameters,
        "rank_parameters": list(plan.rank_parameters),
        "model_flops_per_step": plan.model_flops,
        "model_flops_per_image": plan.model_flops // config.train.batch_size,
        "buckets": [{"size": list(size), "model_flops_per_image": work} for size, work in plan.bucket_flops.items()],
        "rank_flops_per_step": list(plan.rank_flops),
        "memory_bytes": [{**dataclasses.asdict(one), "peak": one.peak} for one in plan.memory],
        "sent_bytes_per_step": dataclasses.asdict(plan.traffic),
        "bubble": plan.timeline.bubble,
        "fits": fits(plan, machine),
        "estimated": {
            "efficiency": dataclasses.asdict(machine.efficiency),
            "pipeline_s": plan.timeline.seconds,
            "data_parallel_s": plan.data_s,
            "update_s": plan.update_s,
            "step_s": plan.step_s,
            "images_per_s": config.train.batch_size / plan.step_s,
            "tflops_per_gpu": plan.flops_s / 1e12,
            "mfu": plan.mfu,
            "gpu_hours": plan.step_s * config.train.steps * plan.gpus / 3600,
        },
    }


def text(plan: Estimate, config: Config, gpu: str, machine: Machine, note: str = "") -> str:
    """What a person reads: exact first, estimated after, memory as a table of pipeline ranks."""
    parallel, train, model = config.parallel, config.train, config.model
    layout = " x ".join(
        f"{name}{size}" for name, size in _axes(config, plan) if size > 1
    ) or "one GPU"  # fmt: skip
    recompute = ", recompute" if parallel.recompute == "full" else ""
    lines = [
        f"model        {model.arch}, width {model.width}, depth {model.depth}: {plan.parameters:,} parameters",
        f"layout       {layout}: {plan.gpus:,} {gpu.upper()}, {fp8_rules.said(parallel)}{recompute}, "
        f"{plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)} of {parallel.micro_batch}",
        f"parameters   {_span(plan.rank_parameters)} a GPU",
        f"work         {_si(plan.model_flops)}FLOP a step of {train.batch_size:,} images, "
        f"{_si(plan.model_flops / train.batch_size)}FLOP an image",
        *_buckets(plan, config),
        f"bubble       {plan.timeline.bubble:.1%} of the pipeline's time",
        "sent         " + ", ".join(f"{k} {_gb(v)}" for k, v in dataclasses.asdict(plan.traffic).items() if v)
        + " a GPU and step"
        if any(dataclasses.asdict(plan.traffic).values())
        else "sent         nothing",
        "",
        *_memory_table(plan, machine),
        "",
        f"estimated    {plan.step_s:.3g} s a step: pipeline {plan.timeline.seconds:.3g}, exchange of gradients and "
        f"weights {plan.data_s:.3g}, update {plan.update_s:.3g}",
        f"             {train.batch_size / plan.step_s:,.0f} images/s, {plan.flops_s / 1e12:,.0f} TFLOP/s a GPU, "
        f"MFU {plan.mfu:.1%}; {train.steps:,} steps: {_time(plan.step_s * train.steps)}, "
        f"{plan.step_s * train.steps * plan.gpus / 3600:,.3g} GPU hours",
        f"assumed      {_efficiencies(machine)}",
    ]  # fmt: skip
    if parallel.precision == "fp8":
        lines.append(f"             {_FP8}")
    return "\n".join([*lines, *([f"note         {note}"] if note else [])])


_FP8 = (
    "FP8 products at FP8's rate with the same share; what they save, copy and exchange is estimated after Transformer "
    "Engine's source"
)


def _buckets(plan: Estimate, config: Config) -> list[str]:
    """A line a bucket; all else is planned for the largest."""
    most = buckets.largest(config)
    return [
        f"{'' if number else 'buckets':<13}{height} x {width}: {_si(work)}FLOP an image"
        + (", of which are all other numbers here" if (height, width) == most else "")
        for number, ((height, width), work) in enumerate(plan.bucket_flops.items())
    ]


def _axes(config: Config, plan: Estimate) -> list[tuple[str, int]]:
    parallel = config.parallel
    sp = "+SP" if parallel.sp else ""
    return [
        (f"TP{sp} ", parallel.tp), ("CP ", parallel.cp), ("PP ", parallel.pp), ("VPP ", parallel.vpp),
        ("DP ", plan.data_ranks),
    ]  # fmt: skip


def _memory_table(plan: Estimate, machine: Machine) -> list[str]:
    names = [f.name for f in dataclasses.fields(Memory)]
    header = f"{'GB a GPU':<13}" + "".join(f"{name:>11}" for name in (*names, "peak"))
    rows = [
        f"{'stage ' + str(rank):<13}"
        + "".join(f"{getattr(one, name) / 1e9:>11.2f}" for name in names)
        + f"{one.peak / 1e9:>11.2f}"
        for rank, one in enumerate(plan.memory)
    ]
    most, has = plan.memory[plan.fullest].peak, machine.gpu.memory_bytes
    verdict = f"fits: {most / has:.0%} of {has / 1e9:.0f} GB" if most <= has else (
        f"does NOT fit: {most / 1e9:.1f} GB of {has / 1e9:.0f} GB; more parallel.tp or pp, parallel.recompute=full, "
        "parallel.distributed_optimizer=true or a smaller parallel.micro_batch need less"
    )  # fmt: skip
    return [header, *rows, verdict]


def _efficiencies(machine: Machine) -> str:
    e = machine.efficiency
    return (
        f"{e.gemm:.0%} of the peak in GEMMs, {e.attention:.0%} in attention, {e.memory:.0%} of the memory's rate, "
        f"{e.node:.0%} and {e.network:.0%} of the links', {e.operator_s * 1e6:g} us an operator at least, "
        f"{e.collective_s * 1e6:g} us a collective"
    )


def _span(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _si(number: float) -> str:
    """For example "13.84 T", to be followed by a unit."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.4g} {prefix}"
    return f"{number:.4g} "


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
