"""What the compiler makes of every kernel, on a machine without a GPU: ``python -m mpdit_kernels.aot``.

The operations run on tensors without memory, shaped as in training (sequence first, modulations as chunks of one wider
tensor, queries as a view of queries, keys and values). Each launch is written down and compiled for Hopper and
Blackwell with what the launch itself would know of its arguments. Registers, stack and shared memory come from the
cubin, the widths of loads from SASS, and which argument they load from PTX.

Exit code 1 when a kernel spills or uses a stack, takes more than 128 registers or 48 KiB of shared memory, or does not
load a streamed tensor by 16 bytes.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpdit_kernels import ptx, switch
from mpdit_kernels.fused import heads, norm, residual
from mpdit_kernels.fused.launch import Launch, recorded

ARCHITECTURES = (90, 100)
WIDTHS = (1024, 2048, 5120)
HEAD_DIMS = (64, 72)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

MOST_REGISTERS = 128
MOST_SHARED = 48 * 1024  # bytes
# Read once, from far: all that is as large as x. In the sums it is what the programs before have left.
STREAMED = {"x", "branch", "r", "d_summed", "d_out"}

TOKENS, SAMPLES, HEADS = 4096, 2, 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """One kernel as one operation launches it. Bytes are a program's; `loads` are instructions that read global
    memory, `wide_loads` those of 16 bytes or more."""

    operation: str
    kernel: str
    width: int
    arch: int
    warps: int
    registers: int
    stack: int
    local: int
    spills: int  # instructions that write or read local memory
    shared: int
    loads: int
    wide_loads: int
    faults: tuple[str, ...]


# ---- the launches ----------------------------------------------------------------------------------------------------


def launches(widths: Sequence[int], head_dims: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[str, int, Launch]]:
    """(operation, width or head_dim, launch) of all that training launches; of equal ones the first."""
    seen = set()
    found = itertools.chain(*(_of_rows(D, dtype) for D in widths), *(_of_heads(d, dtype) for d in head_dims))
    for operation, width, launch in found:
        same = source_of(launch)[0].hash(), launch.warps
        if same not in seen:
            yield operation, width, launch
        seen.add(same)


def _of_rows(D: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Launch]]:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    shift, scale, gate, *_ = new(1, SAMPLES, 6 * D).chunk(6, -1)
    x, branch = new(TOKENS, SAMPLES, D), new(TOKENS, SAMPLES, D)
    operations: dict[str, Callable[[], Any]] = {
        "modulate": lambda: norm.norm_modulate(x, shift, scale, 1e-6),
        "sum + modulate": lambda: norm.sum_norm_modulate(x, gate, branch, shift, scale, 1.0, 1e-6),
        "sum + affine": lambda: norm.sum_norm_affine(x, branch, new(D), new(D), 1.0, 1e-6),
        "residual": lambda: residual.residual(x, gate, branch, 1.0),
    }
    for name, operation in operations.items():
        yield from ((name, D, launch) for launch in _forward_backward(operation))


def _of_heads(d: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Launch]]:
    shape = (TOKENS, SAMPLES, HEADS, 3, d)
    queries, _, _ = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True).unbind(-2)
    gain = torch.empty(d, dtype=dtype, device="meta", requires_grad=True)
    angles = torch.empty(TOKENS, 1, d // 2, device="meta")
    for name, table in {"heads": None, "heads + rotation": angles}.items():
        normed = functools.partial(heads.norm_heads, queries, gain, table, table, 1e-6)
        yield from ((name, d, launch) for launch in _forward_backward(normed))


def _forward_backward(operation: Callable[[], Any]) -> list[Launch]:
    with recorded() as found:
        out = operation()
        outputs = list(out) if isinstance(out, tuple) else [out]
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return found


# ---- compiling -------------------------------------------------------------------------------------------------------

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def source_of(launch: Launch) -> tuple[ASTSource, list[str]]:
    """What Triton would compile at this launch, and the names of the arguments that stay arguments."""
    kernel, signature, constants = launch.kernel, {}, dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    given = (name for name in kernel.arg_names if name not in launch.constants)
    for name, value in zip(given, launch.arguments, strict=True):
        place = kernel.arg_names.index(name)
        if value is None:
            constants[name] = None
        elif isinstance(value, Tensor):
            signature[name] = f"*{_NAMES[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0  # as the allocator's blocks are
            attributes |= {(place,): [["tt.divisibility", 16]]} if aligned else {}
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            assert kernel.params[place].do_not_specialize, f"{kernel.__name__}: {name} would be specialised"
            signature[name] = "i32"
    arguments = [name for name in kernel.arg_names if name in signature]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, places, attributes), arguments


def compile_(operation: str, width: int, launch: Launch, arch: int) -> Compiled:
    """Raises RuntimeError for an architecture that the tools beside Triton don't know."""
    source, arguments = source_of(launch)
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    with contextlib.redirect_stdout(sys.stderr):
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _dump(built.asm["cubin"])
    loads = re.findall(r"\bLDG(?:STS)?\.E\S*", sass)
    found = {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": usage["SHARED"] + built.metadata.shared,
        "loads": len(loads),
        "wide_loads": sum(".128" in load or ".256" in load for load in loads),
    }
    bits = ptx.load_bits(built.asm["ptx"], arguments)
    streamed = [name for name in arguments if name in STREAMED or (name == "partial" and "out" in arguments)]
    return Compiled(
        operation=operation,
        kernel=launch.kernel.__name__,
        width=width,
        arch=arch,
        warps=launch.warps,
        faults=tuple(_faults(found, bits, streamed)),
        **found,
    )


def _faults(found: dict[str, int], bits: dict[str, list[int]], streamed: Sequence[str]) -> Iterator[str]:
    for what in ("stack", "local", "spills"):
        if found[what]:
            yield f"{what} {found[what]}, not 0"
    for what, most in {"registers": MOST_REGISTERS, "shared": MOST_SHARED}.items():
        if found[what] > most:
            yield f"{what} {found[what]}, more than {most}"
    for name in streamed:
        if not bits.get(name) or min(bits[name]) < 128:
            yield f"{name} is loaded by {min(bits.get(name, [0])) // 8} bytes, not 16"
    wide = sum(width >= 128 for widths in bits.values() for width in widths)
    if found["wide_loads"] < wide:
        yield f"{found['wide_loads']} loads of 16 bytes in SASS, but {wide} in PTX"


def _dump(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resources by cuobjdump's names, and SASS."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    if len(found) != 4 or not re.search(r"\bEXIT\b", sass):
        raise RuntimeError(f"{tool} can't read what was compiled: {usage.strip() or 'no answer'}.")
    return found, sass


# ---- the command -----------------------------------------------------------------------------------------------------

_COLUMNS = ("registers", "stack", "local", "spills", "shared", "128-bit loads", "warps")


def _row(c: Compiled) -> str:
    numbers = (c.registers, c.stack, c.local, c.spills, c.shared, f"{c.wide_loads} of {c.loads}", c.warps)
    cells = "".join(f"{number!s:>{len(name) + 2}}" for name, number in zip(_COLUMNS, numbers, strict=True))
    return f"{c.kernel:<18}{c.operation:<18}{c.width:>6}  sm_{c.arch:<4}{cells}  {'; '.join(c.faults) or 'ok'}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mpdit_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="default: %(default)s")
    parser.add_argument("--width", type=int, nargs="*", default=WIDTHS, help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, nargs="*", default=HEAD_DIMS, help="default: %(default)s")
    parser.add_argument("--type", choices=TYPES, default="bf16")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 when all is well, 1 when a kernel has a fault, 2 where nothing can be compiled."""
    arguments = _parse(argv)
    if switch.interpreted():
        print("TRITON_INTERPRET is set, so nothing is compiled; unset it.", file=sys.stderr)
        return 2
    cases = list(launches(arguments.width, arguments.head_dim, TYPES[arguments.type]))
    if not arguments.json:
        head = "".join(f"  {name}" for name in _COLUMNS)
        print(f"{'kernel':<18}{'operation':<18}{'width':>6}  {'arch':<7}{head}  verdict")
    rows = []
    for arch in arguments.arch:
        for operation, width, launch in cases:
            rows.append(compile_(operation, width, launch, arch))
            if not arguments.json:
                print(_row(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    wrong = sum(bool(row.faults) for row in rows)
    if not arguments.json:
        print(f"{len(rows)} kernels compiled, {wrong} with faults.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
