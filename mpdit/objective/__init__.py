"""What is learned: noisy images and targets, their losses, and draws keyed by sample. One module an objective."""

from typing import Protocol

import numpy as np
from torch import Tensor

from mpdit.config import Objective
from mpdit.objective import ddpm, flow
from mpdit.objective.noising import Noised

__all__ = ["Kind", "Noised", "of"]


class Kind(Protocol):
    """What an objective's module offers; `learn_sigma` and `channels` say how a prediction is laid out."""

    def noised(
        self, images_BCHW: Tensor, objective: Objective, seed: int, sample_ids: np.ndarray, visits: np.ndarray
    ) -> Noised: ...

    def loss(
        self, prediction_SBK: Tensor, target_SBP: dict[str, Tensor], time_B: Tensor, *, learn_sigma: bool, channels: int
    ) -> Tensor: ...


_KINDS: dict[str, Kind] = {"flow": flow, "ddpm": ddpm}


def of(kind: str) -> Kind:
    """The module of an objective by its name in the config, ``objective.kind``."""
    return _KINDS[kind]
