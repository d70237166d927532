"""Random numbers keyed by what they are for: f(seed, purpose, sample id, visit). The same in any layout and resume.

Drawn on the CPU, one generator a sample, so that neither the device nor the batch's composition matters.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

VALIDATION_VISIT = -1  # validation draws the same noise and time for a sample every time


def _key(seed: int, purpose: str, sample_id: int, visit: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{sample_id}/{visit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def noise(
    seed: int, sample_ids: np.ndarray, visits: np.ndarray, shape: tuple[int, ...], purpose: str = "noise"
) -> Tensor:
    """Standard normal, [B, *shape], fp32; `purpose` keeps the noises of one sample independent."""
    drawn = torch.empty(len(sample_ids), *shape)
    generator = torch.Generator()
    for row, sample_id, visit in zip(drawn, sample_ids, visits, strict=True):
        generator.manual_seed(_key(seed, purpose, int(sample_id), int(visit)) >> 1)
        row.normal_(generator=generator)
    return drawn


def uniform(seed: int, purpose: str, sample_ids: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Uniform in (0, 1), [B], fp64; `purpose` keeps drops, flips and times of one sample independent."""
    keys = [_key(seed, purpose, int(s), int(v)) for s, v in zip(sample_ids, visits, strict=True)]
    return np.minimum((np.array([k >> 11 for k in keys], dtype=np.float64) + 0.5) / 2.0**53, 1 - 2.0**-53)
