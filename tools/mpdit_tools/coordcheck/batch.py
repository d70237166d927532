"""The one batch that every run of a check trains on: made up, or the first of a data set."""

import numpy as np
import torch
from torch import Tensor

from mpdit.config import Config
from mpdit.data.decode import decode
from mpdit.parallel import accel, groups
from mpdit.train import batches
from mpdit.train.batches import Batch
from mpdit.train.sets import Sets


def fixed_batch(config: Config, *, from_data: bool) -> list[Batch]:
    """This rank's micro-batches of ``train.batch_size`` images, the same images in every layout and at every width."""
    size, total = config.parallel.micro_batch, config.train.batch_size
    share = total // groups.data_size()
    images_BCHW, text_BL = _first_of_data(config) if from_data else _made_up(config)
    starts = range(groups.data_rank() * share, (groups.data_rank() + 1) * share, size)
    ids, teacher, found = np.arange(total), batches.own_teacher(config), []
    for start in starts:
        part = slice(start, start + size)
        clean_BCHW, text = images_BCHW[part].to(accel.device()), text_BL[part].to(accel.device())
        batch = batches.noised_batch(config, clean_BCHW, text, ids[part], np.zeros(size, np.int64))
        found.append(batch if teacher is None else batches.with_features(batch, teacher, clean_BCHW))
    return found


def _made_up(config: Config) -> tuple[Tensor, Tensor]:
    """Bright spots whose place depends on the text, on a dark ground [B, C, H, W]; token ids [B, L] of many lengths.

    Like digits or icons, and unlike noise, the images have much in common: where gradients of a batch agree, what an
    update adds up to follows its limit at widths of a few dozen already.
    """
    model, total = config.model, config.train.batch_size
    generator = torch.Generator().manual_seed(1)
    text_BL = torch.randint(1, model.vocab_size, (total, model.text_tokens), generator=generator)
    if model.text_tokens > 1:
        length_B = torch.randint(1, model.text_tokens + 1, (total,), generator=generator)
        text_BL[torch.arange(model.text_tokens) >= length_B[:, None]] = 0
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, model.image_size) for _ in range(2)), indexing="ij")
    angle_B = text_BL[:, 0, None, None] * 2.4
    distance_BHW = (x - angle_B.cos() / 2).square() + (y - angle_B.sin() / 2).square()
    bright_BC = torch.rand(total, model.channels, 1, 1, generator=generator)
    return 2 * bright_BC * torch.exp(-8 * distance_BHW)[:, None] - 1, text_BL


def _first_of_data(config: Config) -> tuple[Tensor, Tensor]:
    """The first batch of the plan of ``data.path``."""
    sets, model = Sets.open(config), config.model
    ids = sets.plan.batch(0).sample_ids
    encoded, captions = zip(*(sets.train.read(int(i)) for i in ids), strict=True)
    images_BCHW = decode(encoded, model.image_size, model.image_size, channels=model.channels)
    return images_BCHW, torch.from_numpy(sets.tokenizer.encode(captions, model.text_tokens))
