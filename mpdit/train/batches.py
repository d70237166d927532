"""From samples to what the network is asked and what it should answer. The only place where data meets objective."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mpdit import objective
from mpdit.config import Config, Objective
from mpdit.data import buckets, loader
from mpdit.data.loader import Loader
from mpdit.data.mixture import Mixture
from mpdit.data.plan import Plan
from mpdit.data.quarantine import Bad
from mpdit.data.text import Tokenizer
from mpdit.models import repa
from mpdit.models.layers import Inputs, patchify
from mpdit.objective import draws
from mpdit.objective.repa import Teacher
from mpdit.parallel import accel, groups, stages, tokens


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro-batch of `size` images of height x width pixels (or latent pixels), the same in all of a step. Stages in
    the middle of the pipeline have neither inputs nor target, unless REPA teaches a block there."""

    size: int
    height: int
    width: int
    inputs: Inputs | None = None
    target_SBP: dict[str, Tensor] | None = None  # what the objective compares with, as tokens
    weight_B: Tensor | None = None  # of each image in the loss; None: all one
    sample_key: int = 0  # of the (sample id, visit) pairs in it, whatever their order; sums over micro-batches


def loss(config: Config, prediction_SBK: Tensor, batch: Batch) -> Tensor:
    """The objective's mean over this context rank's tokens, in fp32."""
    assert batch.target_SBP is not None
    assert batch.inputs is not None
    model = config.model
    loss_B = objective.of(config.objective.kind).loss(
        prediction_SBK,
        batch.target_SBP,
        batch.inputs.time_B,
        learn_sigma=model.learn_sigma,
        channels=model.channels,
    )
    return (loss_B if batch.weight_B is None else loss_B * batch.weight_B).mean()


def sample_key(sample_ids: np.ndarray, visits: np.ndarray) -> int:
    """A number that tells sets of (sample id, visit) apart and adds over their parts, modulo 2^48."""
    pairs = zip(sample_ids.tolist(), visits.tolist(), strict=True)
    digests = (hashlib.blake2b(f"{i}/{v}".encode(), digest_size=6).digest() for i, v in pairs)
    return sum(int.from_bytes(d, "little") for d in digests) % 2**48


def batch_of(
    config: Config,
    tokenizer: Tokenizer,
    images_BCHW: Tensor,
    captions: Sequence[str],
    sample_ids: np.ndarray,
    visits: np.ndarray,
    *,
    drop_captions: bool,
) -> Batch:
    """Drop captions, as (seed, sample id, visit) says, and noise images."""
    if drop_captions:
        dropped = draws.uniform(config.train.seed, "caption drop", sample_ids, visits) < config.data.caption_drop
        captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    text_BL = torch.from_numpy(tokenizer.encode(captions, config.model.text_tokens))
    device = accel.device()
    return noised_batch(config, images_BCHW.to(device), text_BL.to(device), sample_ids, visits)


def noised_batch(
    config: Config, images_BCHW: Tensor, text_BL: Tensor, sample_ids: np.ndarray, visits: np.ndarray
) -> Batch:
    """The objective's question and answer, noised as (seed, sample id, visit) says; tensors on the device."""
    kind = objective.of(config.objective.kind)
    pair = kind.noised(images_BCHW, config.objective, config.train.seed, sample_ids, visits)
    return Batch(
        size=len(sample_ids),
        height=images_BCHW.shape[2],
        width=images_BCHW.shape[3],
        inputs=Inputs(image_BCHW=pair.noisy_BCHW, time_B=pair.time_B, text_BL=text_BL),
        target_SBP={
            name: tokens.own_context(patchify(target_BCHW, config.model.patch))
            for name, target_BCHW in pair.target.items()
        },
        sample_key=sample_key(sample_ids, visits),
    )


def own_teacher(config: Config) -> Teacher | None:
    """REPA's, on the stage with the block that it teaches; None elsewhere, and where REPA is off."""
    model = config.model
    if not config.objective.repa_weight or not stages.holds(config, repa.block_index(config)):
        return None
    return _opened(config.objective, model.patch, model.channels, accel.device())


@functools.lru_cache(maxsize=1)
def _opened(asked: Objective, patch: int, channels: int, device: torch.device) -> Teacher:
    return Teacher.open(asked, patch, channels, device)


def with_features(batch: Batch, teacher: Teacher, images_BCHW: Tensor) -> Batch:
    """`batch`, whose clean images are `images_BCHW`, with what REPA compares this context rank's tokens with."""
    assert batch.inputs is not None
    features_SBF = tokens.own_context(teacher.features(images_BCHW.to(accel.device())))
    return dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, teacher_SBF=features_SBF))


class TrainFeed:
    """This rank's micro-batches, step after step from `start_step`. Threads start here: build it after any fork."""

    def __init__(self, config: Config, shards: Mixture, plan: Plan, tokenizer: Tokenizer, start_step: int) -> None:
        self.config, self.tokenizer, self.plan, self.step = config, tokenizer, plan, start_step
        self.micro_batches = plan.share(groups.data_size(), config.parallel.micro_batch) // config.parallel.micro_batch
        self.teacher = own_teacher(config)
        self.loader: Loader | None = None
        if groups.is_first_stage() or groups.is_last_stage() or self.teacher is not None:
            self.loader = Loader(
                shards,
                plan,
                micro_batch=config.parallel.micro_batch,
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

    def next(self) -> list[Batch]:
        """The micro-batches of the next step."""
        height, width = self.plan.height_width(self.step)
        self.step += 1
        if self.loader is None:
            empty = Batch(size=self.config.parallel.micro_batch, height=height, width=width)
            return [empty] * self.micro_batches
        return [self._micro_batch(self.loader) for _ in range(self.micro_batches)]

    def _micro_batch(self, loader: Loader) -> Batch:
        m = loader.next()
        ids, visits = m.sample_ids.numpy(), m.visits.numpy()
        batch = batch_of(self.config, self.tokenizer, m.images, m.captions, ids, visits, drop_captions=True)
        batch = dataclasses.replace(batch, sample_key=sample_key(m.read_ids.numpy(), visits))
        return batch if self.teacher is None else with_features(batch, self.teacher, m.images)

    def take_bad(self) -> list[Bad]:
        """Samples that this rank has found damaged since the last call, each once."""
        return [] if self.loader is None else self.loader.take_bad()

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


def validation_samples(shards: Mixture, count: int) -> np.ndarray:
    """Up to `count` sample ids, spread evenly over the set: the same in every layout."""
    return np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).round().astype(np.int64))


def validation_batches(config: Config, shards: Mixture, tokenizer: Tokenizer) -> list[list[Batch]]:
    """This rank's share of the validation set with fixed noise and times: a list of micro-batches for each shape.

    Each list is padded with weightless images to divide. Losses are weighted so that those of all lists add up to the
    mean over all images.
    """
    ids = validation_samples(shards, config.train.val_images)
    sizes = buckets.of_config(config)
    number = buckets.nearest_bucket(shards.sizes[ids], sizes)
    return [
        list(_fixed_batches(config, shards, tokenizer, size, *_share(config, ids[number == n], len(ids))))
        for n, size in enumerate(sizes)
        if (number == n).any()
    ]


def _share(config: Config, ids: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the samples of one shape this rank's, padded, and their weights in the mean over all `images`."""
    ranks, rounds = groups.data_size(), config.parallel.pp if config.parallel.vpp > 1 else 1
    unit = config.parallel.micro_batch * ranks * rounds
    padded = np.resize(ids, -(-len(ids) // unit) * unit)
    weight = np.where(np.arange(len(padded)) < len(ids), len(padded) / images, 0.0)
    share = slice(*(len(padded) // ranks * r for r in (groups.data_rank(), groups.data_rank() + 1)))
    return padded[share], weight[share]


def _fixed_batches(
    config: Config, shards: Mixture, tokenizer: Tokenizer, image: buckets.Size, ids: np.ndarray, weight: np.ndarray
) -> Iterator[Batch]:
    size, (height, width) = config.parallel.micro_batch, image
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        if not (groups.is_first_stage() or groups.is_last_stage()):
            yield Batch(size=size, height=height, width=width)
            continue
        images_BCHW, captions, bad = loader.fixed(
            shards, ids[part].tolist(), image, channels=config.model.channels, device=accel.device()
        )
        for sample in bad:
            print(f"mpdit: {sample.where}: {sample.reason}; validation takes the next sample instead", flush=True)
        visits = np.full(size, draws.VALIDATION_VISIT)
        batch = batch_of(config, tokenizer, images_BCHW, captions, ids[part], visits, drop_captions=False)
        yield dataclasses.replace(batch, weight_B=torch.from_numpy(weight[part]).float().to(accel.device()))
