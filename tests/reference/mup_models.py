"""DiT and PixArt-alpha as plain modules for Microsoft's mup package (github.com/microsoft/mup); nothing of mpdit.

DiT: Peebles & Xie (arXiv 2212.09748), adaLN-Zero blocks. PixArt-alpha: Chen et al. (arXiv 2310.00426), with
adaLN-single and cross-attention. Their layers and names, down to the patches' convolution, fused qkv rows ordered
(q | k | v, heads, d) and a MuReadout at the end. How they map onto the project's layers stands at the bottom.

N samples, C channels, H x W latent pixels, p patch side, T image tokens, L text tokens, D width, d head_dim.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mup import MuReadout

TIME_FEATURES = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    width: int
    depth: int
    side: int  # latent pixels
    head_dim: int = 72
    patch: int = 2
    channels: int = 4
    classes: int = 10  # DiT: the table has one row more, for "no class"
    text_dim: int = 64  # PixArt: features of a token of the text encoder
    output_mult: float = 1.0

    @property
    def heads(self) -> int:
        return self.width // self.head_dim


def mlp(fan_in: int, hidden: int, fan_out: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, hidden), activation, nn.Linear(hidden, fan_out))


def position_table(side: int, width: int) -> Tensor:
    """MAE's fixed positions [side * side, width]: sines and cosines of the column, then those of the row."""
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    along = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns, rows = along.repeat(side, 1), along.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def timestep_embedding(t: Tensor) -> Tensor:
    """Timesteps [N] in [0, 1000) -> [N, 256]."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angle = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale) + shift


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, heads, T, d] and twice [N, heads, L, d] -> [N, T, D]."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


class PatchEmbed(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(s.channels, s.width, kernel_size=s.patch, stride=s.patch)
        self.register_buffer("pos_embed", position_table(s.side // s.patch, s.width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2) + self.pos_embed


class TimestepEmbedder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.mlp = mlp(TIME_FEATURES, s.width, s.width, nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t))


class LabelEmbedder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(s.classes + 1, s.width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads = s.heads
        self.qkv = nn.Linear(s.width, 3 * s.width)
        self.proj = nn.Linear(s.width, s.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v))


class CrossAttention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads = s.heads
        self.q_linear = nn.Linear(s.width, s.width)
        self.kv_linear = nn.Linear(s.width, 2 * s.width)
        self.proj = nn.Linear(s.width, s.width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v))


class Mlp(nn.Module):
    def __init__(self, fan_in: int, hidden: int, fan_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(fan_in, hidden), nn.Linear(hidden, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def unpatchify(x: Tensor, s: Shape) -> Tensor:
    """[N, T, p * p * 2C] -> [N, 2C, H, W]; the features of a token are ordered (row, column, channel)."""
    side = s.side // s.patch
    grid = x.unflatten(-1, (s.patch, s.patch, -1)).unflatten(1, (side, side))
    return torch.einsum("nhwpqc->nchpwq", grid).flatten(4).flatten(2, 3)


# ---- DiT -------------------------------------------------------------------------------------------------------------


class DiTBlock(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.attn = Attention(s)
        self.mlp = Mlp(s.width, 4 * s.width, s.width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(s.width, 6 * s.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_msa * self.attn(modulate(x, shift_msa, scale_msa))
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(s.width, 2 * s.width))
        self.linear = readout(s)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


def readout(s: Shape) -> MuReadout:
    return MuReadout(s.width, s.patch**2 * 2 * s.channels, readout_zero_init=True, output_mult=s.output_mult)


class DiT(nn.Module):
    """Noisy latents [N, C, H, W], timesteps [N], labels [N] -> noise and variance [N, 2C, H, W]."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.x_embedder = PatchEmbed(s)
        self.t_embedder = TimestepEmbedder(s)
        self.y_embedder = LabelEmbedder(s)
        self.blocks = nn.ModuleList([DiTBlock(s) for _ in range(s.depth)])
        self.final_layer = FinalLayer(s)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.shape)


# ---- PixArt-alpha ----------------------------------------------------------------------------------------------------


class CaptionEmbedder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.y_proj = Mlp(s.text_dim, s.width, s.width)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class PixArtBlock(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.attn = Attention(s)
        self.cross_attn = CrossAttention(s)
        self.mlp = Mlp(s.width, 4 * s.width, s.width)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, s.width))

    def forward(self, x: Tensor, y: Tensor, t0: Tensor) -> Tensor:
        parts = (self.scale_shift_table[None] + t0.unflatten(-1, (6, -1))).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_msa * self.attn(modulate(x, shift_msa, scale_msa))
        x = x + self.cross_attn(x, y)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class T2IFinalLayer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, s.width))
        self.linear = readout(s)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


class PixArt(nn.Module):
    """Noisy latents [N, C, H, W], timesteps [N], features [N, L, text_dim] -> noise and variance [N, 2C, H, W]."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.x_embedder = PatchEmbed(s)
        self.t_embedder = TimestepEmbedder(s)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(s.width, 6 * s.width))
        self.y_embedder = CaptionEmbedder(s)
        self.blocks = nn.ModuleList([PixArtBlock(s) for _ in range(s.depth)])
        self.final_layer = T2IFinalLayer(s)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, t, y = self.x_embedder(x), self.t_embedder(t), self.y_embedder(y)
        t0 = self.t_block(t)
        for block in self.blocks:
            x = block(x, y, t0)
        return unpatchify(self.final_layer(x, t), self.shape)


MODELS: dict[str, type[nn.Module]] = {"dit": DiT, "pixart": PixArt}

# ---- onto the project's layers ---------------------------------------------------------------------------------------

_SHARED = {
    "x_embedder.proj": "embed.patch.linear",
    "t_embedder.mlp.0": "embed.time.linear_1",
    "t_embedder.mlp.2": "embed.time.linear_2",
    "blocks.*.attn.qkv": "blocks.*.attn.qkv.linear",
    "blocks.*.attn.proj": "blocks.*.attn.proj",
    "blocks.*.mlp.fc1": "blocks.*.mlp.fc1",
    "blocks.*.mlp.fc2": "blocks.*.mlp.fc2",
    "final_layer.linear": "head.out",
}
_NAMES = {
    "dit": {
        **_SHARED,
        "y_embedder.embedding_table": "embed.label",
        "blocks.*.adaLN_modulation.1": "blocks.*.ada",
        "final_layer.adaLN_modulation.1": "head.ada",
    },
    "pixart": {
        **_SHARED,
        "t_block.1": "embed.ada",
        "y_embedder.y_proj.fc1": "embed.text.linear_1",
        "y_embedder.y_proj.fc2": "embed.text.linear_2",
        "blocks.*.cross_attn.q_linear": "blocks.*.cross.q",
        "blocks.*.cross_attn.kv_linear": "blocks.*.cross.kv",
        "blocks.*.cross_attn.proj": "blocks.*.cross.proj",
        "blocks.*": "blocks.*.scale_shift",  # its scale_shift_table
        "final_layer": "head.scale_shift",
    },
}


def project_name(arch: str, name: str) -> str:
    """The project's name of a parameter of these models. Raises KeyError for one that has none."""
    module, _, last = name.rpartition(".")
    index = module.split(".")[1] if module.startswith("blocks.") else ""
    pattern = module.replace(f"blocks.{index}", "blocks.*") if index else module
    return f"{_NAMES[arch][pattern].replace('*', index)}.{last.removeprefix('scale_shift_')}"


def project_value(name: str, value: Tensor, heads: int) -> Tensor:
    """The same weight or bias in the project's order of rows and columns; `name` is the one here."""
    if name == "x_embedder.proj.weight":
        return value.permute(0, 2, 3, 1).flatten(1)  # (channel, row, column) -> (row, column, channel)
    parts = {"qkv": 3, "kv_linear": 2}.get(name.split(".")[-2], 0)
    if parts:  # rows (q | k | v, heads, d) -> (heads, q | k | v, d)
        return value.unflatten(0, (parts, heads, -1)).transpose(0, 1).flatten(0, 2)
    return value
