"""MMDiT: the dual-stream diffusion transformer of Stable Diffusion 3 (Esser et al., arXiv 2403.03206, Figure 2).

Image and text tokens have weights of their own and meet in joint attention; a conditioning vector (timestep and pooled
text) modulates both through adaLN. Sequence first: S image tokens, L text tokens, B samples, D width, H heads, d
head_dim. One process or a thousand: the layers know, this file does not.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.models.layers import (
    MLP,
    QKV,
    TIME_FEATURES,
    ConditionMLP,
    Inputs,
    ModulatedHead,
    PatchEmbed,
    image_stream,
    positions_1d,
    text_embedder,
    text_of,
    text_stream,
    time_features,
)
from mpdit.parallel import tokens
from mpdit.parallel.backend import Attention, RowLinear
from mpdit.parallel.context import Context
from mpdit.parallel.linears import Modulation
from mpdit.parallel.stages import Grid, Stream
from mpdit_kernels.modulate import gated_residual, gated_residual_modulate, layer_norm_modulate


class Embed(nn.Module):
    """Inputs -> image tokens [S, B, D], text tokens [L, B, D], conditioning [1, B, D]."""

    text_positions_LD: Tensor

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        model = ctx.config.model
        self.ctx = ctx
        self.patch = PatchEmbed(ctx)
        self.text = text_embedder(ctx)
        self.time = ConditionMLP(ctx, TIME_FEATURES)
        self.pooled = ConditionMLP(ctx, model.pooled_dim or model.text_dim or ctx.width)
        self.register_buffer("text_positions_LD", positions_1d(model.text_tokens, ctx.width), persistent=False)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        image_SBD = self.patch(inputs.image_BCHW)
        given_LB = text_of(self.ctx, inputs)
        embedded_LBD = self.text(given_LB)
        text_LBD = tokens.own_context(embedded_LBD + self.text_positions_LD[:, None].to(embedded_LBD))
        if inputs.pooled_BP is None:
            pooled_BP = pool(given_LB if given_LB.ndim == 3 else embedded_LBD, given_LB)
        else:
            pooled_BP = inputs.pooled_BP.to(self.ctx.dtype)
        cond_BD = F.silu(self.time(time_features(inputs.time_B).to(self.ctx.dtype)) + self.pooled(pooled_BP))
        return tokens.scatter(self.ctx, image_SBD), tokens.scatter(self.ctx, text_LBD), cond_BD[None]


def pool(x_LBD: Tensor, text_LB: Tensor) -> Tensor:
    """The mean [B, D] of `x` over the tokens that are not padding."""
    real_LB = (text_LB != 0).any(-1) if text_LB.ndim == 3 else text_LB != 0
    weight_LB = real_LB.to(x_LBD.dtype)
    return (x_LBD * weight_LB[..., None]).sum(0) / weight_LB.sum(0).clamp(min=1)[:, None]


class StreamBlock(nn.Module):
    """One modality's half of a block. Pre-only: it feeds keys and values, and nothing reads what it would become."""

    def __init__(self, ctx: Context, *, pre_only: bool) -> None:
        super().__init__()
        self.pre_only, self.residual_multiplier = pre_only, ctx.residual_multiplier
        self.ada = Modulation(ctx, 2 if pre_only else 6)
        self.qkv = QKV(ctx)
        if not pre_only:
            self.proj = RowLinear(ctx, ctx.width, ctx.width)
            self.mlp = MLP(ctx)

    def residual(self, x_SBD: Tensor, attended_SBD: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x_SBD, normed_SBD = gated_residual_modulate(
            x_SBD, gate_attn, self.proj(attended_SBD), shift_mlp, scale_mlp, self.residual_multiplier
        )
        return gated_residual(x_SBD, gate_mlp, self.mlp(normed_SBD), self.residual_multiplier)


class Block(nn.Module):
    """(image, text, conditioning) -> the same. The text stream of the last block is pre-only."""

    def __init__(self, ctx: Context, *, last: bool) -> None:
        super().__init__()
        self.img = StreamBlock(ctx, pre_only=False)
        self.txt = StreamBlock(ctx, pre_only=last)
        self.attention = Attention(ctx)

    def forward(self, image_SBD: Tensor, text_LBD: Tensor, cond_1BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        img_mod, txt_mod = self.img.ada(cond_1BD), self.txt.ada(cond_1BD)
        img_qkv = self.img.qkv(layer_norm_modulate(image_SBD, *img_mod[:2]))
        txt_qkv = self.txt.qkv(layer_norm_modulate(text_LBD, *txt_mod[:2]))
        q_SBHd, k_SBHd, v_SBHd = (torch.cat(pair) for pair in zip(img_qkv, txt_qkv, strict=True))
        attended = self.attention(q_SBHd, k_SBHd, v_SBHd)
        # Not image_SBD.shape[0]: under sequence parallelism the projections have gathered the tokens.
        img_attended, txt_attended = attended.split([img_qkv[0].shape[0], txt_qkv[0].shape[0]])
        image_SBD = self.img.residual(image_SBD, img_attended, img_mod)
        if not self.txt.pre_only:
            text_LBD = self.txt.residual(text_LBD, txt_attended, txt_mod)
        return image_SBD, text_LBD, cond_1BD


class MMDiT:
    """The parts, for whoever puts them on stages (mpdit.parallel.stages)."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def embed(self) -> nn.Module:
        return Embed(self.ctx)

    def block(self, index: int) -> nn.Module:
        return Block(self.ctx.of_block(index), last=index == self.ctx.config.model.depth - 1)

    def head(self) -> nn.Module:
        return ModulatedHead(self.ctx)

    def streams(self, done: int, image: Grid) -> list[Stream]:
        text = text_stream(self.ctx.config.model)
        return [image_stream(image), text, Stream(name="conditioning", tokens=1, split=False)]
