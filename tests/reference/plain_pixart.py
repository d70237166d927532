"""The reference PixArt-alpha in plain PyTorch, one process, nothing of mpdit imported: see plain_common.py.

Model: Chen et al. (arXiv 2310.00426): a DiT whose blocks share one adaLN linear ("adaLN-single"), each adding a
small table of its own, and look at the text by cross-attention. The published size has no QK-norm; here it is the
self-attention's alone. Letters in a name's suffix are its dimensions, as in plain_common.py.
"""

from dataclasses import dataclass
from functools import partial

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
    qk_norm_parameters,
    residual_multiplier,
    table_parameter,
)
from reference.plain_layers import (
    TIME_FEATURES,
    Weights,
    attend,
    embed_image,
    embed_time,
    linear,
    mlp,
    modulate,
    self_attention,
)

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

SCALE_SHIFT_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape(common.Shape):
    text_dim: int = 0  # features of a token that a text encoder gives; 0: a learned table of vocab rows


def parameters(s: Shape) -> dict[str, Parameter]:
    """Every parameter of the model, by name."""
    d, table = s.width, {}
    table |= linear_parameters("embed.patch", d, s.patch_features, "input")
    table |= linear_parameters("embed.time.in", d, TIME_FEATURES, "input")
    table |= linear_parameters("embed.time.mid", d, d, "hidden")
    table |= linear_parameters("embed.ada", 6 * d, d, "hidden", "modulation")
    if s.text_dim:
        table |= linear_parameters("embed.text.in", d, s.text_dim, "input")
        table |= linear_parameters("embed.text.mid", d, d, "hidden")
    else:
        table["embed.token_table.weight"] = table_parameter(s.vocab, d)
    for i in range(s.depth):
        table |= block_parameters(f"blocks.{i}", s)
    table["head.scale_shift.table"] = table_parameter(2, d, SCALE_SHIFT_STD)
    table |= linear_parameters("head.out", s.output_features, d, "output")
    return table


def block_parameters(prefix: str, s: Shape) -> dict[str, Parameter]:
    d, table = s.width, {}
    table[f"{prefix}.scale_shift.table"] = table_parameter(6, d, SCALE_SHIFT_STD)
    table |= linear_parameters(f"{prefix}.qkv", 3 * d, d, "hidden")
    table |= qk_norm_parameters(prefix, s)
    table |= linear_parameters(f"{prefix}.proj", d, d, "hidden")
    table |= linear_parameters(f"{prefix}.cross.q", d, d, "hidden")
    table |= linear_parameters(f"{prefix}.cross.kv", 2 * d, d, "hidden")
    # Zero whatever the recipe: no gate keeps the text out at the start, so this does.
    table |= linear_parameters(f"{prefix}.cross.proj", d, d, "hidden", std=0.0)
    table |= mlp_parameters(prefix, d)
    return table


def embed_text(w: Weights, s: Shape, text: Tensor) -> Tensor:
    """Ids (B,L), or with a text_dim features (L,B,E), to tokens without positions. -> (L,B,D)"""
    if s.text_dim:
        return linear(w, "embed.text.mid", F.gelu(linear(w, "embed.text.in", text), approximate="tanh"))
    return w["embed.token_table.weight"][text.T]


def cross_attention(w: Weights, prefix: str, s: Shape, x_SBD: Tensor, text_LBD: Tensor) -> Tensor:
    """Every image token looks at every text token, padding too. Rows of the kv weight: (head, k | v, head_dim)."""
    q_SBHK = linear(w, f"{prefix}.q", x_SBD).unflatten(-1, (s.heads, s.head_dim))
    k_LBHK, v_LBHK = linear(w, f"{prefix}.kv", text_LBD).unflatten(-1, (s.heads, 2, s.head_dim)).unbind(-2)
    return linear(w, f"{prefix}.proj", attend(q_SBHK, k_LBHK, v_LBHK, s.softmax_scale))


def block(w: Weights, prefix: str, s: Shape, x_SBD: Tensor, text_LBD: Tensor, ada_6BD: Tensor) -> Tensor:
    modulation_6BD = w[f"{prefix}.scale_shift.table"][:, None] + ada_6BD
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation_6BD.split(1)
    inner_SBD = modulate(x_SBD, shift_attn, scale_attn)
    x_SBD = x_SBD + s.residual * gate_attn * self_attention(w, prefix, inner_SBD, s.head_dim, s.softmax_scale)
    x_SBD = x_SBD + s.residual * cross_attention(w, f"{prefix}.cross", s, x_SBD, text_LBD)
    return x_SBD + s.residual * gate_mlp * mlp(w, prefix, modulate(x_SBD, shift_mlp, scale_mlp))


def denoise(w: Weights, s: Shape, x_BCYX: Tensor, t_B: Tensor, text: Tensor, multiplier: float = 1.0) -> Tensor:
    """The prediction at noisy images, as tokens. The text is what embed_text takes. -> (S,B,F)"""
    x_SBD, text_LBD, time_BD = embed_image(w, x_BCYX, s.patch, s.side), embed_text(w, s, text), embed_time(w, t_B)
    ada_6BD = linear(w, "embed.ada", F.silu(time_BD)).unflatten(-1, (6, s.width)).transpose(0, 1)
    for i in range(s.depth):
        x_SBD = block(w, f"blocks.{i}", s, x_SBD, text_LBD, ada_6BD)
    # The head has no linear of its own to modulate with: its table and the time itself, without the SiLU.
    shift_1BD, scale_1BD = (w["head.scale_shift.table"][:, None] + time_BD).split(1)
    return linear(w, "head.out", modulate(x_SBD, shift_1BD, scale_1BD) * multiplier)


def forward(w: Weights, s: Shape, batch: Batch, multiplier: float = 1.0) -> Tensor:
    """The prediction at the batch's noisy images, as tokens. `multiplier` is head.out.weight's. -> (S,B,F)"""
    text = batch.features_LBE if s.text_dim else batch.ids_BL
    return denoise(w, s, batch.noisy_BCYX(), batch.t_B, text, multiplier)


rules = partial(common.rules, parameters)
init = partial(common.init, parameters)
loss_of = partial(common.loss_of, forward)
train = partial(common.train, forward)
