"""Everything that can be said about a config before any rank starts: in one place, one sentence each."""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpdit import models
from mpdit.config import Config, Model, to_dict
from mpdit.data import encoders
from mpdit.data.cached_text import CachedText
from mpdit.data.encoders import Encoder
from mpdit.data.mixture import Mixture
from mpdit.data.text import Tokenizer
from mpdit.errors import InputError
from mpdit.models import repa
from mpdit.mup import rules
from mpdit.mup.roles import Group
from mpdit.objective import repa as teachers
from mpdit.parallel import accel, context, fp8_rules, groups, stages, te_install
from mpdit.parallel.context import Context
from mpdit.parallel.stages import Grid
from mpdit.sample import samplers
from mpdit.train import cached, profiles
from mpdit_kernels import switch


def check(config: Config, world: int) -> Config:
    """The config with its open values resolved (vocabulary or text features, micro-batch) for `world` ranks.

    Raises InputError for the first thing that can't work, naming key, value and remedy. Reads the data set's manifest
    and indices, hashes the files of pretrained models and looks at caches; builds nothing.
    """
    _run_dir(Path(config.run.dir))
    return without_run_dir(config, world)


def without_run_dir(config: Config, world: int) -> Config:
    """:func:`check` for who writes into no run folder. Raises InputError."""
    config = without_data(config, world)
    machine(config)
    train, val = Mixture.open(config.data, "train"), Mixture.open(config.data, "val")
    channels = _pixel_channels(config, train)
    for split in (train, val):
        cached.open_latents(config, split)
    _teacher(config, train, channels)
    return _text(config, cached.tokenizer(config, train, val))


def without_data(config: Config, world: int, *, on_gpus: bool | None = None) -> Config:
    """:func:`check` of all that needs no data set: numbers, model, layout, the micro-batch. Raises InputError.

    `on_gpus`: whether the ranks will have GPUs; None: if this machine has.
    """
    data_ranks = layout(config, world)
    config = _overlaps(_micro_batch(config, data_ranks), data_ranks, accel.is_cuda() if on_gpus is None else on_gpus)
    _rows(config)
    return config


def layout(config: Config, world: int) -> int:
    """Check numbers, model and layout alone, without data; the number of data-parallel ranks. Raises InputError."""
    _ranges(config)
    _shapes(config)
    _network(config)
    data_ranks = groups.data_parallel_size(config.parallel, world)
    stages.split(config)
    fp8_rules.check(config)
    ctx = context.build(config)
    models.crossing(ctx)
    _image_sizes(ctx)
    return data_ranks


def machine(config: Config) -> None:
    """Whether this rank's machine has what the kernels, compilation, backend and precision of ``parallel`` need. Raises
    InputError.

    Not part of :func:`without_data`: a launch is planned and rehearsed on other machines than it is for.
    """
    parallel = config.parallel
    gpus, here = accel.gpus(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < here and not parallel.share_gpu:
        raise InputError(
            f"{here} ranks were started on a machine with {gpus} GPU{'s' * (gpus > 1)}, and NCCL takes one rank a GPU; "
            "start as many as there are GPUs, or set parallel.share_gpu=true to try the layout out."
        )
    if parallel.kernels == "triton" and (reason := switch.lacking()):
        raise InputError(
            f"parallel.kernels is triton, but {reason}; set it to auto, which takes triton where it runs, or torch."
        )
    if parallel.compile and not accel.is_cuda() and not _has_cpp_compiler():
        raise InputError(
            "parallel.compile needs a C++ compiler on a CPU, and there is none; install g++, name one in CXX, or set "
            "parallel.compile=false."
        )
    if parallel.backend != "te":
        return
    gpu = accel.gpu()
    if gpu is None:
        raise InputError(
            "parallel.backend te needs an NVIDIA GPU, and torch sees none on this machine; set parallel.backend=local, "
            "or start it where there is one (mpdit plan and rehearse take the config as it is)."
        )
    te_install.check_te()
    if parallel.precision in fp8_rules.FP8:
        fp8_rules.check_gpu(parallel.fp8_recipe, *gpu)


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def _run_dir(folder: Path) -> None:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"run.dir {folder}: {there} is a file; give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"run.dir {folder}: {there} can't be written to; give a folder that can.")


# What numbers may be, by dotted key: the lowest and highest value, both allowed.
_BOUNDS = {
    **dict.fromkeys(
        (
            *("model.width", "model.depth", "model.head_dim", "model.mlp_ratio", "model.patch", "model.image_size"),
            *("model.channels", "model.text_tokens", "mup.base_width", "mup.base_depth", "mup.base_head_dim"),
            *("mup.base_batch_size", "mup.base_images"),
            *("parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp"),
            *("train.steps", "train.batch_size", "train.log_every", "train.val_images", "sample.steps"),
            *("guard.window", "guard.max_skipped", "guard.hang_timeout_s"),
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            *(
                "parallel.fp8_bf16_blocks",
                "parallel.micro_batch",
                "data.workers",
                "train.save_every",
                "train.val_every",
                "train.sample_every",
                "train.profile_steps",
            ),
            *("train.keep_last", "train.keep_every", "train.posthoc_every", "model.vocab_size", "model.text_dim"),
            *("model.pooled_dim", "optim.warmup_steps", "optim.decay_steps"),
            *("objective.repa_weight", "objective.repa_block", "guard.spike_factor", "guard.max_rollbacks"),
            *("optim.lr", "optim.weight_decay", "optim.clip", "mup.output_mult", "objective.logit_std"),
            *(f"mup.lr_mult.{group}" for group in Group),
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(("data.caption_drop", "data.max_bad_fraction", "optim.final_lr_ratio", "train.ema_decay"), (0, 1)),
    **dict.fromkeys(("optim.beta1", "optim.beta2"), (0, 1 - 1e-9)),
    **dict.fromkeys(("train.seed", "sample.seed"), (0, 2**63 - 1)),
    "optim.eps": (1e-38, math.inf),  # below fp32's range it would be none
}


def _numbers(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _ranges(config: Config) -> None:
    for key, value in _numbers(to_dict(config)):
        low, high = _BOUNDS.get(key, (-math.inf, math.inf))
        if not math.isfinite(value):
            raise InputError(f"{key} is {value}, but should be a finite number.")
        if not low <= value <= high:
            wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise InputError(f"{key} is {value}, but should be {wanted}.")
    optim, train = config.optim, config.train
    if 0 < config.guard.spike_factor <= 1:
        raise InputError(
            f"guard.spike_factor is {config.guard.spike_factor}, which good steps exceed too; it should be above 1, "
            "such as 4, or 0 for off."
        )
    if optim.warmup_steps >= train.steps:
        raise InputError(f"optim.warmup_steps {optim.warmup_steps} should be less than train.steps {train.steps}.")
    for width in train.posthoc_ema:
        if not 0.001 <= width <= profiles.WIDEST or train.posthoc_ema.count(width) > 1:
            raise InputError(
                f"train.posthoc_ema is {list(train.posthoc_ema)}, but should be different widths, each between 0.001 "
                f"and {profiles.WIDEST} of the run's length; two, 0.05 and 0.1, are enough for all others."
            )
    if optim.schedule == "wsd" and not 0 < optim.decay_steps <= train.steps - optim.warmup_steps:
        raise InputError(
            f"optim.schedule wsd decays over optim.decay_steps, which is {optim.decay_steps}; it should be between 1 "
            f"and the {train.steps - optim.warmup_steps} of train.steps {train.steps} that follow the warm-up."
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
    if model.channels not in (1, 3) and config.data.latents is None:
        preset = f" (of preset {model.preset}, which is for latents)" if model.preset else ""
        raise InputError(
            f"model.channels is {model.channels}{preset}, but data.latents is not given and pictures have 3 (RGB) or 1 "
            "(gray); set it to 3, or data.latents to the folder of an autoencoder."
        )
    if model.text_dim and config.data.text not in encoders.KINDS:
        preset = f" (of preset {model.preset})" if model.preset else ""
        raise InputError(
            f"model.text_dim is {model.text_dim}{preset}, features of a text encoder, but data.text is "
            f"{config.data.text}; set it to 0 for a learned table, or data.text to {', '.join(encoders.KINDS)}."
        )
    if model.pooled_dim and (model.arch != "mmdit" or config.data.text not in encoders.KINDS):
        raise InputError(
            f"model.pooled_dim is {model.pooled_dim}, which is for arch mmdit with a text encoder; set it to 0."
        )
    if parallel.sp and parallel.tp == 1:
        raise InputError("parallel.sp shards tokens over the tensor ranks: it needs parallel.tp of at least 2.")
    if parallel.vpp > 1 and parallel.pp == 1:
        raise InputError("parallel.vpp interleaves chunks over pipeline ranks: it needs parallel.pp of at least 2.")
    if parallel.compile and parallel.backend == "te":
        raise InputError(
            "parallel.compile is for mpdit's own layers, but parallel.backend is te, whose are kernels already; set "
            "parallel.compile=false, or parallel.backend=local."
        )
    lacking = not parallel.distributed_optimizer or parallel.overlap_grad_reduce is False
    if parallel.overlap_param_gather and lacking:
        raise InputError(
            "parallel.overlap_param_gather needs parallel.distributed_optimizer and parallel.overlap_grad_reduce."
        )


def _image_sizes(ctx: Context) -> None:
    """Height and width of every bucket, and of the pictures that are drawn."""
    model, buckets = ctx.config.model, ctx.config.data.buckets
    sizes = {f"data.buckets[{number}]": size for number, size in enumerate(buckets)}
    if ctx.config.sample.image_size:
        sizes["sample.image_size"] = ctx.config.sample.image_size
    for key, size in sizes.items():
        said = f"{key} is {list(size)}"
        if len(size) != 2 or min(size) < 1:
            raise InputError(f"{said}, but should be [height, width] in pixels, each at least 1.")
        if any(side % model.patch for side in size):
            raise InputError(f"{said}, but height and width should both be multiples of model.patch {model.patch}.")
        if model.arch == "uvit" and size != (model.image_size, model.image_size):
            raise InputError(
                f"{said}, but model.arch uvit learns the positions of the square of model.image_size "
                f"{model.image_size} alone; leave it out, or take mmdit, pixart or dit."
            )
        models.crossing(ctx, *size, keys=f"{key} {list(size)} in patches of model.patch {model.patch}")
    if again := [list(size) for number, size in enumerate(buckets) if size in buckets[:number]]:
        raise InputError(f"data.buckets holds {again[0]} twice; it should hold each [height, width] once.")


def _network(config: Config) -> None:
    """What one architecture or objective asks of other sections."""
    model, kind = config.model, config.objective.kind
    if model.arch == "dit" and config.data.text != "labels":
        raise InputError(
            f"model.arch dit is conditioned on class labels, but data.text is {config.data.text}; set data.text=labels "
            "and model.text_tokens=1, on a data set with classes."
        )
    if model.arch == "uvit" and model.depth % 2 == 0:
        raise InputError(
            f"model.depth {model.depth} should be odd for uvit: its blocks are h in, one in the middle, h out."
        )
    if model.learn_sigma and kind != "ddpm":
        raise InputError(f"model.learn_sigma predicts the variance of ddpm, but objective.kind is {kind}.")
    if config.objective.repa_block > model.depth:
        raise InputError(
            f"objective.repa_block is {config.objective.repa_block}, but model.depth is {model.depth}; it should be "
            f"the number of a block, 1 to {model.depth}, or 0 for a third of the depth."
        )
    samplers.check(config.sample.sampler, kind, config.sample.steps)
    beta1, beta2 = rules.betas(config)
    if min(beta1, beta2) < 0:
        raise InputError(
            f"mup.base_batch_size {config.mup.base_batch_size} and base_images {config.mup.base_images} turn "
            f"optim.beta1 and beta2 into {beta1:.4g} and {beta2:.4g}, below 0; the batch is too much larger than the "
            "proxy's."
        )


def _teacher(config: Config, train: Mixture, channels: int) -> None:
    if config.objective.repa_weight:
        repa.teacher_features(config.objective)
        if cached.open_features(config, train) is None:
            teachers.check(config.objective, channels)


def _pixel_channels(config: Config, train: Mixture) -> int:
    """Of the pictures."""
    found, channels = cached.autoencoder(config, train), config.model.channels
    if found is None:
        return channels
    if channels != found.space.channels:
        raise InputError(
            f"model.channels is {channels}, but the latents of data.latents {found.folder} have "
            f"{found.space.channels}; set it to {found.space.channels}."
        )
    if found.space.pixel_channels not in (1, 3):
        raise InputError(
            f"data.latents {found.folder}: takes pictures of {found.space.pixel_channels} channels, but it should be "
            "3 (RGB) or 1 (gray)."
        )
    return found.space.pixel_channels


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


def _overlaps(config: Config, data_ranks: int, on_gpus: bool) -> Config:
    """Where it is left open: what a device can do beside computing, it does."""
    parallel = config.parallel
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    if reduce is None:
        reduce = bool(gather) or (on_gpus and data_ranks * parallel.cp > 1)
    if gather is None:
        gather = reduce and parallel.distributed_optimizer
    return dataclasses.replace(
        config, parallel=dataclasses.replace(parallel, overlap_grad_reduce=reduce, overlap_param_gather=gather)
    )


def _rows(config: Config) -> None:
    """What FP8's products multiply in training: the tokens of every stream that a block takes, of every image shape."""
    model = config.model
    parts = models.parts(context.build(config))
    blocks = [index for index in range(model.depth) if fp8_rules.quantised(config, index)]
    for height, width in config.data.buckets or ((0, 0),):
        bucket = f"data.buckets [{height}, {width}] in patches of model.patch {model.patch}" if height else ""
        grid = Grid.of(model, height, width, bucket)
        for stream in {s.name: s for block in blocks for s in parts.streams(block, grid) if s.split}.values():
            fp8_rules.check_rows(config, stream.tokens, f"{stream.keys} = {stream.tokens} {stream.name} tokens")


def _text(config: Config, tokenizer: Tokenizer) -> Config:
    """`config` with the vocabulary of the data set's captions, or with the features of the text encoder."""
    model = config.model
    if tokenizer.text_dim:
        return dataclasses.replace(config, model=_features(model, tokenizer, config.data.text))
    tokenizer.text(config.sample.prompts, model.text_tokens)  # labels refuse what they can't say
    found, wanted = tokenizer.vocab_size, model.vocab_size
    if wanted not in (0, found):
        raise InputError(
            f"model.vocab_size is {wanted}, but the captions of {config.data.path} are of {found} different tokens; "
            "leave it out."
        )
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=found))


def _features(model: Model, tokenizer: Tokenizer, kind: str) -> Model:
    encoder = tokenizer.encoder if isinstance(tokenizer, CachedText) else tokenizer
    assert isinstance(encoder, Encoder)
    encoder.check_length(model.text_tokens)
    if model.text_dim not in (0, encoder.text_dim):
        raise InputError(
            f"model.text_dim is {model.text_dim}, but the encoder of data.text {kind} gives {encoder.text_dim} "
            "features a token; leave it out."
        )
    if model.pooled_dim not in (0, encoder.pooled_dim):
        has = f"has {encoder.pooled_dim} features" if encoder.pooled_dim else "does not exist"
        raise InputError(
            f"model.pooled_dim is {model.pooled_dim}, but the pooled vector of data.text {kind} {has}; set it to "
            f"{encoder.pooled_dim}{', or to 0 for the mean of the tokens' if encoder.pooled_dim else ''}."
        )
    return dataclasses.replace(model, text_dim=encoder.text_dim)
