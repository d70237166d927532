"""What is installed and what it can do, each found out in a python of its own: imports may fail, hang or crash."""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mpdit.train.environment import cores

Facts = dict[str, Any]

_TIMEOUT = 180.0  # seconds a probe may take: a cold network disk is slow, not wrong

# The rest of what training imports, by module; pip's words for it, as in pyproject.toml.
PLAIN = {
    "numpy": "numpy>=2.0",
    "sentencepiece": "sentencepiece>=0.2.0,<0.3",
    "safetensors": "safetensors>=0.5",
    "yaml": "PyYAML>=6.0",
    "PIL": "pillow>=11",
    "rich": "rich>=13.7",
}

_RUN = """
import json, sys
scope = {}
try:
    exec(sys.argv[1], scope)
    answer = scope["answer"]
except BaseException as error:
    answer = {"error": type(error).__name__, "text": " ".join(str(error).split())[:300],
              "guarded": isinstance(error, ImportError)}
print("\\n" + json.dumps(answer))
"""

_TORCH = """
import ctypes, torch
import torch.distributed as dist
try:
    version = ctypes.c_int(0)
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    driver = version.value // 1000
except OSError:
    driver = None
seen = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
devices = [torch.cuda.get_device_properties(i) for i in seen]
answer = {
    "version": torch.__version__, "cuda": torch.version.cuda, "driver": driver, "threads": torch.get_num_threads(),
    "devices": [{"name": d.name, "memory": d.total_memory, "capability": [d.major, d.minor]} for d in devices],
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
}
"""

_MEGATRON = """
import importlib
for part in ("parallel_state", "tensor_parallel", "pipeline_parallel.schedules", "distributed", "optimizer",
             "dist_checkpointing"):
    importlib.import_module("megatron.core." + part)
answer = {"version": importlib.import_module("megatron.core").__version__}
"""

_TRANSFORMER_ENGINE = """
import torch, importlib
answer = {"version": getattr(importlib.import_module("transformer_engine"), "__version__", "")}
importlib.import_module("transformer_engine.pytorch")
"""

_DALI = """
import nvidia.dali, nvidia.dali.fn
answer = {"version": nvidia.dali.__version__}
"""

_MODULE = """
import importlib
answer = {{"version": getattr(importlib.import_module({0!r}), "__version__", "")}}
"""


def probe(code: str, timeout: float = _TIMEOUT) -> Facts:
    """What `code` leaves in `answer`; if it fails, crashes or takes too long: "error" and "text", and "guarded" when it
    is an ImportError, which those who import the package optionally catch."""
    # -P and the parent's own path: the same packages as here, and not what lies in the current directory by chance.
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-W", "ignore", "-c", _RUN, code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"error": "Timeout", "text": f"no answer within {timeout:g} s"}
    except (ValueError, IndexError):
        return {"error": "Crash", "text": f"python ended with exit code {done.returncode} at import"}
    except OSError as error:
        return {"error": type(error).__name__, "text": str(error)}


def examine() -> Facts:
    """Run every probe; the answers by name. A package that is not there at all answers None."""
    codes = {
        "megatron": ("megatron.core", _MEGATRON),
        "torch": ("torch", _TORCH),
        "transformer_engine": ("transformer_engine", _TRANSFORMER_ENGINE),
        "dali": ("nvidia.dali", _DALI),
        "triton": ("triton", _MODULE.format("triton")),
        "resvg_py": ("resvg_py", _MODULE.format("resvg_py")),
    }
    codes |= {module: (module, _MODULE.format(module)) for module in PLAIN}
    with ThreadPoolExecutor(max(2, min(4, cores()))) as pool:
        answers = {name: pool.submit(probe, code) for name, (module, code) in codes.items() if installed(module)}
        return {name: answers[name].result() if name in answers else None for name in codes}


def installed(module: str) -> bool:
    """Whether `module`, of which only namespace packages may be parents, can be found; nothing of it is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
