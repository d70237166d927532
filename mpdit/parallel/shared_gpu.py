"""Several ranks on one GPU, to try a layout where GPUs are few (`parallel.share_gpu`).

NCCL refuses a device that has a rank already; gloo takes it, and copies what it reduces and gathers through the host.
What it sends and receives it would read at the device's addresses as if they were the host's: copies are made here.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

_isend, _irecv = dist.isend, dist.irecv


class _Receiving:
    """Of a tensor that :meth:`wait` fills."""

    def __init__(self, work: Any, arrived: Tensor, tensor: Tensor) -> None:
        self._work, self._arrived, self._tensor = work, arrived, tensor

    def wait(self, *arguments: Any) -> bool:
        self._work.wait(*arguments)
        self._tensor.detach().copy_(self._arrived)
        return True

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


def isend(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """As torch.distributed.isend. The tensor may change once this returns."""
    return _isend(tensor.detach().to("cpu", copy=True), *arguments, **keywords)


def irecv(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """As torch.distributed.irecv. The tensor is filled by the wait."""
    arrived = torch.empty_like(tensor, device="cpu", requires_grad=False)
    return _Receiving(_irecv(arrived, *arguments, **keywords), arrived, tensor)


def use() -> None:
    """From now on, for megatron-core, which finds these functions in torch.distributed at each call."""
    modules: tuple[Any, ...] = (dist, distributed_c10d)  # the second checks that the first's are its own
    for module in modules:
        module.isend, module.irecv = isend, irecv
