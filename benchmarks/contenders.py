"""One training step of MMDiT and PixArt-alpha in several libraries, for step_time.py.

A contender is a function from Case to Contender in CONTENDERS. What is not alike: diffusers' MMDiT takes text states
where the others look up a token table. Its text projection reads TEXT_STATES numbers a token, as many as the others'
table has rows, so the parameters differ by one bias. PixArt takes text states of as many numbers in all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from mpdit import config as configs
from mpdit.config import Config
from mpdit.models.layers import Inputs, patchify
from mpdit.parallel import accel, groups
from mpdit.train import batches, session
from mpdit_kernels.linear import linear
from reference import plain_mmdit, plain_pixart
from reference.plain_common import Batch, Shape

HEAD_DIM, PATCH, CHANNELS, TEXT_STATES = 64, 2, 4, 64
BASELINE = "diffusers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A row of the table. The image is a square of latents whose patches are the image tokens."""

    arch: str  # mmdit | pixart
    width: int
    image_tokens: int
    text_tokens: int
    batch: int
    depth: int

    @classmethod
    def parse(cls, arch: str, text: str, depth: int) -> "Case":
        try:
            width, tokens, batch = text.split("/")
            image_tokens, text_tokens = tokens.split("+")
            case = cls(
                arch=arch,
                width=int(width),
                image_tokens=int(image_tokens),
                text_tokens=int(text_tokens),
                batch=int(batch),
                depth=depth,
            )
        except ValueError:
            raise SystemExit(f"--shapes {text}: expected WIDTH/IMAGE+TEXT/BATCH, as in 256/64+16/8") from None
        if case.side**2 != case.image_tokens or case.width % HEAD_DIM:
            raise SystemExit(f"--shapes {text}: image tokens must be a square, the width a multiple of {HEAD_DIM}")
        return case

    @property
    def side(self) -> int:
        """Patches along one edge of the image."""
        return round(self.image_tokens**0.5)

    def data(self) -> Batch:
        g = torch.Generator().manual_seed(0)
        size = (self.batch, CHANNELS, self.side * PATCH, self.side * PATCH)
        return Batch(
            image_BCYX=torch.randn(size, generator=g),
            noise_BCYX=torch.randn(size, generator=g),
            t_B=torch.rand(self.batch, generator=g),
            ids_BL=torch.randint(1, TEXT_STATES, (self.batch, self.text_tokens), generator=g),
            features_LBE=torch.randn(self.text_tokens, self.batch, TEXT_STATES, generator=g),
        )


@dataclass(kw_only=True, slots=True)
class Contender:
    """A model on one case. Both are handed over before any compiling; `parameters` may be optimizer groups."""

    loss: Callable[[], Tensor]  # one forward pass on the case's data, () in fp32
    parameters: list[Tensor] | list[dict[str, Any]]
    step: Callable[[], None] | None = None  # the contender's own training step; None: loss, backward, torch's AdamW


def diffusers(case: Case, compiled: bool) -> Contender:
    """SD3Transformer2DModel with QK-norm, its text projections kept small (see above); PixArtTransformer2DModel."""
    import diffusers

    shared: dict[str, Any] = {
        "sample_size": case.side * PATCH,
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": case.depth,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": case.width // HEAD_DIM,
    }
    batch, more = case.data(), {}
    if case.arch == "mmdit":
        model = diffusers.SD3Transformer2DModel(
            **shared,
            joint_attention_dim=TEXT_STATES,
            caption_projection_dim=case.width,
            pooled_projection_dim=case.width,
            pos_embed_max_size=case.side,
            dual_attention_layers=(),
            qk_norm="rms_norm",
        ).train()
        more = {"pooled_projections": torch.randn(case.batch, case.width)}
    else:
        model = diffusers.PixArtTransformer2DModel(
            **shared, cross_attention_dim=case.width, caption_channels=TEXT_STATES, use_additional_conditions=False
        ).train()
        more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    assert batch.features_LBE is not None
    text_BLE = batch.features_LBE.transpose(0, 1).contiguous()

    def loss() -> Tensor:
        out_BCYX = model(
            hidden_states=batch.noisy_BCYX(),
            encoder_hidden_states=text_BLE,
            timestep=1000 * batch.t_B,
            return_dict=False,
            **more,
        )[0]
        return (out_BCYX - batch.target_BCYX()).pow(2).mean()

    return Contender(loss=torch.compile(loss) if compiled else loss, parameters=list(model.parameters()))


def plain(case: Case, compiled: bool) -> Contender:
    """The reference that the tests hold the parallel model against."""
    network: Any = {"mmdit": plain_mmdit, "pixart": plain_pixart}[case.arch]
    more = {"text_dim": TEXT_STATES, "qk_norm": False} if case.arch == "pixart" else {}
    shape: Shape = network.Shape(
        width=case.width, depth=case.depth, head_dim=HEAD_DIM, patch=PATCH, channels=CHANNELS, vocab=TEXT_STATES, **more
    )
    weights = {n: w.requires_grad_() for n, w in network.init(shape, seed=0).items()}
    batch = case.data()

    def loss() -> Tensor:
        return network.loss_of(weights, shape, batch)

    return Contender(loss=torch.compile(loss) if compiled else loss, parameters=list(weights.values()))


def plain_onednn(case: Case, compiled: bool) -> Contender:
    """The same with mpdit's product in its linear layers: what Megatron, muP groups and layouts cost beside it."""
    made = plain(case, False)

    def loss() -> Tensor:
        with patch.object(F, "linear", linear):
            return made.loss()

    return Contender(loss=torch.compile(loss) if compiled else loss, parameters=made.parameters)


def mpdit(case: Case, compiled: bool) -> Contender:
    """What `mpdit train` runs in one process: Megatron's schedule and optimizer, muP groups.

    Without the gradient norm and clipping, which no contender has.
    """
    accel.enter()
    if not torch.distributed.is_initialized():
        groups.start(configs.Parallel(), seed=0)
    config, data = mpdit_config(case, compiled), case.data()
    run = session.build(config)
    text_BL = data.ids_BL
    if case.arch == "pixart":
        assert data.features_LBE is not None
        text_BL = data.features_LBE.transpose(0, 1)
    batch = batches.Batch(
        size=case.batch,
        height=case.side * PATCH,
        width=case.side * PATCH,
        inputs=Inputs(image_BCHW=data.noisy_BCYX(), time_B=data.t_B, text_BL=text_BL),
        target_SBP={"velocity": patchify(data.target_BCYX(), PATCH)},
    )
    (stage,) = run.network.chunks

    def step() -> None:
        run.forward_backward([batch])
        run.optimizer.prepare_grads()
        run.optimizer.step_with_ready_grads()

    return Contender(
        loss=lambda: batches.loss(config, stage(batch.inputs), batch),
        parameters=list(stage.parameters()),
        step=step,
    )


def mpdit_config(case: Case, compiled: bool) -> Config:
    of_arch = {"text_dim": TEXT_STATES, "qk_norm": False} if case.arch == "pixart" else {"vocab_size": TEXT_STATES}
    model = {"arch": case.arch, "width": case.width, "depth": case.depth, "head_dim": HEAD_DIM, "patch": PATCH}
    model |= {"image_size": case.side * PATCH, "channels": CHANNELS, "text_tokens": case.text_tokens, **of_arch}
    return configs.from_dict(
        {
            "model": model,
            "mup": {"base_width": case.width // 2, "adaln_init": "hidden", "readout_init": "base"},
            "optim": {"lr": 1e-4, "weight_decay": 0.01, "clip": 0.0},
            "parallel": {"compile": compiled},
        }
    )


CONTENDERS: dict[str, Callable[[Case, bool], Contender]] = {
    BASELINE: diffusers,
    "plain": plain,
    "plain, oneDNN": plain_onednn,
    "mpdit": mpdit,
}
