"""Everything that can be said about a config before any rank starts: in one place, one sentence each (law 9)."""

import dataclasses
import math
import os
from pathlib import Path

from mpdit import models
from mpdit.config import Config
from mpdit.data.shards import Shards
from mpdit.data.text import Tokenizer
from mpdit.errors import InputError
from mpdit.parallel import context, groups, stages


def check(config: Config, world: int) -> Config:
    """The config with its open values resolved (vocabulary, micro-batch) for `world` ranks.

    Raises InputError for the first thing that can't work, naming key, value and remedy. Reads the data set's manifest
    and indices, builds nothing.
    """
    _ranges(config)
    _shapes(config)
    _run_dir(Path(config.run.dir))
    data_ranks = groups.data_parallel_size(config.parallel, world)
    config = _micro_batch(config, data_ranks)
    stages.split(config)
    shards = Shards.open(config.data.path, "train")
    Shards.open(config.data.path, "val")
    config = _vocabulary(config, shards)
    stages.local_tokens(config, models.parts(context.build(config)).streams())
    return config


def _run_dir(folder: Path) -> None:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"run.dir {folder}: {there} is a file; give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"run.dir {folder}: {there} can't be written to; give a folder that can.")


def _ranges(config: Config) -> None:
    def at_least(low: float, **values: float) -> None:
        for key, value in values.items():
            if not (value >= low and math.isfinite(value)):
                raise InputError(f"{key.replace('__', '.')} is {value}, but should be a number of at least {low}.")

    model, optim, parallel, train = config.model, config.optim, config.parallel, config.train
    at_least(1, model__width=model.width, model__depth=model.depth, model__head_dim=model.head_dim)
    at_least(1, model__patch=model.patch, model__image_size=model.image_size, model__channels=model.channels)
    at_least(1, model__text_tokens=model.text_tokens, model__mlp_ratio=model.mlp_ratio)
    at_least(
        1, parallel__tp=parallel.tp, parallel__pp=parallel.pp, parallel__vpp=parallel.vpp, parallel__cp=parallel.cp
    )
    at_least(0, parallel__micro_batch=parallel.micro_batch, data__workers=config.data.workers)
    at_least(1, train__steps=train.steps, train__batch_size=train.batch_size, mup__base_width=config.mup.base_width)
    at_least(1, train__log_every=train.log_every, train__val_images=train.val_images, sample__steps=config.sample.steps)
    at_least(0, train__seed=train.seed, train__save_every=train.save_every, train__val_every=train.val_every)
    at_least(0, train__sample_every=train.sample_every, train__keep_last=train.keep_last)
    at_least(
        0, optim__lr=optim.lr, optim__weight_decay=optim.weight_decay, optim__eps=optim.eps, optim__clip=optim.clip
    )
    at_least(0, optim__warmup_steps=optim.warmup_steps, optim__decay_steps=optim.decay_steps)
    for key, share in (
        ("data.caption_drop", config.data.caption_drop),
        ("optim.beta1", optim.beta1),
        ("optim.beta2", optim.beta2),
        ("optim.final_lr_ratio", optim.final_lr_ratio),
        ("train.ema_decay", train.ema_decay),
    ):
        if not 0 <= share <= 1:
            raise InputError(f"{key} is {share}, but should lie between 0 and 1.")
    if optim.warmup_steps >= train.steps:
        raise InputError(f"optim.warmup_steps {optim.warmup_steps} should be less than train.steps {train.steps}.")
    if optim.schedule == "wsd" and not 0 < optim.decay_steps <= train.steps:
        raise InputError(
            f"optim.schedule wsd decays over optim.decay_steps, which is {optim.decay_steps}; it should be between 1 "
            f"and train.steps {train.steps}."
        )


def _shapes(config: Config) -> None:
    model, parallel = config.model, config.parallel
    if model.width % (model.head_dim * parallel.tp):
        raise InputError(
            f"model.width {model.width} does not divide by head_dim {model.head_dim} x parallel.tp {parallel.tp} = "
            f"{model.head_dim * parallel.tp}; attention heads are whole on a tensor rank."
        )
    heads = model.width // model.head_dim // parallel.tp
    if heads % parallel.cp:
        raise InputError(
            f"{heads} heads a tensor rank do not divide by parallel.cp {parallel.cp} (Ulysses splits heads)."
        )
    if model.width % 4:
        raise InputError(f"model.width {model.width} should be a multiple of 4 (2-D sin-cos positions).")
    if model.image_size % model.patch:
        raise InputError(f"model.image_size {model.image_size} does not divide by model.patch {model.patch}.")
    if model.channels not in (1, 3):
        raise InputError(f"model.channels is {model.channels}; in pixel space it should be 3 (RGB) or 1 (gray).")
    if parallel.sp and parallel.tp == 1:
        raise InputError("parallel.sp shards tokens over the tensor ranks: it needs parallel.tp of at least 2.")
    if parallel.vpp > 1 and parallel.pp == 1:
        raise InputError("parallel.vpp interleaves chunks over pipeline ranks: it needs parallel.pp of at least 2.")
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        raise InputError(
            "parallel.overlap_param_gather needs parallel.distributed_optimizer and parallel.overlap_grad_reduce."
        )


def _micro_batch(config: Config, data_ranks: int) -> Config:
    parallel, batch = config.parallel, config.train.batch_size
    if batch % data_ranks:
        raise InputError(
            f"train.batch_size {batch} does not divide over {data_ranks} data-parallel ranks; choose a multiple of "
            f"{data_ranks}."
        )
    share = batch // data_ranks
    micro_batch = parallel.micro_batch or (share // parallel.pp if share % parallel.pp == 0 else share)
    if share % micro_batch:
        raise InputError(
            f"parallel.micro_batch {micro_batch} does not divide a data-parallel rank's {share} images of "
            f"train.batch_size {batch}."
        )
    if parallel.vpp > 1 and (share // micro_batch) % parallel.pp:
        raise InputError(
            f"parallel.vpp needs micro-batches in multiples of parallel.pp {parallel.pp}, but {share} images a "
            f"data-parallel rank in micro-batches of {micro_batch} are {share // micro_batch}."
        )
    return dataclasses.replace(config, parallel=dataclasses.replace(parallel, micro_batch=micro_batch))


def _vocabulary(config: Config, shards: Shards) -> Config:
    if shards.tokenizer is None:
        raise InputError(f"{config.data.path}/manifest.json names no tokenizer; build the data set again.")
    tokenizer = Tokenizer.open(shards.tokenizer.path, shards.tokenizer.sha256)
    found, wanted = tokenizer.vocab_size, config.model.vocab_size
    if wanted not in (0, found):
        raise InputError(
            f"model.vocab_size is {wanted}, but the tokenizer of {config.data.path} has {found} pieces; leave it out."
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=found))
