"""From samples to what the network is asked and what it should answer. The only place where data meets objective."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from mpdit import objective
from mpdit.config import Config
from mpdit.data import buckets, loader
from mpdit.data.loader import Loader
from mpdit.data.mixture import Mixture
from mpdit.data.plan import Plan
from mpdit.data.quarantine import Bad
from mpdit.data.text import Tokenizer
from mpdit.data.undecoded import Undecoded
from mpdit.models.layers import Inputs, patchify
from mpdit.objective import draws
from mpdit.parallel import accel, groups, tokens
from mpdit.train import views
from mpdit.train.views import Views


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
    read_ids: tuple[int, ...] = ()  # whose pixels and captions these are, where this rank reads any


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
    clean_BCHW: Tensor,
    captions: Sequence[str],
    sample_ids: np.ndarray,
    visits: np.ndarray,
    *,
    drop_captions: bool,
) -> Batch:
    """Drop captions, as (seed, sample id, visit) says, and noise clean images, on the device."""
    if drop_captions:
        dropped = draws.uniform(config.train.seed, "caption drop", sample_ids, visits) < config.data.caption_drop
        captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    text_BL, pooled_BP = encode(config, tokenizer, captions)
    return noised_batch(config, clean_BCHW, text_BL, sample_ids, visits, pooled_BP)


def encode(config: Config, tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Ids or features of captions, and the pooled vectors that ``model.pooled_dim`` asks for; on the device.

    Features are zeros off the first stage: only the embedder wants them, and an encoder is no small thing to load.
    """
    if tokenizer.text_dim and not groups.is_first_stage():
        return torch.zeros(len(captions), 1, device=accel.device()), None
    text = tokenizer.text(captions, config.model.text_tokens)
    pooled = text.pooled_BP if config.model.pooled_dim else None
    device = accel.device()
    return torch.from_numpy(text.tokens_BL).to(device), None if pooled is None else torch.from_numpy(pooled).to(device)


def noised_batch(
    config: Config,
    images_BCHW: Tensor,
    text_BL: Tensor,
    sample_ids: np.ndarray,
    visits: np.ndarray,
    pooled_BP: Tensor | None = None,
) -> Batch:
    """The objective's question and answer, noised as (seed, sample id, visit) says; tensors on the device."""
    kind = objective.of(config.objective.kind)
    pair = kind.noised(images_BCHW, config.objective, config.train.seed, sample_ids, visits)
    return Batch(
        size=len(sample_ids),
        height=images_BCHW.shape[2],
        width=images_BCHW.shape[3],
        inputs=Inputs(image_BCHW=pair.noisy_BCHW, time_B=pair.time_B, text_BL=text_BL, pooled_BP=pooled_BP),
        target_SBP={
            name: tokens.own_context(patchify(target_BCHW, config.model.patch))
            for name, target_BCHW in pair.target.items()
        },
        sample_key=sample_key(sample_ids, visits),
    )


def with_features(batch: Batch, features_SBF: Tensor) -> Batch:
    """`batch` with what REPA compares this context rank's tokens with: the teacher's features of the clean images."""
    assert batch.inputs is not None
    own_SBF = tokens.own_context(features_SBF)
    return dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, teacher_SBF=own_SBF))


class TrainFeed:
    """This rank's micro-batches, step after step from `start_step`. Threads start here: build it after any fork."""

    def __init__(self, config: Config, shards: Mixture, plan: Plan, tokenizer: Tokenizer, start_step: int) -> None:
        self.config, self.tokenizer, self.plan, self.step = config, tokenizer, plan, start_step
        self.micro_batches = plan.share(groups.data_size(), config.parallel.micro_batch) // config.parallel.micro_batch
        self.views = Views(config, shards)
        self.loader: Loader | Undecoded | None = None
        place: dict[str, int] = {
            "micro_batch": config.parallel.micro_batch,
            "dp_rank": groups.data_rank(),
            "dp_size": groups.data_size(),
            "start_step": start_step,
        }
        if self.views.need_pixels:
            self.loader = Loader(
                shards,
                plan,
                factor=self.views.factor,
                channels=self.views.channels,
                mirror=functools.partial(views.mirrored, config) if config.data.mirror else None,
                workers=config.data.workers,
                device=accel.device(),
                **place,
            )
        elif self.views.in_network or self.views.teaches:
            self.loader = Undecoded(shards, plan, pictures=self.views.pictures, **place)

    def next(self) -> list[Batch]:
        """The micro-batches of the next step."""
        height, width = self.plan.height_width(self.step)
        self.step += 1
        return [self._micro_batch(height, width) for _ in range(self.micro_batches)]

    def _micro_batch(self, height: int, width: int) -> Batch:
        if self.loader is None:
            return Batch(size=self.config.parallel.micro_batch, height=height, width=width)
        m = self.loader.next()
        ids, visits, read_ids = m.sample_ids.numpy(), m.visits.numpy(), m.read_ids.numpy()
        flipped = views.mirrored(self.config, ids, visits)
        if self.views.in_network:
            clean_BCHW = self.views.clean(m.images, read_ids, ids, visits, flipped)
            batch = batch_of(self.config, self.tokenizer, clean_BCHW, m.captions, ids, visits, drop_captions=True)
        else:  # a stage in the middle, with the block that REPA teaches
            nothing = torch.empty(0)
            inputs = Inputs(image_BCHW=nothing, time_B=nothing, text_BL=nothing)
            batch = Batch(size=len(ids), height=height, width=width, inputs=inputs)
        key = sample_key(read_ids, visits)
        batch = dataclasses.replace(batch, sample_key=key, read_ids=tuple(read_ids.tolist()))
        return with_features(batch, self.views.features(m.images, read_ids, flipped)) if self.views.teaches else batch

    def take_bad(self) -> list[Bad]:
        """Samples that this rank has found damaged since the last call, each once."""
        return [] if self.loader is None else self.loader.take_bad()

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


class Ahead:
    """A feed whose next step is made in a thread while the device is at work on this one's."""

    def __init__(self, feed: TrainFeed) -> None:
        self._feed, self._bad = feed, list[Bad]()
        self._thread = ThreadPoolExecutor(1, "batches", accel.for_threads())
        self._coming = self._thread.submit(self._make)

    def _make(self) -> tuple[list[Batch], list[Bad]]:
        return self._feed.next(), self._feed.take_bad()

    def next(self) -> list[Batch]:
        """The micro-batches of the next step. Raises what making them raised."""
        micro_batches, bad = self._coming.result()
        self._coming = self._thread.submit(self._make)
        self._bad += bad
        return micro_batches

    def take_bad(self) -> list[Bad]:
        """As TrainFeed's, of the steps so far."""
        bad, self._bad = self._bad, []
        return bad

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._feed.close()


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
    (height, width), size, seen = image, config.parallel.micro_batch, Views(config, shards)
    pixels = (height * seen.factor, width * seen.factor) if seen.need_pixels else None
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        if not seen.in_network:
            yield Batch(size=size, height=height, width=width)
            continue
        found = loader.fixed(shards, ids[part].tolist(), pixels, channels=seen.channels, device=accel.device())
        for bad in found.bad:
            print(f"mpdit: {bad.where}: {bad.reason}; validation takes the next sample instead", flush=True)
        visits = np.full(size, draws.VALIDATION_VISIT)
        clean_BCHW = seen.clean(found.images, found.read_ids, ids[part], visits, np.zeros(size, bool))
        batch = batch_of(config, tokenizer, clean_BCHW, found.captions, ids[part], visits, drop_captions=False)
        yield dataclasses.replace(batch, weight_B=torch.from_numpy(weight[part]).float().to(accel.device()))
