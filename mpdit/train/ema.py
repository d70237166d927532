"""Averages of the weights: the exponential moving one, and power-function ones of which others are made later.

Kept in fp32, sharded as the weights are. In bf16 runs they average the bf16 weights that the network computes with, not
their fp32 masters.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpdit.parallel import groups
from mpdit.train import profiles


class EMA:
    """Of the parameters of this rank's chunks, by name. Starts from their present values.

    `widths`: those of the power-function averages kept beside it, `split` theirs alone (:class:`PowerAverages`).
    """

    def __init__(
        self, chunks: Sequence[Any], decay: float, widths: Sequence[float] = (), *, split: bool = False
    ) -> None:
        self.decay = decay
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for chunk in chunks for name, parameter in chunk.module.named_parameters()
        }
        self.values: dict[str, Tensor] = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self.power = PowerAverages(self.parameters, widths, split=split)

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay * ema + (1 - decay) * weights; and the power-function averages."""
        weights = {name: p.detach().float() for name, p in self.parameters.items()}
        torch._foreach_lerp_(list(self.values.values()), list(weights.values()), 1 - self.decay)
        self.power.update(weights)

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


class PowerAverages:
    """Power-function averages (profiles.py) of several widths, of the parameters by name.

    `updates` counts since the run began: steps that were skipped, and so not averaged, do not count. `split`: each rank
    that holds the same parameters keeps an equal part of each average, as a distributed optimizer does of its state;
    :meth:`whole` puts them together.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], widths: Sequence[float], *, split: bool = False) -> None:
        self.widths, self.updates = tuple(widths), 0
        self._parameters = parameters
        self._parts = (groups.replica_rank(), groups.replicas()) if split else (0, 1)
        self._gammas = [profiles.exponent(width) for width in self.widths]
        self._values = [{n: self._own(p.detach().float()).clone() for n, p in parameters.items()} for _ in self.widths]

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """average <- beta * average + (1 - beta) * weights, with the beta of this update; the first one is a copy."""
        self.updates += 1
        own = [self._own(weight) for weight in weights.values()] if self.widths else []
        for gamma, values in zip(self._gammas, self._values, strict=True):
            torch._foreach_lerp_(list(values.values()), own, profiles.fresh(gamma, self.updates))

    def whole(self, width: float, name: str) -> Tensor:
        """An average in the shape of its parameter, fp32, on every rank; collective where the ranks keep parts."""
        value, parameter = self._values[self.widths.index(width)][name], self._parameters[name]
        if self._parts[1] > 1:
            padded = torch.zeros(self._part(parameter.numel()), dtype=value.dtype, device=value.device)
            padded[: value.numel()] = value
            value = groups.join_replicas(padded)[: parameter.numel()]
        return value.view(parameter.shape)

    def restore(self, width: float, name: str, whole: Tensor) -> None:
        """The inverse of :meth:`whole`."""
        self._values[self.widths.index(width)][name].copy_(self._own(whole))

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor, flat; a view."""
        size = self._part(whole.numel())
        return whole.reshape(-1)[self._parts[0] * size : (self._parts[0] + 1) * size]

    def _part(self, count: int) -> int:
        return -(-count // self._parts[1])
