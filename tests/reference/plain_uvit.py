"""The reference U-ViT in plain PyTorch, one process, nothing of mpdit imported: see plain_common.py.

Model: Bao et al. (arXiv 2209.12152): time, text and image are tokens of one sequence, and the later half of the
blocks takes in what the earlier half gave. The authors' code has the exact GELU; here it is the tanh form, as in
the other models. The published sizes have no QK-norm. Letters in a name's suffix are its dimensions, as in
plain_common.py; T is the whole sequence, 1 + L + S.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from reference import plain_common as common
from reference.plain_common import (
    Batch,
    Parameter,
    Recipe,
    betas,
    linear_parameters,
    mlp_parameters,
    norm_parameters,
    qk_norm_parameters,
    residual_multiplier,
    table_parameter,
)
from reference.plain_layers import Weights, linear, mlp, patchify, self_attention, time_features, unpatchify

__all__ = [
    "Batch",
    "Recipe",
    "Shape",
    "betas",
    "denoise",
    "forward",
    "init",
    "loss_of",
    "parameters",
    "residual_multiplier",
    "rules",
    "train",
]

POSITION_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape(common.Shape):
    """`depth` is the number of blocks in all, 2 half + 1: one more than the authors' number where that is even."""

    grid: tuple[int, int]  # rows and columns of patches: positions are learned, so the image's size is fixed
    text_tokens: int = 1  # L; class labels are one
    text_dim: int = 0  # features of a token that a text encoder gives; 0: a learned table of vocab rows

    def __post_init__(self) -> None:
        if self.depth % 2 == 0:
            raise ValueError(f"depth {self.depth}: U-ViT has as many blocks before the middle one as after it")

    @property
    def half(self) -> int:
        return self.depth // 2

    @property
    def extra_tokens(self) -> int:
        return 1 + self.text_tokens


def parameters(s: Shape) -> dict[str, Parameter]:
    """Every parameter of the model, by name."""
    d, table = s.width, {}
    table |= linear_parameters("embed.patch", d, s.patch_features, "input")
    if s.text_dim:
        table |= linear_parameters("embed.text", d, s.text_dim, "input")
    else:
        table["embed.text.weight"] = table_parameter(s.vocab, d)
    table["embed.positions.table"] = table_parameter(s.extra_tokens + s.grid[0] * s.grid[1], d, POSITION_STD)
    for i in range(s.depth):
        table |= block_parameters(f"blocks.{i}", s, skip=i > s.half)
    table |= norm_parameters("head.norm", d)
    table |= linear_parameters("head.out", s.output_features, d, "output")
    table |= convolution_parameters("head.conv", s.output_channels)
    return table


def block_parameters(prefix: str, s: Shape, *, skip: bool) -> dict[str, Parameter]:
    d, table = s.width, {}
    if skip:
        table |= linear_parameters(f"{prefix}.skip", d, 2 * d, "hidden")
    table |= norm_parameters(f"{prefix}.norm_1", d)
    table |= linear_parameters(f"{prefix}.qkv", 3 * d, d, "hidden", bias=False)
    table |= qk_norm_parameters(prefix, s)
    table |= linear_parameters(f"{prefix}.proj", d, d, "hidden")
    table |= norm_parameters(f"{prefix}.norm_2", d)
    table |= mlp_parameters(prefix, d)
    return table


def convolution_parameters(name: str, channels: int) -> dict[str, Parameter]:
    """3 x 3, channels to as many: no dimension grows with the width, so nothing about it follows the width."""
    return {
        f"{name}.weight": Parameter(
            shape=(channels, channels, 3, 3), role="input", group="output", width_in_gradient=False
        ),
        f"{name}.bias": Parameter(shape=(channels,), role="vector", group="vector", width_in_gradient=False),
    }


def layer_norm(w: Weights, name: str, x_TBD: Tensor) -> Tensor:
    return F.layer_norm(x_TBD, x_TBD.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def embed(w: Weights, s: Shape, x_BCYX: Tensor, t_B: Tensor, text: Tensor) -> Tensor:
    """The sequence: time, text, image. Text is ids (B,L), or with a text_dim features (L,B,E). -> (T,B,D)"""
    img_SBD = linear(w, "embed.patch", patchify(x_BCYX, s.patch))
    time_1BD = time_features(t_B, s.width).to(img_SBD.dtype)[None]
    text_LBD = linear(w, "embed.text", text) if s.text_dim else w["embed.text.weight"][text.T]
    return torch.cat([time_1BD, text_LBD, img_SBD]) + w["embed.positions.table"][:, None]


def block(w: Weights, prefix: str, s: Shape, x_TBD: Tensor, skip_TBD: Tensor | None) -> Tensor:
    """A block of the later half first takes in the output of its counterpart in the earlier half."""
    if skip_TBD is not None:
        x_TBD = linear(w, f"{prefix}.skip", torch.cat([x_TBD, skip_TBD], dim=-1))
    inner_TBD = layer_norm(w, f"{prefix}.norm_1", x_TBD)
    x_TBD = x_TBD + s.residual * self_attention(w, prefix, inner_TBD, s.head_dim, s.softmax_scale)
    return x_TBD + s.residual * mlp(w, prefix, layer_norm(w, f"{prefix}.norm_2", x_TBD))


def head(w: Weights, s: Shape, x_TBD: Tensor, multiplier: float) -> Tensor:
    """Image tokens to the prediction, smoothed over the patches' borders by a convolution. -> (S,B,F)"""
    out_SBF = linear(w, "head.out", layer_norm(w, "head.norm", x_TBD[s.extra_tokens :]) * multiplier)
    out_BCYX = unpatchify(out_SBF, s.patch, s.grid)
    return patchify(F.conv2d(out_BCYX, w["head.conv.weight"], w["head.conv.bias"], padding=1), s.patch)


def denoise(w: Weights, s: Shape, x_BCYX: Tensor, t_B: Tensor, text: Tensor, multiplier: float = 1.0) -> Tensor:
    """The prediction at noisy images, as tokens. The text is what embed takes. -> (S,B,F)"""
    x_TBD, earlier = embed(w, s, x_BCYX, t_B, text), []
    for i in range(s.depth):
        x_TBD = block(w, f"blocks.{i}", s, x_TBD, earlier.pop() if i > s.half else None)
        if i < s.half:
            earlier.append(x_TBD)
    return head(w, s, x_TBD, multiplier)


def forward(w: Weights, s: Shape, batch: Batch, multiplier: float = 1.0) -> Tensor:
    """The prediction at the batch's noisy images, as tokens. `multiplier` is head.out.weight's. -> (S,B,F)"""
    text = batch.features_LBE if s.text_dim else batch.ids_BL
    return denoise(w, s, batch.noisy_BCYX(), batch.t_B, text, multiplier)


rules = partial(common.rules, parameters)
init = partial(common.init, parameters)
loss_of = partial(common.loss_of, forward)
train = partial(common.train, forward)
