"""A stand-in for Transformer Engine's compiled half (transformer_engine_torch), which exists only where CUDA does.

With it the wheel of TE's Python half, of exactly version 2.20.2, imports and its layers are built on a CPU: what they
are given, which parameters they make and how they mark them can be seen. Nothing can be computed: every function of the
compiled half raises. It takes over the whole process, so it is for tests/te alone (`make test-te`).
"""

import contextlib
import enum
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

VERSION = "2.20.2"


class _Values(type):
    """A class whose every public attribute exists: a number of its own. Stands for the enums of the compiled half."""

    def __init__(cls, *_: Any) -> None:
        cls.__members__: dict[str, int] = {}  # those asked for so far

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        return cls.__members__.setdefault(name, len(cls.__members__))


class _CompiledHalf(types.ModuleType):
    """Enums by their look, functions that raise for all else."""

    # transformer_engine.h; TE compares these with a table of its own.
    DType = enum.IntEnum(
        "DType",
        {
            **{"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6},
            **{"kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10},
        },
    )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            found: Any = _Values(name, (), {})
        elif name in ("get_cublasLt_version", "get_cudnn_version", "get_num_cublas_streams"):
            numbers = {"get_cublasLt_version": 130100, "get_cudnn_version": 91900, "get_num_cublas_streams": 4}

            def found(number: int = numbers[name]) -> int:
                return number
        else:

            def found(*_: Any, **__: Any) -> Any:
                raise RuntimeError(f"transformer_engine_torch.{name} was called, and there is no compiled half")

        setattr(self, name, found)
        return found


def install() -> None:
    """Make `transformer_engine.pytorch` importable in this process, and import it."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no look for cuDNN, NVRTC and TE's own library
    sys.modules.setdefault("transformer_engine_torch", _CompiledHalf("transformer_engine_torch"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its first look is for the real one
        import transformer_engine.common

        transformer_engine.common.load_framework_extension = lambda framework: None
        import transformer_engine.pytorch


@contextlib.contextmanager
def building(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within, TE takes this machine for one with a GPU of this compute capability, as its constructors ask for."""
    cuda = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: types.SimpleNamespace(major=capability[0], minor=capability[1]),
        "is_current_stream_capturing": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        yield
