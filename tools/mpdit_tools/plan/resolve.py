"""From what is asked for to a plan: the config, its open values, its network in pieces."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdit import config as configs
from mpdit.config import Config, Parallel
from mpdit.data import buckets
from mpdit.errors import InputError
from mpdit.parallel import fp8_rules
from mpdit_tools.plan.gpus import Machine

if TYPE_CHECKING:
    from mpdit_tools.plan.estimate import Estimate


def load(given: str, overrides: tuple[str, ...]) -> Config:
    """A config by its path, or by a preset's name with the objective that the preset is for. Raises InputError."""
    from mpdit.presets import PRESETS

    if given in PRESETS and not Path(given).exists():
        preset = PRESETS[given]
        tree: dict[str, Any] = {"model": {"preset": given}}
        if preset["learn_sigma"]:
            tree["objective"] = {"kind": "ddpm"}
        if preset["text_tokens"] == 1:
            tree["data"] = {"text": "labels"}
        for assignment in overrides:
            configs.override(tree, assignment)
        return configs.from_dict(tree)
    return configs.load(given, overrides)


def of(config: Config, gpus: int, machine: Machine) -> "tuple[Estimate, Config]":
    """The plan of `config` on `gpus` (0: one copy of the model), and the config with its open values resolved.

    Raises InputError as training would, but needs neither autoencoder nor text encoder to be there.
    """
    from mpdit.train import pieces
    from mpdit_tools.plan import estimate

    parallel = config.parallel
    gpus = gpus or parallel.tp * parallel.cp * parallel.pp
    if gpus < 1:
        raise InputError(f"--gpus is {gpus}; it should be at least 1.")
    resolved = resolve(config, gpus)
    chunks = pieces.on_stages(resolved, pieces.measure(resolved))
    plan = estimate.estimate(resolved, chunks, pieces.measure_whole(resolved), gpus, machine)
    work = {
        size: pieces.flops_per_image(resolved, pieces.measure_whole(resolved, size))
        for size in (buckets.of_config(resolved) if resolved.data.buckets else ())
    }
    return dataclasses.replace(plan, bucket_flops=work), resolved


def flops_per_image(config: Config) -> int:
    """Forward and backward of one square image, nothing computed twice. Raises InputError as :func:`of` does."""
    from mpdit.train import pieces

    # FP8 changes no count, and its rules are of a layout's micro-batches.
    alone = dataclasses.replace(config, parallel=Parallel(precision=fp8_rules.stored(config.parallel.precision)))
    resolved = resolve(alone, gpus=1)
    square = (config.model.image_size, config.model.image_size)
    return pieces.flops_per_image(resolved, pieces.measure_whole(resolved, square))


def resolve(config: Config, gpus: int) -> Config:
    """`config` with its micro-batch for `gpus` ranks. Raises InputError for numbers or layouts that can't be."""
    from mpdit.train import preflight

    pixels = dataclasses.replace(config.model, channels=3, text_dim=0)
    checked = preflight.without_data(dataclasses.replace(config, model=pixels), gpus, on_gpus=True)
    return dataclasses.replace(config, parallel=checked.parallel)
