"""What a step achieves: model FLOPs, tokens and images a second and rank, memory, and how long the pipeline is idle."""

import dataclasses
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mpdit import gpus
from mpdit.config import Config, Parallel
from mpdit.data import buckets
from mpdit.data.buckets import Size
from mpdit.parallel import accel, fp8_rules, groups
from mpdit.parallel.stages import Grid
from mpdit.parallel.timers import Timers
from mpdit.train import pieces
from mpdit.train.batches import Batch


class Meter:
    """Of one run, on every rank. The numbers of the slowest and fullest rank reach rank 0 by two of the run's flags
    (mpdit.train.control)."""

    def __init__(self, config: Config, timers: Timers | None, flops: Mapping[Size, int]) -> None:
        """`timers`: of a pipeline rank; `flops`: an image's, forward and backward, by its size."""
        self._config, self._timers, self._flops = config, timers, flops
        self._peak = peak_flops_s(config.parallel.precision)
        self.flags: dict[str, Callable[[], int]] = {"memory": _memory_mb}
        if timers is not None:
            self.flags["idle"] = lambda: round(1000 * timers.idle())

    def row(self, step_s: float, micro_batches: Sequence[Batch], agreed: Mapping[str, int]) -> dict[str, Any]:
        """Keys for the step's line of metrics.jsonl. `agreed`: the flags' largest values."""
        size = micro_batches[0].height, micro_batches[0].width
        images_per_s = self._config.train.batch_size / groups.world_size() / step_s
        tokens = Grid.of(self._config.model, *size).tokens + self._config.model.text_tokens
        found = {
            "images_per_s_per_gpu": _digits(images_per_s),
            "tokens_per_s_per_gpu": _digits(images_per_s * tokens),
            "memory_gb": agreed["memory"] / 1e3,
        }
        if size in self._flops:
            flops_s = images_per_s * self._flops[size]
            found["tflops_per_gpu"] = _digits(flops_s / 1e12)
            if self._peak is not None:
                found["mfu"] = _digits(flops_s / self._peak)
        if "idle" in agreed:
            found["bubble"] = agreed["idle"] / 1e3
        return found


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def flops_by_size(config: Config) -> dict[Size, int]:
    """An image's model FLOPs, forward and backward, nothing computed twice, for each bucket of a checked config.

    From the network's own code on tensors without memory, before this process is a rank of a job; nothing if it is.
    """
    if dist.is_initialized():
        return {}
    parallel = Parallel(precision=fp8_rules.stored(config.parallel.precision), micro_batch=1)
    alone = dataclasses.replace(config, parallel=parallel)
    return {size: pieces.flops_per_image(alone, pieces.measure(alone, size)) for size in buckets.of_config(config)}


def peak_flops_s(precision: str) -> float | None:
    """Of this rank's device; None for a CPU and for GPUs that are not known."""
    if not accel.is_cuda():
        return None
    gpu = gpus.named(torch.cuda.get_device_name())
    return None if gpu is None else gpu.flops_s(precision)


def _memory_mb() -> int:
    """The most that this process has held so far: of the GPU's memory, or of the machine's."""
    if accel.is_cuda():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)
