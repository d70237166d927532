"""Which implementation runs: the one switch of this package, for the whole process.

``use("auto")``, the default, takes Triton for CUDA tensors of the types it knows where the machine can compile it, and
the reference for all others. ``"torch"`` takes the reference everywhere. ``"triton"`` refuses at once where Triton
can't run; types it does not know are errors then. Tensors that are not on CUDA go to the reference, with one exception:
under ``TRITON_INTERPRET=1``, which has to be set before Triton is imported, ``"triton"`` takes CPU tensors too.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Choice = Literal["auto", "torch", "triton"]

OLDEST = (8, 0)  # compute capability: bf16 arithmetic starts there
_choice: Choice = "auto"


def use(choice: Choice) -> None:
    """Raises ValueError for another word, RuntimeError for "triton" where it can't run: one sentence each."""
    global _choice
    if choice not in get_args(Choice):
        raise ValueError(f"the kernels asked for are {choice!r}, but should be one of {', '.join(get_args(Choice))}.")
    if choice == "triton" and (reason := lacking()):
        raise RuntimeError(f"the kernels asked for are Triton's, but {reason}; auto and torch run without.")
    _choice = choice


def chosen() -> Choice:
    return _choice


def takes(x: "Tensor") -> bool:
    """Whether Triton works on `x`."""
    if _choice == "torch":
        return False
    if x.is_cuda:
        return _choice == "triton" or (known(x) and not lacking())
    return _choice == "triton" and interpreted() and x.device.type == "cpu"


def known(x: "Tensor") -> bool:
    """Whether the kernels are written for the type of `x`: fp32, bf16, fp16."""
    import torch

    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, in numpy: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def lacking() -> str:
    """What keeps Triton from running on this machine, as a clause; empty where nothing does."""
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return what_lacks(
        triton=importlib.util.find_spec("triton") is not None,
        capabilities=[torch.cuda.get_device_capability(device) for device in devices],
        compiler=has_compiler(),
        interpreter=interpreted(),
    )


def what_lacks(
    *, triton: bool, capabilities: Sequence[Sequence[int]], compiler: bool, interpreter: bool = False
) -> str:
    """:func:`lacking` of a machine with GPUs of these compute capabilities."""
    if not triton:
        return "triton is not installed"
    if interpreter:
        return ""
    if not capabilities:
        return "there is no CUDA device"
    oldest = min(tuple(capability) for capability in capabilities)
    if oldest < OLDEST:
        return f"the GPU is sm_{oldest[0]}{oldest[1]} and they need sm_{OLDEST[0]}{OLDEST[1]} or newer"
    if not compiler:
        return "there is no C compiler for Triton's launchers (gcc or clang on PATH, or CC)"
    return ""


def has_compiler() -> bool:
    """Of C, which Triton calls once a kernel to build what launches it."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
