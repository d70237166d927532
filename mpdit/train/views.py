"""What network and teacher see of a split's samples: pixels, latents, features; computed now, or out of caches.

Shapes: B samples, C channels of the network's images, H x W of their pixels or latent pixels, S tokens, F features.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from mpdit.config import Config, Objective
from mpdit.data.cache import Cache
from mpdit.data.mixture import Mixture
from mpdit.models import repa
from mpdit.objective import draws
from mpdit.objective.repa import Teacher
from mpdit.parallel import accel, groups, stages
from mpdit.train import cached


class Views:
    """Of one split, for one rank."""

    def __init__(self, config: Config, shards: Mixture) -> None:
        """Loads no weights. Raises InputError as the caches do, see mpdit.train.cached."""
        self.config = config
        self.in_network = groups.is_first_stage() or groups.is_last_stage()
        self.autoencoder = cached.autoencoder(config, shards)
        space = self.autoencoder.space if self.autoencoder else None
        self.channels = space.pixel_channels if space else config.model.channels  # of pictures
        self.factor = space.factor if space else 1  # pixels a side of what the network sees as one
        self._latents = cached.open_latents(config, shards) if self.in_network else None
        self.teaches = shards.split == "train" and _teaches(config)
        self._features = cached.open_features(config, shards) if self.teaches else None

    @property
    def pictures(self) -> bool:
        """Whether any rank has to decode pictures."""
        return self.config.data.latents is None or self.config.data.cache is None

    @property
    def need_pixels(self) -> bool:
        """Whether this one has to."""
        return (self.in_network and self._latents is None) or (self.teaches and self._features is None)

    def clean(
        self, images_BCYX: Tensor, read_ids: np.ndarray, ids: np.ndarray, visits: np.ndarray, mirrored: np.ndarray
    ) -> Tensor:
        """What the objective adds noise to [B, C, H, W], on the device; fp32. `read_ids`: whose pictures these are.

        A latent's place in its posterior is f(seed, sample id, visit), as noise and time are.
        """
        if self.autoencoder is None:
            return images_BCYX.to(accel.device())
        if self._latents is None:
            moments = self.autoencoder.moments(images_BCYX)
        else:
            rows = _rows(self.config, self._latents, read_ids, mirrored)
            moments = torch.stack([torch.from_numpy(row.reshape(shape)) for row, shape in rows]).to(accel.device())
        shape = (self.autoencoder.space.channels, *moments.shape[2:])
        noise = draws.noise(self.config.train.seed, ids, visits, shape, purpose="latent").to(accel.device())
        return self.autoencoder.space.latent(moments, noise)

    def features(self, images_BCYX: Tensor, read_ids: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """REPA's teacher's [S, B, F] of the clean pictures, on the device; fp32."""
        if self._features is None:
            return _teacher(self.config, self.channels, self.factor).features(images_BCYX.to(accel.device()))
        rows = _rows(self.config, self._features, read_ids, mirrored)
        features_BSF = torch.stack([torch.from_numpy(row.reshape(shape)) for row, shape in rows])
        return features_BSF.to(accel.device()).float().transpose(0, 1).contiguous()


def own_teacher(config: Config) -> Teacher | None:
    """REPA's, on the stage with the block that it teaches, for images in pixel space; None elsewhere."""
    return _teacher(config, config.model.channels, 1) if _teaches(config) else None


def mirrored(config: Config, sample_ids: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Which pictures are flipped left to right, bool (B,)."""
    if not config.data.mirror:
        return np.zeros(len(sample_ids), bool)
    return draws.uniform(config.train.seed, "mirror", sample_ids, visits) < 0.5


def _teaches(config: Config) -> bool:
    return bool(config.objective.repa_weight) and stages.holds(config, repa.block_index(config))


def _teacher(config: Config, channels: int, factor: int) -> Teacher:
    return _opened(config.objective, config.model.patch * factor, channels, accel.device())


@functools.lru_cache(maxsize=1)
def _opened(asked: Objective, patch: int, channels: int, device: torch.device) -> Teacher:
    return Teacher.open(asked, patch, channels, device)


def _rows(
    config: Config, cache: Cache, ids: np.ndarray, mirrored: np.ndarray
) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    pairs = zip(ids.tolist(), mirrored.tolist(), strict=True)
    return [cache.row(cached.row_of(config, sample, flipped)) for sample, flipped in pairs]
