"""The reference DiT in plain PyTorch, one process, nothing of mpdit imported: see plain_common.py.

Model: Peebles & Xie (arXiv 2212.09748), class conditional with adaLN-zero; the published sizes have no QK-norm.
Letters in a name's suffix are its dimensions, as in plain_common.py.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from reference import plain_common as common
from reference.plain_common import (
    Batch,
    Parameter,
    Recipe,
    Shape,
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


def parameters(s: Shape) -> dict[str, Parameter]:
    """Every parameter of the model, by name. The last of the vocab labels is "no class"."""
    d, table = s.width, {}
    table |= linear_parameters("embed.patch", d, s.patch_features, "input")
    table["embed.label.weight"] = table_parameter(s.vocab, d)
    table |= linear_parameters("embed.time.in", d, TIME_FEATURES, "input")
    table |= linear_parameters("embed.time.mid", d, d, "hidden")
    for i in range(s.depth):
        prefix = f"blocks.{i}"
        table |= linear_parameters(f"{prefix}.ada", 6 * d, d, "hidden", "modulation")
        table |= linear_parameters(f"{prefix}.qkv", 3 * d, d, "hidden")
        table |= qk_norm_parameters(prefix, s)
        table |= linear_parameters(f"{prefix}.proj", d, d, "hidden")
        table |= mlp_parameters(prefix, d)
    table |= linear_parameters("head.ada", 2 * d, d, "hidden", "modulation")
    table |= linear_parameters("head.out", s.output_features, d, "output")
    return table


def block(w: Weights, prefix: str, s: Shape, x_SBD: Tensor, cond_1BD: Tensor) -> Tensor:
    modulation = linear(w, f"{prefix}.ada", cond_1BD).chunk(6, dim=-1)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
    inner_SBD = modulate(x_SBD, shift_attn, scale_attn)
    x_SBD = x_SBD + s.residual * gate_attn * self_attention(w, prefix, inner_SBD, s.head_dim, s.softmax_scale)
    return x_SBD + s.residual * gate_mlp * mlp(w, prefix, modulate(x_SBD, shift_mlp, scale_mlp))


def denoise(w: Weights, s: Shape, x_BCYX: Tensor, t_B: Tensor, ids_BL: Tensor, multiplier: float = 1.0) -> Tensor:
    """The prediction at noisy images of the given classes (L = 1), as tokens. -> (S,B,F)"""
    x_SBD = embed_image(w, x_BCYX, s.patch, s.side)
    label_BD = w["embed.label.weight"][ids_BL.flatten()]
    cond_1BD = F.silu(embed_time(w, t_B) + label_BD)[None]  # the SiLU before each adaLN linear, once for all
    for i in range(s.depth):
        x_SBD = block(w, f"blocks.{i}", s, x_SBD, cond_1BD)
    shift_1BD, scale_1BD = linear(w, "head.ada", cond_1BD).chunk(2, dim=-1)
    return linear(w, "head.out", modulate(x_SBD, shift_1BD, scale_1BD) * multiplier)


def forward(w: Weights, s: Shape, batch: Batch, multiplier: float = 1.0) -> Tensor:
    """The prediction at the batch's noisy images, as tokens. `multiplier` is head.out.weight's. -> (S,B,F)"""
    return denoise(w, s, batch.noisy_BCYX(), batch.t_B, batch.ids_BL, multiplier)


rules = partial(common.rules, parameters)
init = partial(common.init, parameters)
loss_of = partial(common.loss_of, forward)
train = partial(common.train, forward)
