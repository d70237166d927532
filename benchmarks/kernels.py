"""The fused kernels on a GPU: forward and backward of each operation, against PyTorch and against a plain copy.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --widths 5120 --operations "sum + modulate" --json kernels.json
    python benchmarks/kernels.py --dry-run             # no GPU: tiny tensors, the interpreter; proves that it runs

Contenders get the same tensors, sequence first, with modulations that are chunks of one wider tensor and queries that
are a view of queries, keys and values. They take turns round by round; a ratio is taken within each round. `torch` is
the reference op by op, `compiled` is torch.compile of it, `copy` moves as many bytes as the operation has to (each
large tensor read or written once, forward and backward; modulations and their gradients are left out): the share of its
speed is how near the kernels come to what the memory gives. Times are of CUDA events around several passes in a row.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpdit_kernels import heads, modulate, reference, switch

WIDTHS = (1024, 1152, 2048, 4096, 5120)
SAMPLES, HEAD_DIM = 8, 64
NUMBERS = 2**27  # of one large tensor: five times the second cache of an H100, and a pass outlasts its launches
OURS, EAGER, COMPILED, COPY = "triton", "torch", "compiled", "copy"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Of one width: x and branch [S, B, D], modulations [1, B, D], queries [S, B, H, d]."""

    x: Tensor
    branch: Tensor
    shift: Tensor
    scale: Tensor
    gate: Tensor
    queries: Tensor
    gain: Tensor

    @classmethod
    def new(cls, width: int, dtype: torch.dtype, device: str) -> "Inputs":
        numbers, samples, head_dim = (NUMBERS, SAMPLES, HEAD_DIM) if device == "cuda" else (2**8, 2, 8)
        tokens = numbers // (width * samples)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

        shift, scale, gate, *_ = random(1, samples, 6 * width).chunk(6, -1)
        queries, _, _ = random(tokens, samples, width // head_dim, 3, head_dim).unbind(-2)
        return cls(
            x=random(tokens, samples, width),
            branch=random(tokens, samples, width),
            shift=shift,
            scale=scale,
            gate=gate,
            queries=queries,
            gain=random(head_dim),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """`ours` and its reference, of the same arguments; `passes` counts large tensors read or written."""

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Callable[[Inputs], tuple[Any, ...]]
    passes: int


OPERATIONS = {
    "modulate": Operation(
        ours=functools.partial(modulate.layer_norm_modulate, eps=1e-6),
        reference=functools.partial(reference.layer_norm_modulate, eps=1e-6),
        arguments=lambda i: (i.x, i.shift, i.scale),
        passes=2 + 3,
    ),
    "residual": Operation(
        ours=modulate.gated_residual,
        reference=functools.partial(reference.gated_residual, multiplier=1.0),
        arguments=lambda i: (i.x, i.gate, i.branch),
        passes=3 + 3,
    ),
    "sum + modulate": Operation(
        ours=functools.partial(modulate.gated_residual_modulate, multiplier=1.0, eps=1e-6),
        reference=functools.partial(reference.gated_residual_modulate, multiplier=1.0, eps=1e-6),
        arguments=lambda i: (i.x, i.gate, i.branch, i.shift, i.scale),
        passes=4 + 6,
    ),
    "heads": Operation(
        ours=functools.partial(heads.head_norm, eps=1e-6),
        reference=functools.partial(reference.head_norm, eps=1e-6),
        arguments=lambda i: (i.queries, i.gain),
        passes=2 + 3,
    ),
}


def forward_backward(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], None]:
    """One pass, gradients of every argument included."""
    wanted = [a for a in arguments if isinstance(a, Tensor)]
    outputs = function(*arguments)
    cotangents = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def run() -> None:
        outputs = function(*arguments)
        torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), wanted, cotangents)

    return run


def copy_of(numbers: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Reads and writes so many numbers in all."""
    source = torch.randn(max(1, numbers // 2), dtype=dtype, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run


def milliseconds(task: Callable[[], None], repeats: int, device: str) -> float:
    """Of one of `repeats` passes in a row."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            task()
        return (time.perf_counter() - start) * 1e3 / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        task()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def measure(operation: Operation, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians and ratios of one operation at one width."""
    device, dtype = "cpu" if args.dry_run else "cuda", TYPES[args.type]
    arguments = operation.arguments(Inputs.new(width, dtype, device))
    compiled = torch.compile(operation.reference, backend="eager" if args.dry_run else "inductor", dynamic=False)
    moved = operation.passes * arguments[0].numel()
    tasks = {
        OURS: forward_backward(operation.ours, arguments),
        EAGER: forward_backward(operation.reference, arguments),
        COMPILED: forward_backward(compiled, arguments),
        COPY: copy_of(moved, dtype, device),
    }
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(args.warmup + args.rounds):
        for name, task in tasks.items():
            times[name].append(milliseconds(task, args.repeats, device))
    times = {name: values[args.warmup :] for name, values in times.items()}

    def ratio(name: str) -> list[float]:
        """Median, lowest, highest."""
        found = sorted(theirs / own for theirs, own in zip(times[name], times[OURS], strict=True))
        return [statistics.median(found), found[0], found[-1]]

    return {
        "width": width,
        "shape": list(arguments[0].shape),
        "gigabytes": moved * dtype.itemsize / 1e9,
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "over_torch": ratio(EAGER),
        "over_compiled": ratio(COMPILED),
        "of_copy": ratio(COPY),
    }


def print_row(name: str, row: dict[str, Any]) -> None:
    ms = "".join(f"{row['ms'][contender]:>13.3f}" for contender in (OURS, EAGER, COMPILED, COPY))
    ratios = "".join(
        f"   {middle:>5.2f} ({low:.2f} … {high:.2f})"
        for middle, low, high in (row[key] for key in ("over_torch", "over_compiled", "of_copy"))
    )
    print(f"{name:<16}{row['width']:>6}{ms}{ratios}", flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="default: %(default)s")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--type", choices=TYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before (default: 3)")
    parser.add_argument("--repeats", type=int, default=10, help="passes in a row, timed together (default: 10)")
    parser.add_argument("--dry-run", action="store_true", help="tiny tensors on the CPU; the times mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.widths, args.rounds, args.warmup, args.repeats = [16], 2, 1, 1
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, below
    elif not torch.cuda.is_available():
        print("there is no CUDA device, so there is nothing to measure; --dry-run shows that this program runs.")
        return 2
    switch.use("triton")
    import triton

    device = "none (dry run: times mean nothing)" if args.dry_run else torch.cuda.get_device_name()
    setting = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "type": args.type}
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    columns = "".join(f"{f'{name} ms':>13}" for name in (OURS, EAGER, COMPILED, COPY))
    print(f"{'':<16}{'width':>6}{columns}   {'over torch':<21}   {'over compiled':<21}   of copy")
    results = []
    for width in args.widths:
        for name in args.operations:
            torch.compiler.reset()
            row = measure(OPERATIONS[name], width, args)
            print_row(name, row)
            results.append({"operation": name, **row})
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
