"""The exponential moving average of the weights: kept in fp32, sharded as the weights are.

In bf16 runs it averages the bf16 weights that the network computes with, not their fp32 masters.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Of the parameters of this rank's chunks, by name. Starts from their present values."""

    def __init__(self, chunks: Sequence[Any], decay: float) -> None:
        self.decay = decay
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for chunk in chunks for name, parameter in chunk.module.named_parameters()
        }
        self.values: dict[str, Tensor] = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay * ema + (1 - decay) * weights."""
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), weights, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model's weights are the average."""
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self.parameters.items()}
            for name, p in self.parameters.items():
                p.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(kept[name])
