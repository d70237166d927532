"""DiT: the class-conditional diffusion transformer with adaLN-Zero (Peebles & Xie, arXiv 2212.09748, Figure 3).

S image tokens, B samples, D width. Under muP its adaLN layers start as any hidden layer (``mup.adaln_init: hidden``, as
in the paper's DiT-muP) or at zero.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.models.layers import (
    MLP,
    TIME_FEATURES,
    ConditionMLP,
    Inputs,
    ModulatedHead,
    PatchEmbed,
    SelfAttention,
    image_stream,
    time_features,
)
from mpdit.parallel import tokens
from mpdit.parallel.context import Context
from mpdit.parallel.linears import Modulation, Table
from mpdit.parallel.stages import Grid, Stream
from mpdit_kernels.modulate import gated_residual, gated_residual_modulate, layer_norm_modulate


class Embed(nn.Module):
    """Inputs, with one class label a sample -> image tokens [S, B, D], conditioning [1, B, D]."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.ctx = ctx
        self.patch = PatchEmbed(ctx)
        self.time = ConditionMLP(ctx, TIME_FEATURES)
        self.label = Table(ctx, ctx.config.model.vocab_size)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        image_SBD = self.patch(inputs.image_BCHW)
        time_BD = self.time(time_features(inputs.time_B).to(self.ctx.dtype))
        # Every adaLN layer applies SiLU to the conditioning first: once here is the same.
        cond_BD = F.silu(time_BD + self.label(inputs.text_BL[:, 0]))
        return tokens.scatter(self.ctx, image_SBD), cond_BD[None]


class Block(nn.Module):
    """(image, conditioning) -> the same."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.residual_multiplier = ctx.residual_multiplier
        self.ada = Modulation(ctx, 6)
        self.attn = SelfAttention(ctx)
        self.mlp = MLP(ctx)

    def forward(self, x_SBD: Tensor, cond_1BD: Tensor) -> tuple[Tensor, Tensor]:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.ada(cond_1BD)
        attn_SBD = self.attn(layer_norm_modulate(x_SBD, shift_attn, scale_attn))
        x_SBD, normed_SBD = gated_residual_modulate(
            x_SBD, gate_attn, attn_SBD, shift_mlp, scale_mlp, self.residual_multiplier
        )
        return gated_residual(x_SBD, gate_mlp, self.mlp(normed_SBD), self.residual_multiplier), cond_1BD


class DiT:
    """The parts, for whoever puts them on stages (mpdit.parallel.stages)."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def embed(self) -> nn.Module:
        return Embed(self.ctx)

    def block(self, index: int) -> nn.Module:
        return Block(self.ctx.of_block(index))

    def head(self) -> nn.Module:
        return ModulatedHead(self.ctx)

    def streams(self, done: int, image: Grid) -> list[Stream]:
        return [image_stream(image), Stream(name="conditioning", tokens=1, split=False)]
