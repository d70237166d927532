"""Pictures for prompts from a network in any layout: guidance as two halves of one batch, through the pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpdit.config import Config
from mpdit.models.layers import Inputs, unpatchify
from mpdit.objective import draws
from mpdit.parallel import accel, groups
from mpdit.sample import samplers

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor | None]]  # captions -> ids [B, L] or features; pooled [B, P]
Decode = Callable[[Tensor], Tensor]  # latents [B, C, H, W] -> pictures in [-1, 1]
Predict = Callable[[list[Any]], list[Tensor]]  # micro-batches -> predictions [S, B, P]
MakeBatch = Callable[[Inputs], Any]


def draw(
    config: Config,
    prompts: Sequence[str],
    encode: Encode,
    predict: Predict,
    make_batch: MakeBatch,
    first: int = 0,
    decode: Decode | None = None,
) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] of ``sample.image_size``, one a prompt, on every rank; collective. `decode`: for a
    network of latents.

    The noise is a function of (sample.seed, the prompt's number, counted from `first`): a picture depends neither on
    the layout nor on the prompts beside it. Data-parallel ranks take a share each.
    """
    model, sample = config.model, config.sample
    ranks, rounds = groups.data_size(), config.parallel.pp
    share = -(-len(prompts) // (ranks * rounds)) * rounds  # padded so that each micro-batch of each rank is alike
    mine = (groups.data_rank() * share + np.arange(share)) % len(prompts)
    height, width = sample.image_size or (model.image_size, model.image_size)
    shape = (model.channels, height, width)
    noise = draws.noise(sample.seed, first + mine, np.zeros_like(mine), shape).to(accel.device())
    text, null = encode([prompts[int(i)] for i in mine]), encode([""] * len(mine))

    def noise_of_step(step: int) -> Tensor:
        visits = np.full_like(mine, step + 1)  # visit 0 is where it starts from
        return draws.noise(sample.seed, first + mine, visits, shape).to(accel.device())

    def predicted(x_BCHW: Tensor, t: float) -> Tensor:
        time_B = torch.full((len(mine),), t, device=x_BCHW.device)

        def micro_batches(text_BL: Tensor, pooled_BP: Tensor | None) -> list[Any]:
            pooled = [None] * rounds if pooled_BP is None else pooled_BP.chunk(rounds)
            parts = zip(x_BCHW.chunk(rounds), time_B.chunk(rounds), text_BL.chunk(rounds), pooled, strict=True)
            return [make_batch(Inputs(image_BCHW=x, time_B=s, text_BL=t, pooled_BP=p)) for x, s, t, p in parts]

        asked = micro_batches(*text) + (micro_batches(*null) if sample.guidance != 1 else [])
        whole = torch.cat([p.float() for p in predict(asked)], 1)
        prediction = unpatchify(whole, model.patch, height, width)
        if sample.guidance == 1:
            return prediction
        conditional, unconditional = prediction.chunk(2)
        return samplers.guided_prediction(conditional, unconditional, sample.guidance, model.learn_sigma)

    images = samplers.sample(
        sample.sampler,
        config.objective.kind,
        predicted,
        noise,
        sample.steps,
        learn_sigma=model.learn_sigma,
        noise_of_step=noise_of_step,
        clip=decode is None,
    )
    images = images.clamp(-1, 1) if decode is None else decode(images)
    return groups.gather_over_data(images)[: len(prompts)].cpu()
