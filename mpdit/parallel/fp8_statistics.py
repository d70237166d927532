"""What FP8 makes of the tensors of a network, counted while it runs. Off unless asked for: nothing is counted then."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mpdit.parallel import fp8
from mpdit.parallel.fp8 import Name
from mpdit_kernels.fp8 import Quantized, largest

Key = tuple[str, Name]  # the linear's name; x, w or dy
_ROUNDED = 1 + 2.0**-20  # a scale's last bit takes the largest value beyond the format's largest, and it is no loss


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Of one tensor, over as many passes as were counted; sums, which add over ranks too."""

    nonzero: float = 0.0
    underflowed: float = 0.0  # not zero, but their codes are
    saturated: float = 0.0  # beyond the largest code
    squares: float = 0.0
    squared_errors: float = 0.0
    amax: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        summed = {key: mine[key] + theirs[key] for key in mine if key != "amax"}
        return Tally(amax=max(self.amax, other.amax), **summed)

    @property
    def underflow(self) -> float:
        """Share of the numbers that are not zero."""
        return self.underflowed / self.nonzero if self.nonzero else 0.0

    @property
    def saturation(self) -> float:
        """Share of the numbers that are not zero."""
        return self.saturated / self.nonzero if self.nonzero else 0.0

    @property
    def error(self) -> float:
        """Root mean square of what rounding changed, over that of the tensor."""
        return math.sqrt(self.squared_errors / self.squares) if self.squares else 0.0


def tally(x_RC: Tensor, quantised: Quantized) -> Tensor:
    """The numbers of a :class:`Tally`, fp64 [6], on the tensor's device."""
    x_RC = x_RC.detach().float()
    back_RC, nonzero = quantised.dequantized(), x_RC != 0
    ceiling = Quantized(
        codes=torch.full_like(x_RC, largest(quantised.codes.dtype)).to(quantised.codes.dtype),
        inverse=quantised.inverse,
        block=quantised.block,
    ).dequantized()
    sums = [
        nonzero.sum(),
        (nonzero & (back_RC == 0)).sum(),
        (x_RC.abs() > ceiling * _ROUNDED).sum(),
        x_RC.square().sum(dtype=torch.float64),
        (back_RC - x_RC).square().sum(dtype=torch.float64),
        x_RC.abs().amax(),
    ]
    return torch.stack([one.double() for one in sums])


@contextlib.contextmanager
def counted(stages: Sequence[nn.Module]) -> Iterator[dict[Key, Tally]]:
    """Within, all that this rank's FP8 linears quantise is counted; afterwards the dict holds it.

    Of the operands along their rows: those of the forward product and of the input's gradient.
    """
    found: dict[Key, Tally] = {}
    sums: dict[Key, Tensor] = {}
    watched = dict(fp8.products(stages))

    def watch(linear: str) -> fp8.Watch:
        def add(name: Name, x_RC: Tensor, quantised: Quantized) -> None:
            new, key = tally(x_RC, quantised), (linear, name)
            old = sums.get(key, torch.zeros_like(new))
            sums[key] = torch.cat([old[:-1] + new[:-1], torch.maximum(old[-1:], new[-1:])])

        return add

    for name, product in watched.items():
        product.watch = watch(name)
    try:
        yield found
    finally:
        for product in watched.values():
            product.watch = None
    fields = [field.name for field in dataclasses.fields(Tally)]
    found |= {key: Tally(**dict(zip(fields, values.tolist(), strict=True))) for key, values in sums.items()}
