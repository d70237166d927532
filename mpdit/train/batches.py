"""From samples to what the network is asked and what it should answer. The only place where data meets objective."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mpdit.config import Config
from mpdit.data.decode import Loader, decode
from mpdit.data.plan import Plan
from mpdit.data.shards import Shards
from mpdit.data.text import Tokenizer
from mpdit.models.layers import Inputs, patchify
from mpdit.objective import draws, flow
from mpdit.parallel import accel, groups, tokens


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlowBatch:
    """A micro-batch of `size` images. Stages in the middle of the pipeline have neither inputs nor target."""

    size: int
    inputs: Inputs | None = None
    target_SBP: Tensor | None = None
    weight_B: Tensor | None = None  # of each image in the loss; None: all one
    sample_key: int = 0  # of the (sample id, visit) pairs in it, whatever their order; sums over micro-batches


def loss(prediction_SBP: Tensor, batch: FlowBatch) -> Tensor:
    """Mean squared error of the velocity over this context rank's tokens, in fp32."""
    assert batch.target_SBP is not None
    error_SBP = (prediction_SBP.float() - batch.target_SBP).square()
    if batch.weight_B is None:
        return error_SBP.mean()
    return (error_SBP.mean((0, 2)) * batch.weight_B).mean()


def sample_key(sample_ids: np.ndarray, visits: np.ndarray) -> int:
    """A number that tells sets of (sample id, visit) apart and adds over their parts, modulo 2^48."""
    pairs = zip(sample_ids.tolist(), visits.tolist(), strict=True)
    digests = (hashlib.blake2b(f"{i}/{v}".encode(), digest_size=6).digest() for i, v in pairs)
    return sum(int.from_bytes(d, "little") for d in digests) % 2**48


def flow_batch(
    config: Config,
    tokenizer: Tokenizer,
    images_BCHW: Tensor,
    captions: Sequence[str],
    sample_ids: np.ndarray,
    visits: np.ndarray,
    *,
    drop_captions: bool,
) -> FlowBatch:
    """Noise images and drop captions, as (seed, sample id, visit) says."""
    seed, device = config.train.seed, accel.device()
    pair = flow.noised(images_BCHW.to(device), config.objective, seed, sample_ids, visits)
    if drop_captions:
        dropped = draws.uniform(seed, "caption drop", sample_ids, visits) < config.data.caption_drop
        captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    text_BL = torch.from_numpy(tokenizer.encode(captions, config.model.text_tokens))
    return FlowBatch(
        size=len(sample_ids),
        inputs=Inputs(image_BCHW=pair.noisy_BCHW, time_B=pair.time_B, text_BL=text_BL.to(device)),
        target_SBP=tokens.own_context(patchify(pair.target_BCHW, config.model.patch)),
        sample_key=sample_key(sample_ids, visits),
    )


class TrainFeed:
    """This rank's micro-batches, step after step from `start_step`. Threads start here: build it after any fork."""

    def __init__(self, config: Config, shards: Shards, plan: Plan, tokenizer: Tokenizer, start_step: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.micro_batches = plan.share(groups.data_size(), config.parallel.micro_batch) // config.parallel.micro_batch
        self.loader: Loader | None = None
        if groups.is_first_stage() or groups.is_last_stage():
            self.loader = Loader(
                shards,
                plan,
                micro_batch=config.parallel.micro_batch,
                image_size=config.model.image_size,
                channels=config.model.channels,
                dp_rank=groups.data_rank(),
                dp_size=groups.data_size(),
                mirror=self._mirror if config.data.mirror else None,
                workers=config.data.workers,
                device=accel.device(),
                start_step=start_step,
            )

    def _mirror(self, sample_ids: np.ndarray, visits: np.ndarray) -> np.ndarray:
        return draws.uniform(self.config.train.seed, "mirror", sample_ids, visits) < 0.5

    def next(self) -> list[FlowBatch]:
        """The micro-batches of the next step."""
        return [self._micro_batch() for _ in range(self.micro_batches)]

    def _micro_batch(self) -> FlowBatch:
        if self.loader is None:
            return FlowBatch(size=self.config.parallel.micro_batch)
        m = self.loader.next()
        ids, visits = m.sample_ids.numpy(), m.visits.numpy()
        return flow_batch(self.config, self.tokenizer, m.images, m.captions, ids, visits, drop_captions=True)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


def validation_samples(shards: Shards, count: int) -> np.ndarray:
    """Up to `count` sample ids, spread evenly over the set: the same in every layout."""
    return np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).round().astype(np.int64))


def validation_batches(config: Config, shards: Shards, tokenizer: Tokenizer) -> list[FlowBatch]:
    """This rank's share of the validation set with fixed noise and times; padded with weightless images to divide."""
    ids = validation_samples(shards, config.train.val_images)
    size, ranks = config.parallel.micro_batch, groups.data_size()
    rounds = config.parallel.pp if config.parallel.vpp > 1 else 1
    unit = size * ranks * rounds
    padded = np.resize(ids, -(-len(ids) // unit) * unit)
    weight = np.where(np.arange(len(padded)) < len(ids), len(padded) / len(ids), 0.0)
    share = slice(*(len(padded) // ranks * r for r in (groups.data_rank(), groups.data_rank() + 1)))
    return list(_fixed_batches(config, shards, tokenizer, padded[share], weight[share]))


def _fixed_batches(
    config: Config, shards: Shards, tokenizer: Tokenizer, ids: np.ndarray, weight: np.ndarray
) -> Iterator[FlowBatch]:
    size, side = config.parallel.micro_batch, config.model.image_size
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        if not (groups.is_first_stage() or groups.is_last_stage()):
            yield FlowBatch(size=size)
            continue
        encoded, captions = zip(*(shards.read(int(i)) for i in ids[part]), strict=True)
        names = [shards.where(int(i)) for i in ids[part]]
        images_BCHW = decode(encoded, side, side, channels=config.model.channels, names=names, device=accel.device())
        visits = np.full(size, draws.VALIDATION_VISIT)
        batch = flow_batch(config, tokenizer, images_BCHW, captions, ids[part], visits, drop_captions=False)
        yield dataclasses.replace(batch, weight_B=torch.from_numpy(weight[part]).float().to(accel.device()))
