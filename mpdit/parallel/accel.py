"""Which device this process trains on: the one module that knows.

Where CUDA works, :func:`enter` selects the local device and patches nothing. On a machine without CUDA it makes
megatron-core's unconditional CUDA calls mean "the CPU"; megatron-core stays unedited. ``torch.cuda.is_available`` keeps
saying False, so that code which asks politely takes its CPU branch.
"""

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from mpdit.errors import InputError
from mpdit.parallel.apex import refuse_foreign_apex
from mpdit.parallel.te_install import find_te, install, refuse_half_te

_CPU = torch.device("cpu")
# Imported before anything is patched: some patches go into these modules, and what they bound by name must be real.
_USED = (
    "parallel_state",
    "tensor_parallel.random",
    "pipeline_parallel.schedules",
    "distributed",
    "optimizer.distrib_optimizer",
    "optimizer_param_scheduler",
    "dist_checkpointing",
    "dist_checkpointing.strategies.torch",
    "transformer.module",
    "transformer.multi_token_prediction",  # the schedules import it at the first step
    "transformer.transformer_config",
)
# Factories that megatron-core calls with device="cuda" or device=torch.cuda.current_device().
_FACTORIES = (
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_strided"),
)
_entered = False


def is_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process's parameters and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda() else _CPU


def for_threads() -> Callable[[], None]:
    """What a thread calls first, to be at this thread's device: CUDA gives it the first one."""
    if not is_cuda():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def collective_backend(share_gpu: bool) -> str:
    return "nccl" if is_cuda() and not share_gpu else "gloo"


def enter() -> None:
    """Make this process ready for megatron-core. Idempotent; call it before any process group is made.

    Raises InputError for PyPI's `apex` and for half a Transformer Engine, whose mere presence breaks megatron-core.
    """
    global _entered
    refuse_foreign_apex()
    refuse_half_te()
    _meet_te()
    # Megatron overlaps gradient reductions with GEMMs by launch order, which one hardware queue keeps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # megatron-core's own business: its default for CUDA graphs, and functions that newer torch has renamed.
    warnings.filterwarnings(action="ignore", message="full scope is deprecated", category=UserWarning)
    warnings.filterwarnings(action="ignore", message=".*_state_dict` is deprecated and will", category=FutureWarning)
    warnings.filterwarnings(
        action="ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning
    )
    # Under the distributed optimizer and fp32 it asks its views of the weights for gradients that lie elsewhere.
    warnings.filterwarnings(action="ignore", message="The .grad attribute of a Tensor that is not a leaf")
    with warnings.catch_warnings():
        # "Transformer Engine and Apex are not installed", four times; `mpdit doctor` says it once, with advice.
        warnings.simplefilter("ignore")
        for name in _USED:
            importlib.import_module(f"megatron.core.{name}")
    if is_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        # fp32 is fp32: torch lets convolutions round to TF32, NVIDIA's containers matrix products too.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    elif not _entered:
        _patch_factories()
        _patch_cuda_module()
        _patch_random()
    _entered = True


def enter_to_imagine() -> None:
    """:func:`enter`, for a process that has ranks without memory (mpdit.parallel.imagined), or forks those it has: they
    are on the CPU, whatever GPUs there are. Call it before anything else asks for CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    enter()


def _meet_te() -> None:
    """A Transformer Engine that is there whole: import it before megatron-core does, whose errors would be others."""
    if not is_cuda():
        # Of no use here, and its import takes seconds, or fails: 2.17 and 2.18 ask for the driver. None in its place is
        # an ImportError to whoever tries, which is what megatron-core expects.
        sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
        return
    found = find_te()
    if found.state != "whole":
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        raise InputError(
            f"Transformer Engine {found.version}: does not import with torch {torch.__version__} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); build it for this torch: {install()}, or "
            "run pip uninstall on its parts."
        ) from error


def gpus() -> int:
    """How many this machine has; ranks here are numbered over them."""
    return torch.cuda.device_count() if is_cuda() else 0


def gpu() -> tuple[str, tuple[int, int], tuple[int, int]] | None:
    """Name and compute capability of this process's GPU, and torch's CUDA version; None without one."""
    if not is_cuda():
        return None
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability(), (int(major), int(minor))


def _names_cuda(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str | torch.device) and str(value).startswith("cuda"))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinning needs a driver
        return factory(*args, **kwargs)

    return wrapped


# torch.compile keeps a registry of these functions and refuses one object under two names: a new one each time.
def _identity() -> Callable[..., Any]:
    return lambda self, *_, **__: self


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _patch_factories() -> None:
    # torch lists its factories at the first "with torch.device": it has to find the real ones, or "meta" allocates.
    with torch.device("meta"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for owner, name in ((torch.Tensor, "cuda"), (torch.Tensor, "pin_memory"), (torch.nn.Module, "cuda")):
        setattr(owner, name, _identity())
    plain_to, plain_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("device"), str | torch.device) and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        here = [_CPU if isinstance(a, str | torch.device) and _names_cuda(a) else a for a in args]
        return plain_to(self, *here, **kwargs)  # type: ignore[arg-type]

    def kind(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers and its clipping compare type() with 'torch.cuda.FloatTensor' and raise otherwise.
        found = plain_type(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) and "cuda" not in found else found

    torch.Tensor.to, torch.Tensor.type = to, kind  # type: ignore[assignment,method-assign]


class _Stream:
    """Streams and events where everything has always happened: CPU work is in order."""

    cuda_stream = stream_id = device_index = 0
    device = _CPU
    wait_stream = wait_event = record = wait = synchronize = _returns(None)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...


def _patch_cuda_module() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU  # only ever passed on as device=
    cuda.device_count = lambda: 1  # checkpoint workers divide by it
    for name in ("synchronize", "empty_cache", "set_device", "ipc_collect", "reset_peak_memory_stats", "set_stream"):
        setattr(cuda, name, _returns(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _returns(0))
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream, cuda.default_stream = _returns(_Stream()), _returns(_Stream())
    cuda.stream = _returns(contextlib.nullcontext())
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _returns(None), _returns(None)


def _patch_random() -> None:
    # A CPU has one generator, so "the CUDA generator" is that one. Without this the tracker and recompute are silently
    # wrong: torch.cuda queues a set_state for a CUDA start-up that never comes.
    cuda: Any = torch.cuda

    def seed_all(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    cuda.manual_seed = cuda.manual_seed_all = cuda.random.manual_seed_all = seed_all
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
