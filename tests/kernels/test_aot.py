"""The compilation gate: the kernels compile for Hopper and Blackwell without a GPU, and faults are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpdit_kernels import ptx


def aot(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with a fresh cache: what other tests compiled says nothing."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "mpdit_kernels.aot", *arguments],
        env=env | {"TRITON_CACHE_DIR": str(folder)} | variables,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_widest_rows_are_fine_and_heads_that_no_vector_divides_are_not(tmp_path: Path) -> None:
    """Width 5120 has least registers to spare, head_dim 72 is no multiple of 16, and 66 loads a number at a time: what
    a lost hint on a stride would do to all of them."""
    done = aot(tmp_path, "--arch", "90", "--width", "5120", "--head-dim", "72", "66", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    kernels = {"norm_forward", "norm_backward", "residual_forward", "residual_backward", "add_chunks"}
    assert {row["kernel"] for row in rows} == kernels | {"heads_forward", "heads_backward"}
    for row in rows:
        if row["width"] != 66:
            assert row["faults"] == [], row
            assert row["registers"] <= 128
            assert row["wide_loads"] > 0
        elif row["kernel"] == "heads_backward":
            assert row["faults"] == ["x is loaded by 2 bytes, not 16", "d_out is loaded by 2 bytes, not 16"]


BOUND_BY_TRITON = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mpdit_kernels import aot
from mpdit_kernels.fused import residual
from mpdit_kernels.fused.launch import Launch


class Hopper:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)


def compiled_only(kernel, programs, *arguments, warps, **constants):
    bound = kernel.warmup(*arguments, grid=(programs,), num_warps=warps, enable_fp_fusion=True, **constants).src
    ours, _ = aot.source_of(Launch(kernel=kernel, arguments=arguments, constants=constants, warps=warps))
    assert bound.signature == ours.signature
    assert bound.constants == ours.constants
    assert {place: known for place, known in bound.attrs.items() if known} == ours.attrs
    print(kernel.__name__)


driver.set_active(Hopper())
residual.launch, residual.processors = compiled_only, lambda device: 132
x = torch.zeros(64, 2, 72, dtype=torch.bfloat16, requires_grad=True)
gate = torch.zeros(1, 2, 6 * 72, dtype=torch.bfloat16, requires_grad=True).chunk(6, -1)[1]
residual.residual(x, gate, x, 1.0).sum().backward()
"""


def test_the_gate_compiles_what_a_launch_would(tmp_path: Path) -> None:
    """Triton itself binds a launch's arguments for a device that is not there: the same types, constants and hints."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", BOUND_BY_TRITON], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["residual_forward", "residual_backward"], done.stderr


@pytest.mark.slow
def test_all_widths_on_hopper_and_blackwell(tmp_path: Path) -> None:
    done = aot(tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("compiled, 0 with faults.")


def test_nothing_is_compiled_in_the_interpreter(tmp_path: Path) -> None:
    done = aot(tmp_path, TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "TRITON_INTERPRET is set, so nothing is compiled; unset it.\n"


def test_ptx_is_followed_from_a_load_to_its_argument() -> None:
    text = """
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .u32 kernel_param_2
    ld.param.b64 	%rd1, [kernel_param_0];
    ld.param.b64 	%rd2, [kernel_param_1];
    ld.param.b32 	%r1, [kernel_param_2];
    mul.wide.s32 	%rd3, %r1, 16;
    add.s64 	%rd4, %rd1, %rd3;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
    add.s64 	%rd5, %rd2, %rd3;
    @%p1 ld.global.L1::evict_first.b16 { %rs1 }, [ %rd5 + 2 ];
    cp.async.cg.shared.global [ %r6 + 0 ], [ %rd5 + 0 ], 0x10, %r7;
    """
    assert ptx.load_bits(text, ["x", "y", "rows"]) == {"x": [128], "y": [16, 128]}
