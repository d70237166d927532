"""The batches that every run of a check trains on: made up, or those of a data set."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from mpdit.config import Config
from mpdit.data.decode import decode
from mpdit.parallel import accel, groups
from mpdit.train import batches, views
from mpdit.train.batches import Batch
from mpdit.train.sets import Sets

_WORDS = 64  # different made-up tokens of a text encoder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Samples:
    """What noise is added to, the text, and REPA's features of the pictures."""

    clean_BCHW: Tensor
    text_BL: Tensor  # ids, or features [B, L, F]
    pooled_BP: Tensor | None = None
    features_SBF: Tensor | None = None


def fixed_batch(config: Config, *, from_data: bool, step: int = 0) -> list[Batch]:
    """This rank's micro-batches of ``train.batch_size`` images, the same images in every layout and at every width.

    Another `step` has other images, noise and times.
    """
    size, total = config.parallel.micro_batch, config.train.batch_size
    share = total // groups.data_size()
    samples = _of_data(config, step) if from_data else _made_up(config, step)
    starts = range(groups.data_rank() * share, (groups.data_rank() + 1) * share, size)
    ids, device, found = np.arange(total), accel.device(), []
    for start in starts:
        part = slice(start, start + size)
        clean_BCHW, text_BL = samples.clean_BCHW[part].to(device), samples.text_BL[part].to(device)
        pooled_BP = None if samples.pooled_BP is None else samples.pooled_BP[part].to(device)
        batch = batches.noised_batch(config, clean_BCHW, text_BL, ids[part], np.full(size, step), pooled_BP)
        features = samples.features_SBF
        found.append(batch if features is None else batches.with_features(batch, features[:, part]))
    return found


def _made_up(config: Config, step: int) -> _Samples:
    """Bright spots whose place depends on the text, on a dark ground [B, C, H, W]; tokens [B, L] of many lengths.

    Like digits or icons, and unlike noise, the images have much in common: where gradients of a batch agree, what an
    update adds up to follows its limit at widths of a few dozen already.
    """
    model, total = config.model, config.train.batch_size
    generator = torch.Generator().manual_seed(1 + step)
    of_encoder = model.text_dim and model.arch != "dit"
    text_BL = torch.randint(
        1, _WORDS if of_encoder else model.vocab_size, (total, model.text_tokens), generator=generator
    )
    if model.text_tokens > 1:
        length_B = torch.randint(1, model.text_tokens + 1, (total,), generator=generator)
        text_BL[torch.arange(model.text_tokens) >= length_B[:, None]] = 0
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, model.image_size) for _ in range(2)), indexing="ij")
    angle_B = text_BL[:, 0, None, None] * 2.4
    distance_BHW = (x - angle_B.cos() / 2).square() + (y - angle_B.sin() / 2).square()
    bright_BC = torch.rand(total, model.channels, 1, 1, generator=generator)
    clean_BCHW = 2 * bright_BC * torch.exp(-8 * distance_BHW)[:, None] - 1
    teacher, words = views.own_teacher(config), None
    if of_encoder:
        words = torch.randn(_WORDS, model.text_dim, generator=generator).index_fill(0, torch.tensor(0), 0.0)
    return _Samples(
        clean_BCHW=clean_BCHW,
        text_BL=text_BL if words is None else words[text_BL],
        pooled_BP=torch.randn(total, model.pooled_dim, generator=generator) if model.pooled_dim else None,
        features_SBF=None if teacher is None else teacher.features(clean_BCHW.to(accel.device())),
    )


def _of_data(config: Config, step: int) -> _Samples:
    """The batch of a step of the plan of ``data.path``."""
    sets = Sets.open(config)
    seen, ids = views.Views(config, sets.train), sets.plan.batch(step).sample_ids
    encoded, captions = zip(*(sets.train.read(int(i)) for i in ids), strict=True)
    side = config.model.image_size * seen.factor
    images_BCYX = decode(encoded, side, side, channels=seen.channels)
    visits, flipped = np.zeros_like(ids), np.zeros(len(ids), bool)
    text_BL, pooled_BP = batches.encode(config, sets.tokenizer, captions)
    return _Samples(
        clean_BCHW=seen.clean(images_BCYX, ids, ids, visits, flipped),
        text_BL=text_BL,
        pooled_BP=pooled_BP,
        features_SBF=seen.features(images_BCYX, ids, flipped) if seen.teaches else None,
    )
