"""RUN/environment.json: what a run ran on, complete enough to explain a difference and fit to be published.

No user, host or folder name and no secret gets in: versions and hardware, and variables from an allow-list.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import mpdit

_PACKAGES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "triton": ("triton", "pytorch-triton"),
    "numpy": ("numpy",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "sentencepiece": ("sentencepiece",),
    "safetensors": ("safetensors",),
    "transformers": ("transformers",),
    "diffusers": ("diffusers",),
    "transformer-engine": ("transformer-engine",),
}
_VARIABLES = re.compile(
    r"(OMP|MKL)_NUM_THREADS|OMP_PROC_BIND|KMP_AFFINITY|CUDA_DEVICE_MAX_CONNECTIONS|CUDA_VISIBLE_DEVICES|(NCCL|MALLOC|NVTE)_\w+"
    r"|GLOO_SOCKET_IFNAME|PYTORCH_(CUDA_)?ALLOC_CONF|TRITON_INTERPRET|(LOCAL_)?WORLD_SIZE"
)
_PRIVATE = re.compile(r"TOKEN|KEY|SECRET|PASS|CRED|AUTH|HOST|COMM_ID|FILE|PATH|PLUGIN")
_HARMLESS = re.compile(r"(?!.*[A-Za-z0-9]{25})[\w.,:;=^+%()-]{0,80}")  # no path, mail address, sentence or long code


def environment() -> dict[str, Any]:
    """Everything for environment.json, as plain JSON types; what can't be found out is None. Sizes are in bytes."""
    return {
        "mpdit": {"version": mpdit.__version__, **checkout()},
        "python": platform.python_version(),
        "packages": {name: _version(names) for name, names in _PACKAGES.items()},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": {"model": cpu_model(), "cores": cores(), "memory": memory()},
        "cuda": _cuda(),
        "world_size": _number("WORLD_SIZE"),
        "local_world_size": _number("LOCAL_WORLD_SIZE"),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _may_be_told(name, value)},
    }


def checkout() -> dict[str, Any]:
    """Git commit of the checkout mpdit runs from and whether tracked files differ from it; both None outside one."""
    root = Path(mpdit.__file__).resolve().parents[1]
    nothing: dict[str, Any] = {"commit": None, "dirty": None}
    if not (root / ".git").exists():  # an installed copy may lie inside somebody else's repository
        return nothing
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return nothing if commit is None else {"commit": commit, "dirty": None if changes is None else bool(changes)}


def cores() -> int:
    """Processor cores this process may use: its affinity, and its container's share rounded up."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        mine = min(mine, max(1, -(-int(quota) // int(period))))
    return mine


def memory() -> int | None:
    """Bytes of memory this process may use: the machine's, or its container's if that is less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def cpu_model() -> str | None:
    """The processor's name as its maker gives it."""
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or None


def _cuda() -> dict[str, Any] | None:
    """CUDA as torch sees it; None in a build without CUDA, whose torch.cuda may be standing in for the CPU."""
    try:
        import torch

        if torch.version.cuda is None or not torch.cuda.is_available():
            return None
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return {
            "version": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
            "devices": [
                {"name": device.name, "memory": device.total_memory, "capability": [device.major, device.minor]}
                for device in devices
            ],
        }
    except Exception:  # a broken driver; the run itself will say so in its own words
        return None


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else None


def _may_be_told(name: str, value: str) -> bool:
    return bool(_VARIABLES.fullmatch(name) and not _PRIVATE.search(name) and _HARMLESS.fullmatch(value))


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as set in a hook
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=variables)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
