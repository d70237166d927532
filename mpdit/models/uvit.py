"""U-ViT (Bao et al., arXiv 2209.12152, Figure 1): time, text and image are tokens of one stream; long skips.

Blocks 0 ... h-1 leave what they made for blocks 2h ... h+1, and block h lies between: ``depth`` counts all 2h + 1.
Under pipeline parallelism the skips that are open cross with the tokens. Positions are learned, of the square of
``model.image_size`` alone. T tokens, S of the image, B samples, D width.
"""

import dataclasses

from torch import Tensor, cat, nn

from mpdit.models.layers import (
    MLP,
    Inputs,
    SelfAttention,
    out_channels,
    out_features,
    patchify,
    text_embedder,
    text_of,
    time_features,
    unpatchify,
)
from mpdit.mup.roles import Group, declare, matrix, vector
from mpdit.parallel import tokens
from mpdit.parallel.backend import LayerNorm, WholeLinear
from mpdit.parallel.context import Context
from mpdit.parallel.linears import Positions, Readout, ReplicatedLinear
from mpdit.parallel.stages import Grid, Stream
from mpdit_kernels.modulate import gated_residual


class Embed(nn.Module):
    """Inputs -> tokens [T, B, D]: the time, the text or label, the image; learned positions."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        model = ctx.config.model
        self.ctx, self.patch_size = ctx, model.patch
        self.patch = ReplicatedLinear(ctx, model.patch**2 * model.channels, ctx.width)
        self.text = text_embedder(ctx)
        self.positions = Positions(ctx, _tokens(ctx, Grid.of(model)))

    def forward(self, inputs: Inputs) -> tuple[Tensor]:
        time_1BD = time_features(inputs.time_B, self.ctx.width).to(self.ctx.dtype)[None]
        text_LBD = self.text(text_of(self.ctx, inputs))
        image_SBD = self.patch(patchify(inputs.image_BCHW, self.patch_size).to(self.ctx.dtype))
        x_TBD = self.positions(cat([time_1BD, text_LBD, image_SBD]))
        return (tokens.scatter(self.ctx, tokens.own_context(x_TBD)),)


def _tokens(ctx: Context, image: Grid) -> int:
    return 1 + ctx.config.model.text_tokens + image.tokens


class Block(nn.Module):
    """(tokens, newest skip ... oldest skip) -> the same, one skip more on the way in, one less on the way out."""

    def __init__(self, ctx: Context, *, takes_skip: bool, leaves_skip: bool) -> None:
        super().__init__()
        self.leaves_skip, self.residual_multiplier = leaves_skip, ctx.residual_multiplier
        self.skip = WholeLinear(ctx, 2 * ctx.width, ctx.width) if takes_skip else None
        if self.skip is not None:
            self.skip.on_main_path = True  # type: ignore[assignment]
        self.norm_1 = LayerNorm(ctx)
        self.attn = SelfAttention(ctx, qkv_bias=False)
        self.norm_2 = LayerNorm(ctx)
        self.mlp = MLP(ctx)

    def forward(self, x_TBD: Tensor, *skips: Tensor) -> tuple[Tensor, ...]:
        if self.skip is not None:
            x_TBD, skips = self.skip(cat([x_TBD, skips[0]], -1)), skips[1:]
        attn_TBD = self.attn(self.norm_1(x_TBD))
        x_TBD, normed_TBD = self.norm_2.of_sum(x_TBD, attn_TBD, self.residual_multiplier)
        x_TBD = gated_residual(x_TBD, None, self.mlp(normed_TBD), self.residual_multiplier)
        return (x_TBD, x_TBD, *skips) if self.leaves_skip else (x_TBD, *skips)


class Convolution(nn.Conv2d):
    """U-ViT's last 3 x 3 convolution over the predicted image: finite to finite, so no width acts on it."""

    def __init__(self, ctx: Context, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, dtype=ctx.dtype)
        weight = dataclasses.replace(matrix(channels, 9 * channels, group=Group.OUTPUT), shape=tuple(self.weight.shape))
        declare(self, weight=weight, bias=vector(channels))


class Head(nn.Module):
    """Tokens [T, B, D] -> prediction [S, B, K] of this context rank's image tokens."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        model = ctx.config.model
        self.ctx, self.patch, self.side = ctx, model.patch, model.image_size
        self.image_tokens = Grid.of(model).tokens
        self.norm = LayerNorm(ctx, tokens_sharded=False)
        self.out = Readout(ctx, out_features(model))
        self.conv = Convolution(ctx, out_channels(model))

    def forward(self, x_TBD: Tensor) -> Tensor:
        read_TBK = self.out(self.norm(tokens.gather(self.ctx, x_TBD)))
        # Pixels meet their neighbours here, which may be another context rank's.
        image_SBK = tokens.join_context(read_TBK)[-self.image_tokens :]
        image_BCHW = self.conv(unpatchify(image_SBK, self.patch, self.side, self.side))
        return tokens.own_context(patchify(image_BCHW, self.patch))


class UViT:
    """The parts, for whoever puts them on stages (mpdit.parallel.stages)."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def embed(self) -> nn.Module:
        return Embed(self.ctx)

    def block(self, index: int) -> nn.Module:
        half = self.ctx.config.model.depth // 2
        return Block(self.ctx.of_block(index), takes_skip=index > half, leaves_skip=index < half)

    def head(self) -> nn.Module:
        return Head(self.ctx)

    def streams(self, done: int, image: Grid) -> list[Stream]:
        keys = f"1 + model.text_tokens + {image.keys}"
        open_skips = min(done, self.ctx.config.model.depth - done)
        whole = Stream(name="image, text and time", tokens=_tokens(self.ctx, image), keys=keys)
        skips = [dataclasses.replace(whole, name=f"skip {i}", skip=True) for i in range(open_skips)]
        return [whole, *skips]
