"""What every objective makes of a batch of images."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Noised:
    """What the network sees [B, C, H, W], the time it is told [B], and what the loss needs; all fp32."""

    noisy_BCHW: Tensor
    time_B: Tensor  # in [0, 1]; ddpm: the timestep / 1000
    target: dict[str, Tensor]  # by name, each [B, C, H, W]; flow: velocity; ddpm: noise, clean, noisy
