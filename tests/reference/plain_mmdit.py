"""The reference MMDiT in plain PyTorch, one process, nothing of mpdit imported: see plain_common.py.

Model: MMDiT, Esser et al. 2024 (arXiv 2403.03206); adaLN-zero and the 2-D positions, Peebles & Xie (2212.09748);
QK-norm, Dehghani et al. (2302.05442). Letters in a name's suffix are its dimensions, as in plain_common.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from reference import plain_common as common
from reference.plain_common import (
    AdamW,
    Batch,
    Parameter,
    Recipe,
    Rule,
    Shape,
    betas,
    clip_by_global_norm,
    linear_parameters,
    mlp_parameters,
    qk_norm_parameters,
    residual_multiplier,
    table_parameter,
)
from reference.plain_layers import (
    TIME_FEATURES,
    attend,
    embed_image,
    embed_time,
    linear,
    mlp,
    modulate,
    patchify,
    positions_1d,
    positions_2d,
    queries_keys_values,
    unpatchify,
)

__all__ = [
    "PAD",
    "AdamW",
    "Batch",
    "Parameter",
    "Recipe",
    "Rule",
    "Shape",
    "betas",
    "clip_by_global_norm",
    "denoise",
    "embed_text",
    "forward",
    "init",
    "loss_of",
    "parameters",
    "patchify",
    "positions_1d",
    "positions_2d",
    "residual_multiplier",
    "rules",
    "train",
    "unpatchify",
]

PAD = 0  # token id; it takes part in attention, and is left out of the pooled text, so no caption is all padding
STREAMS = ("img", "txt")


def parameters(s: Shape) -> dict[str, Parameter]:
    """Every parameter of the model, by name."""
    d, table = s.width, {}
    table |= linear_parameters("embed.patch", d, s.patch_features, "input")
    table["embed.token_table.weight"] = table_parameter(s.vocab, d)
    table |= linear_parameters("embed.time.in", d, TIME_FEATURES, "input")
    table |= linear_parameters("embed.time.mid", d, d, "hidden")
    table |= linear_parameters("embed.pooled.in", d, d, "hidden")
    table |= linear_parameters("embed.pooled.mid", d, d, "hidden")
    for i in range(s.depth):
        for stream in STREAMS:
            prefix, pre_only = f"blocks.{i}.{stream}", stream == "txt" and i == s.depth - 1
            table |= linear_parameters(f"{prefix}.ada", (2 if pre_only else 6) * d, d, "hidden", "modulation")
            table |= linear_parameters(f"{prefix}.qkv", 3 * d, d, "hidden")
            table |= qk_norm_parameters(prefix, s)
            if not pre_only:
                table |= linear_parameters(f"{prefix}.proj", d, d, "hidden")
                table |= mlp_parameters(prefix, d)
    table |= linear_parameters("head.ada", 2 * d, d, "hidden", "modulation")
    table |= linear_parameters("head.out", s.output_features, d, "output")
    return table


def embed_text(w: dict[str, Tensor], ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Text tokens with positions, and the mean of the table's rows over what is no padding. -> (L,B,D), (B,D)"""
    rows_BLD = w["embed.token_table.weight"][ids_BL]
    real_BL1 = (ids_BL != PAD)[..., None].to(rows_BLD.dtype)
    pooled_BD = (rows_BLD * real_BL1).sum(1) / real_BL1.sum(1)
    positions_LD = positions_1d(torch.arange(ids_BL.shape[1]), rows_BLD.shape[-1]).to(rows_BLD.dtype)
    return rows_BLD.transpose(0, 1) + positions_LD[:, None], pooled_BD


def embed_condition(w: dict[str, Tensor], t_B: Tensor, pooled_BD: Tensor) -> Tensor:
    """What modulates every block, after the SiLU that stands before each adaLN linear. -> (1,B,D)"""
    text_BD = linear(w, "embed.pooled.mid", F.silu(linear(w, "embed.pooled.in", pooled_BD)))
    return F.silu(embed_time(w, t_B) + text_BD)[None]


def block(w: dict[str, Tensor], prefix: str, s: Shape, x: dict[str, Tensor], cond_1BD: Tensor) -> dict[str, Tensor]:
    """One dual-stream block. A stream without `proj` (the last block's text) gives keys and values and ends."""
    modulation, queries, keys, values = {}, [], [], []
    for stream in STREAMS:
        name = f"{prefix}.{stream}"
        modulation[stream] = linear(w, f"{name}.ada", cond_1BD).chunk(6 if f"{name}.proj.weight" in w else 2, dim=-1)
        q_SBHK, k_SBHK, v_SBHK = queries_keys_values(w, name, modulate(x[stream], *modulation[stream][:2]), s.head_dim)
        queries.append(q_SBHK), keys.append(k_SBHK), values.append(v_SBHK)

    o_SBD = attend(torch.cat(queries), torch.cat(keys), torch.cat(values), s.softmax_scale)
    out, outputs = {}, o_SBD.split([x[stream].shape[0] for stream in STREAMS])
    for stream, o in zip(STREAMS, outputs, strict=True):
        if len(modulation[stream]) == 6:
            name, (_, _, gate_attn, shift_mlp, scale_mlp, gate_mlp) = f"{prefix}.{stream}", modulation[stream]
            y = x[stream] + s.residual * gate_attn * linear(w, f"{name}.proj", o)
            out[stream] = y + s.residual * gate_mlp * mlp(w, name, modulate(y, shift_mlp, scale_mlp))
    return out


def trunk(w: dict[str, Tensor], s: Shape, x: dict[str, Tensor], cond_1BD: Tensor, multiplier: float = 1.0) -> Tensor:
    """Blocks and head over embedded streams. The multiplier is the matmul's; the bias has none. -> (S,B,F)"""
    for i in range(s.depth):
        x = block(w, f"blocks.{i}", s, x, cond_1BD)
    shift_1BD, scale_1BD = linear(w, "head.ada", cond_1BD).chunk(2, dim=-1)
    return linear(w, "head.out", modulate(x["img"], shift_1BD, scale_1BD) * multiplier)


def denoise(
    w: dict[str, Tensor], s: Shape, x_BCYX: Tensor, t_B: Tensor, ids_BL: Tensor, multiplier: float = 1.0
) -> Tensor:
    """The velocity at noisy images, as tokens. -> (S,B,F)"""
    img_SBD = embed_image(w, x_BCYX, s.patch, s.side)
    txt_LBD, pooled_BD = embed_text(w, ids_BL)
    cond_1BD = embed_condition(w, t_B, pooled_BD)
    return trunk(w, s, {"img": img_SBD, "txt": txt_LBD}, cond_1BD, multiplier)


def forward(w: dict[str, Tensor], s: Shape, batch: Batch, multiplier: float = 1.0) -> Tensor:
    """The velocity at the batch's noisy images, as tokens. `multiplier` is head.out.weight's. -> (S,B,F)"""
    return denoise(w, s, batch.noisy_BCYX(), batch.t_B, batch.ids_BL, multiplier)


rules = partial(common.rules, parameters)
init = partial(common.init, parameters)
loss_of = partial(common.loss_of, forward)
train = partial(common.train, forward)
