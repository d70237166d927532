"""Aspect-ratio buckets (SDXL: Podell et al., arXiv 2307.01952, section 2.3): which one an image is of.

Sizes are (height, width) pairs in pixels; N images.
"""

from collections.abc import Sequence

import numpy as np

from mpdit.config import Config

Size = tuple[int, int]


def of_config(config: Config) -> tuple[Size, ...]:
    """``data.buckets``, or the one square of ``model.image_size``."""
    side = config.model.image_size
    return tuple((height, width) for height, width in config.data.buckets) or ((side, side),)


def largest(config: Config) -> Size:
    """Of :func:`of_config` the one with the most pixels: what a step takes the most memory and time for."""
    return max(of_config(config), key=lambda size: size[0] * size[1])


def nearest_bucket(sizes_N2: np.ndarray, buckets: Sequence[Sequence[int]]) -> np.ndarray:
    """The number [N] of the bucket whose aspect ratio is nearest in its logarithm to each image's; ties: the first.

    Sizes are at least 1, and there is at least one bucket.
    """
    sizes, wanted = np.asarray(sizes_N2, np.float64).reshape(-1, 2), np.asarray(buckets, np.float64)
    # |log a - log b| orders as the larger over the smaller of the cross products, which are whole: ties are exact.
    tall, wide = sizes[:, :1] * wanted[:, 1], sizes[:, 1:] * wanted[:, 0]
    found: np.ndarray = np.argmin(np.maximum(tall, wide) / np.minimum(tall, wide), axis=1)
    return found
