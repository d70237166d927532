"""PixArt-alpha (Chen et al., arXiv 2310.00426, Figure 4): a DiT with cross-attention to text and adaLN-single.

One modulation of the timestep is computed once and shared; each block adds its own ``scale_shift`` table to it, which
muP counts as an input layer. The conditioning stream has seven rows: the six shared ones and the timestep embedding
itself, for the head. S image tokens, L text tokens, B samples, D width, H heads, d head_dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.models.layers import (
    MLP,
    TIME_FEATURES,
    ConditionMLP,
    Inputs,
    PatchEmbed,
    SelfAttention,
    image_stream,
    out_features,
    text_of,
    text_stream,
    time_features,
)
from mpdit.parallel import tokens
from mpdit.parallel.backend import Attention, ColumnLinear, RowLinear
from mpdit.parallel.context import Context
from mpdit.parallel.linears import Modulation, Readout, ScaleShift, Table
from mpdit.parallel.stages import Grid, Stream
from mpdit_kernels.modulate import gated_residual, gated_residual_modulate, layer_norm_modulate


class Embed(nn.Module):
    """Inputs -> image tokens [S, B, D], text tokens [L, B, D], conditioning [7, B, D]."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        model = ctx.config.model
        self.ctx = ctx
        self.patch = PatchEmbed(ctx)
        self.time = ConditionMLP(ctx, TIME_FEATURES)
        self.ada = Modulation(ctx, 6, tokens_sharded=False)
        gelu = nn.GELU(approximate="tanh")
        self.text = ConditionMLP(ctx, model.text_dim, gelu) if model.text_dim else Table(ctx, model.vocab_size)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        image_SBD = self.patch(inputs.image_BCHW)
        text_LBD = tokens.own_context(self.text(text_of(self.ctx, inputs)))
        time_1BD = self.time(time_features(inputs.time_B).to(self.ctx.dtype))[None]
        cond_7BD = torch.cat([*self.ada(F.silu(time_1BD)), time_1BD])
        return tokens.scatter(self.ctx, image_SBD), tokens.scatter(self.ctx, text_LBD), cond_7BD


class CrossAttention(nn.Module):
    """Queries of the image [S, B, D], keys and values of the text [L, B, D] -> [S, B, D]; starts at zero."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.head_dim = ctx.config.model.head_dim
        self.q = ColumnLinear(ctx, ctx.width, ctx.width)
        self.kv = ColumnLinear(ctx, ctx.width, 2 * ctx.width)
        self.attention = Attention(ctx)
        self.proj = RowLinear(ctx, ctx.width, ctx.width, gain=0.0)

    def forward(self, x_SBD: Tensor, text_LBD: Tensor) -> Tensor:
        q_SBHd = self.q(x_SBD).unflatten(-1, (-1, self.head_dim))
        k_LBHd, v_LBHd = self.kv(text_LBD).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        return self.proj(self.attention(q_SBHd, k_LBHd, v_LBHd))


class Block(nn.Module):
    """(image, text, conditioning) -> the same."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.residual_multiplier = ctx.residual_multiplier
        self.scale_shift = ScaleShift(ctx, 6)
        self.attn = SelfAttention(ctx)
        self.cross = CrossAttention(ctx)
        self.mlp = MLP(ctx)

    def forward(self, x_SBD: Tensor, text_LBD: Tensor, cond_7BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.scale_shift(cond_7BD[:6])
        attn_SBD = self.attn(layer_norm_modulate(x_SBD, shift_attn, scale_attn))
        x_SBD = gated_residual(x_SBD, gate_attn, attn_SBD, self.residual_multiplier)
        x_SBD, normed_SBD = gated_residual_modulate(
            x_SBD, None, self.cross(x_SBD, text_LBD), shift_mlp, scale_mlp, self.residual_multiplier
        )
        return gated_residual(x_SBD, gate_mlp, self.mlp(normed_SBD), self.residual_multiplier), text_LBD, cond_7BD


class Head(nn.Module):
    """(image, text, conditioning) -> prediction [S, B, K]."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.ctx = ctx
        self.scale_shift = ScaleShift(ctx, 2, tokens_sharded=False)
        self.out = Readout(ctx, out_features(ctx.config.model))

    def forward(self, image_SBD: Tensor, text_LBD: Tensor, cond_7BD: Tensor) -> Tensor:
        shift_1BD, scale_1BD = self.scale_shift(cond_7BD[6:])
        return self.out(layer_norm_modulate(tokens.gather(self.ctx, image_SBD), shift_1BD, scale_1BD))


class PixArt:
    """The parts, for whoever puts them on stages (mpdit.parallel.stages)."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def embed(self) -> nn.Module:
        return Embed(self.ctx)

    def block(self, index: int) -> nn.Module:
        return Block(self.ctx.of_block(index))

    def head(self) -> nn.Module:
        return Head(self.ctx)

    def streams(self, done: int, image: Grid) -> list[Stream]:
        text = text_stream(self.ctx.config.model)
        return [image_stream(image), text, Stream(name="conditioning", tokens=7, split=False)]
