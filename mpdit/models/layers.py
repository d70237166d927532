"""Pieces that several networks share: patches, fixed positions, timestep features, embedders, self-attention, MLP.

Shapes: B samples, C channels, H x W pixels, p patch side, S image tokens, L text tokens, D width, F = 4 D,
P = p * p * C, K = p * p * output channels.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.config import Model
from mpdit.parallel import tokens
from mpdit.parallel.backend import Attention, ColumnLinear, RowLinear
from mpdit.parallel.context import Context
from mpdit.parallel.linears import HeadNorm, Modulation, Readout, ReplicatedLinear, Table
from mpdit.parallel.stages import Grid, Stream
from mpdit_kernels.modulate import layer_norm_modulate

TIME_FEATURES = 256  # of the sinusoidal timestep embedding, as in DiT and SD3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a network is asked: noisy images [B, C, H, W], times in [0, 1] [B], and text [B, L]: token ids (0 is
    padding), or one class label, or the features [B, L, text_dim] of a text encoder (all zeros are padding). With
    ``model.pooled_dim``, the encoder's pooled vector as well.

    For REPA, on the stage that learns it: a frozen teacher's features of the clean images, a vector for each patch of
    this context rank.
    """

    image_BCHW: Tensor
    time_B: Tensor
    text_BL: Tensor
    pooled_BP: Tensor | None = None
    teacher_SBF: Tensor | None = None


def out_channels(model: Model) -> int:
    """Of the prediction: the image's, and as many again for a learned variance."""
    return model.channels * (2 if model.learn_sigma else 1)


def out_features(model: Model) -> int:
    """K: of a token of the prediction."""
    return model.patch**2 * out_channels(model)


def image_stream(image: Grid) -> Stream:
    return Stream(name="image", tokens=image.tokens, keys=image.keys)


def text_stream(model: Model) -> Stream:
    return Stream(name="text", tokens=model.text_tokens, keys="model.text_tokens")


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [S, B, p * p * C], patches row by row, each flattened as (row, column, channel)."""
    B, C, H, W = image_BCHW.shape
    grid = image_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return grid.permute(2, 4, 0, 3, 5, 1).reshape(H // patch * (W // patch), B, patch * patch * C)


def unpatchify(tokens_SBP: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patchify` for images of height x width pixels."""
    rows, columns = height // patch, width // patch
    grid = tokens_SBP.reshape(rows, columns, tokens_SBP.shape[1], patch, patch, -1)
    return grid.permute(2, 5, 0, 3, 1, 4).reshape(tokens_SBP.shape[1], -1, height, width)


def _sin_cos(position_S: Tensor, features: int) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(features // 2, dtype=torch.float64) / (features // 2))
    angle = position_S.to(torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def positions_1d(tokens: int, width: int) -> Tensor:
    """Fixed sin-cos positions [tokens, width], fp32."""
    return _sin_cos(torch.arange(tokens), width).float()


def axis_positions(count: int, side: int, features: int) -> Tensor:
    """Sin-cos positions [count, features], fp32, of `count` patches whose middle is that of `side` patches: of those,
    the first is at 0. So grids of any shape share their centre (Esser et al., arXiv 2403.03206, section 5.3.2)."""
    return _sin_cos(torch.arange(count) - (count - side) / 2, features).float()


def positions_2d(x_CE: Tensor, y_RE: Tensor) -> Tensor:
    """Fixed 2-D positions [R * C, 2 E] of R rows of C patches out of those of each axis: first half x, second half y
    (as in DiT and MAE)."""
    return torch.cat([x_CE.repeat(len(y_RE), 1), y_RE.repeat_interleave(len(x_CE), 0)], -1)


def time_features(time_B: Tensor, features: int = TIME_FEATURES) -> Tensor:
    """Sinusoidal features [B, features] of times in [0, 1], scaled to DDPM's 1000 steps; fp32."""
    half = features // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=time_B.device) / half)
    angle = 1000.0 * time_B.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class ConditionMLP(nn.Module):
    """Linear, SiLU (or another), linear: [..., fan_in] -> [..., D]."""

    def __init__(self, ctx: Context, fan_in: int, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(ctx, fan_in, ctx.width)
        self.linear_2 = ReplicatedLinear(ctx, ctx.width, ctx.width)
        self.activation = activation

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x_BF)))


def text_of(ctx: Context, inputs: Inputs) -> Tensor:
    """Token ids [L, B], or features [L, B, text_dim] in the network's precision."""
    text_LB = inputs.text_BL.transpose(0, 1)
    return text_LB.to(ctx.dtype) if text_LB.ndim == 3 else text_LB


def text_embedder(ctx: Context) -> nn.Module:
    """Text to width: a learned table for ids, a linear layer for the features of a text encoder."""
    model = ctx.config.model
    return ReplicatedLinear(ctx, model.text_dim, ctx.width) if model.text_dim else Table(ctx, model.vocab_size)


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] of any shape -> this context rank's tokens [S, B, D], with fixed sin-cos positions."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        model = ctx.config.model
        self.ctx, self.patch = ctx, model.patch
        self.linear = ReplicatedLinear(ctx, model.patch**2 * model.channels, ctx.width)
        self.side = model.image_size // model.patch
        self._axes: dict[int, Tensor] = {}  # positions by number of patches; few and small, whatever the shapes

    def forward(self, image_BCHW: Tensor) -> Tensor:
        patches_SBP = tokens.own_context(patchify(image_BCHW, self.patch)).to(self.ctx.dtype)
        rows, columns = (size // self.patch for size in image_BCHW.shape[2:])
        positions_SD = positions_2d(self._axis(columns), self._axis(rows))
        return self.linear(patches_SBP) + tokens.own_context(positions_SD)[:, None]

    def _axis(self, count: int) -> Tensor:
        if count not in self._axes:
            positions = axis_positions(count, self.side, self.ctx.width // 2)
            self._axes[count] = positions.to(self.linear.weight.device, self.ctx.dtype)
        return self._axes[count]


class QKV(nn.Module):
    """[S, B, D] -> queries, keys, values of this rank's heads, [S, B, H, d] each; the first two normalised if asked."""

    def __init__(self, ctx: Context, *, bias: bool = True) -> None:
        super().__init__()
        self.head_dim = ctx.config.model.head_dim
        self.linear = ColumnLinear(ctx, ctx.width, 3 * ctx.width, bias=bias)
        self.q_layernorm = head_norm(ctx)
        self.k_layernorm = head_norm(ctx)

    def forward(self, x_SBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Rows are ordered [heads, 3, d], so that a contiguous shard of them holds whole heads.
        q_SBHd, k_SBHd, v_SBHd = self.linear(x_SBD).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        return self.q_layernorm(q_SBHd), self.k_layernorm(k_SBHd), v_SBHd


def head_norm(ctx: Context) -> nn.Module:
    model = ctx.config.model
    return HeadNorm(ctx, model.head_dim) if model.qk_norm else nn.Identity()


class SelfAttention(nn.Module):
    """[S, B, D] -> [S, B, D], every token to every token."""

    def __init__(self, ctx: Context, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.qkv = QKV(ctx, bias=qkv_bias)
        self.attention = Attention(ctx)
        self.proj = RowLinear(ctx, ctx.width, ctx.width)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return self.proj(self.attention(*self.qkv(x_SBD)))


class MLP(nn.Module):
    """[S, B, D] -> [S, B, D] through F = mlp_ratio * D features."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        features = ctx.config.model.mlp_ratio * ctx.width
        self.fc1 = ColumnLinear(ctx, ctx.width, features)
        self.fc2 = RowLinear(ctx, features, ctx.width)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_SBD), approximate="tanh"))


class ModulatedHead(nn.Module):
    """Final adaLN and readout: image tokens [S, B, D], conditioning [1, B, D] -> prediction [S, B, K]."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.ctx = ctx
        self.ada = Modulation(ctx, 2, tokens_sharded=False)
        self.out = Readout(ctx, out_features(ctx.config.model))

    def forward(self, image_SBD: Tensor, *others: Tensor) -> Tensor:
        """The conditioning is the last of `others`."""
        return self.out(layer_norm_modulate(tokens.gather(self.ctx, image_SBD), *self.ada(others[-1])))
