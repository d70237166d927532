"""MMDiT: the dual-stream diffusion transformer of Stable Diffusion 3 (Esser et al., arXiv 2403.03206, Figure 2).

Image and text tokens have weights of their own and meet in joint attention; a conditioning vector (timestep and pooled
text) modulates both through adaLN. Sequence first: S image tokens, L text tokens, B samples, D width, H heads, d
head_dim, P = patch * patch * channels. One process or a thousand: the layers know, this file does not.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.models.layers import TIME_FEATURES, ConditionMLP, Inputs, patchify, positions_1d, positions_2d, time_features
from mpdit.mup.roles import Role
from mpdit.parallel import tokens
from mpdit.parallel.attention import attend
from mpdit.parallel.context import Context
from mpdit.parallel.linears import ColumnLinear, HeadNorm, Modulation, Readout, ReplicatedLinear, RowLinear, Table
from mpdit_kernels.modulate import gated_residual, layer_norm_modulate


class Embed(nn.Module):
    """Inputs -> image tokens [S, B, D], text tokens [L, B, D], conditioning [1, B, D]."""

    image_positions_SD: Tensor
    text_positions_LD: Tensor

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        model = ctx.config.model
        self.ctx, self.patch_size = ctx, model.patch
        self.patch = ReplicatedLinear(ctx, model.patch**2 * model.channels, ctx.width, Role.INPUT)
        self.text = Table(ctx, model.vocab_size)
        self.time = ConditionMLP(ctx, TIME_FEATURES, Role.INPUT)
        self.pooled = ConditionMLP(ctx, ctx.width, Role.HIDDEN)
        side = model.image_size // model.patch
        self.register_buffer("image_positions_SD", positions_2d(side, side, ctx.width), persistent=False)
        self.register_buffer("text_positions_LD", positions_1d(model.text_tokens, ctx.width), persistent=False)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        image_SBD = self.image_tokens(inputs.image_BCHW)
        looked_up_LBD = self.text(inputs.text_BL.T)
        text_LBD = tokens.own_context(looked_up_LBD + self.text_positions_LD[:, None].to(looked_up_LBD))
        time_BD = self.time(time_features(inputs.time_B).to(self.ctx.dtype))
        cond_BD = F.silu(time_BD + self.pooled(pool(looked_up_LBD, inputs.text_BL)))
        return tokens.scatter(self.ctx, image_SBD), tokens.scatter(self.ctx, text_LBD), cond_BD[None]

    def image_tokens(self, image_BCHW: Tensor) -> Tensor:
        patches_SBP = tokens.own_context(patchify(image_BCHW, self.patch_size)).to(self.ctx.dtype)
        return self.patch(patches_SBP) + tokens.own_context(self.image_positions_SD)[:, None].to(self.ctx.dtype)


def pool(looked_up_LBD: Tensor, text_BL: Tensor) -> Tensor:
    """The mean [B, D] over the tokens that are not padding."""
    weight_LB = (text_BL != 0).T.to(looked_up_LBD.dtype)
    return (looked_up_LBD * weight_LB[..., None]).sum(0) / weight_LB.sum(0).clamp(min=1)[:, None]


class Stream(nn.Module):
    """One modality's half of a block. Pre-only: it feeds keys and values, and nothing reads what it would become."""

    def __init__(self, ctx: Context, *, pre_only: bool) -> None:
        super().__init__()
        model, D = ctx.config.model, ctx.width
        self.head_dim, self.pre_only = model.head_dim, pre_only
        self.ada = Modulation(ctx, 2 if pre_only else 6)
        self.qkv = ColumnLinear(ctx, D, 3 * D)
        self.q_layernorm = HeadNorm(ctx, model.head_dim) if model.qk_norm else nn.Identity()
        self.k_layernorm = HeadNorm(ctx, model.head_dim) if model.qk_norm else nn.Identity()
        if not pre_only:
            self.proj = RowLinear(ctx, D, D)
            self.fc1 = ColumnLinear(ctx, D, model.mlp_ratio * D)
            self.fc2 = RowLinear(ctx, model.mlp_ratio * D, D)

    def queries_keys_values(self, x_SBD: Tensor, shift_1BD: Tensor, scale_1BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[S, B, H, d] each. The rows of qkv are ordered [heads, 3, d], so a contiguous shard holds whole heads."""
        qkv = self.qkv(layer_norm_modulate(x_SBD, shift_1BD, scale_1BD)).unflatten(-1, (-1, 3, self.head_dim))
        q_SBHd, k_SBHd, v_SBHd = qkv.unbind(-2)
        return self.q_layernorm(q_SBHd), self.k_layernorm(k_SBHd), v_SBHd

    def residual(self, x_SBD: Tensor, attended_SBD: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x_SBD = gated_residual(x_SBD, gate_attn, self.proj(attended_SBD))
        hidden_SBF = F.gelu(self.fc1(layer_norm_modulate(x_SBD, shift_mlp, scale_mlp)), approximate="tanh")
        return gated_residual(x_SBD, gate_mlp, self.fc2(hidden_SBF))


class Block(nn.Module):
    """(image, text, conditioning) -> (image, text). The text stream of the last block is pre-only."""

    def __init__(self, ctx: Context, *, last: bool) -> None:
        super().__init__()
        self.softmax_scale = ctx.softmax_scale
        self.img = Stream(ctx, pre_only=False)
        self.txt = Stream(ctx, pre_only=last)

    def forward(self, image_SBD: Tensor, text_LBD: Tensor, cond_1BD: Tensor) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img.ada(cond_1BD), self.txt.ada(cond_1BD)
        img_qkv = self.img.queries_keys_values(image_SBD, *img_mod[:2])
        txt_qkv = self.txt.queries_keys_values(text_LBD, *txt_mod[:2])
        q_SBHd, k_SBHd, v_SBHd = (torch.cat(pair) for pair in zip(img_qkv, txt_qkv, strict=True))
        attended = attend(q_SBHd, k_SBHd, v_SBHd, self.softmax_scale)
        # Not image_SBD.shape[0]: under sequence parallelism the projections have gathered the tokens.
        img_attended, txt_attended = attended.split([img_qkv[0].shape[0], txt_qkv[0].shape[0]])
        image_SBD = self.img.residual(image_SBD, img_attended, img_mod)
        if not self.txt.pre_only:
            text_LBD = self.txt.residual(text_LBD, txt_attended, txt_mod)
        return image_SBD, text_LBD


class Head(nn.Module):
    """Final adaLN and readout: (image, text, conditioning) -> prediction [S, B, P]."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        model = ctx.config.model
        self.ctx = ctx
        self.ada = Modulation(ctx, 2, tokens_sharded=False)
        self.out = Readout(ctx, model.patch**2 * model.channels)

    def forward(self, image_SBD: Tensor, text_LBD: Tensor, cond_1BD: Tensor) -> Tensor:
        return self.out(layer_norm_modulate(tokens.gather(self.ctx, image_SBD), *self.ada(cond_1BD)))


class MMDiT:
    """The parts, for whoever puts them on stages (mpdit.parallel.stages)."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def embed(self) -> nn.Module:
        return Embed(self.ctx)

    def block(self, index: int) -> nn.Module:
        return Block(self.ctx, last=index == self.ctx.config.model.depth - 1)

    def head(self) -> nn.Module:
        return Head(self.ctx)

    def streams(self) -> dict[str, int]:
        """Tokens of each stream that crosses a stage boundary, in the blocks' order; conditioning comes last."""
        model = self.ctx.config.model
        return {"image": (model.image_size // model.patch) ** 2, "text": model.text_tokens}
