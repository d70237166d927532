"""The first steps of a small network, by one implementation of the kernels or the other."""

import copy
from typing import Any

import numpy as np
import torch

import tiny
from mpdit import config as configs

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mmdit": {"model": {"arch": "mmdit"}},
    "dit": {"model": {"arch": "dit", "text_tokens": 1}, "data": {"text": "labels"}},
    "pixart": {"model": {"arch": "pixart"}},
    "uvit": {"model": {"arch": "uvit"}},
    "mmdit completep": {"model": {"arch": "mmdit"}, "mup": {"parametrization": "completep", "base_depth": 1}},
}
BATCH = 2


def trained(name: str, kernels: str, *, steps: int, precision: str = "fp32") -> tuple[list[float], list[float]]:
    """The losses and gradient norms of `steps` steps."""
    from mpdit.parallel import accel, groups

    accel.enter()
    if not groups.started():
        groups.start(configs.Parallel(), seed=0)
    from mpdit.train import batches, session

    tree = copy.deepcopy(tiny.BASE)
    tree["model"] |= {"depth": 3, "vocab_size": 50}
    tree["optim"] |= {"warmup_steps": 0, "schedule": "constant"}  # else the first update would be none
    for section, values in ARCHITECTURES[name].items():
        tree[section] = {**tree.get(section, {}), **values}
    tree["parallel"] = {"kernels": kernels, "precision": precision, "micro_batch": BATCH}
    config = configs.from_dict(tree)
    run = session.build(config)
    generator = torch.Generator().manual_seed(1)
    losses, norms = [], []
    for step in range(steps):
        images_BCHW = torch.randn(BATCH, 3, 12, 12, generator=generator)
        text_BL = torch.randint(1, 50, (BATCH, config.model.text_tokens), generator=generator)
        ids, visits = np.arange(BATCH), np.full(BATCH, step)
        batch = batches.noised_batch(config, images_BCHW.to(accel.device()), text_BL.to(accel.device()), ids, visits)
        losses.append(run.forward_backward([batch]))
        norms.append(run.update())
    return losses, norms
