"""The reference: an MMDiT and its training step in plain PyTorch, one process, nothing of mpdit imported.

Written from the papers and the parametrization's table alone, so that an error in mpdit's layers, rules or optimizer
cannot be repeated here by import. It is read more often than it is run: every equation stands where it is used.

Model: MMDiT, Esser et al. 2024 (arXiv 2403.03206); adaLN-zero and the 2-D positions, Peebles & Xie (2212.09748);
QK-norm, Dehghani et al. (2302.05442). Rules: muP for diffusion transformers, Zheng et al. (2505.15270).
AdamW: Loshchilov & Hutter (1711.05101). Rectified flow: Liu et al. (2209.03003).

Letters in a name's suffix are its dimensions, in order:
    B batch    S tokens of a sequence    L text tokens    D width    H heads    K head_dim
    C channels    Y, X rows and columns of an image    F features of a patch (patch * patch * channels)
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

TIME_FEATURES = 256
PAD = 0  # token id; it takes part in attention, and is left out of the pooled text
STREAMS = ("img", "txt")
GROUPS = ("input", "table", "hidden", "modulation", "output", "vector")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What fixes the parameters. Image size and caption length are the batch's business."""

    width: int
    depth: int
    head_dim: int = 64
    patch: int = 2
    channels: int = 4
    vocab: int = 512
    qk_norm: bool = True
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def patch_features(self) -> int:
        return self.patch * self.patch * self.channels


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One global batch of rectified flow: x_t = (1 - t) image + t noise, and the velocity noise - image to predict."""

    image_BCYX: Tensor
    noise_BCYX: Tensor
    t_B: Tensor  # in [0, 1]
    ids_BL: Tensor  # long, padded with PAD; every caption has at least one other token

    def noisy_BCYX(self) -> Tensor:
        t_B111 = self.t_B[:, None, None, None].to(self.image_BCYX.dtype)
        return (1 - t_B111) * self.image_BCYX + t_B111 * self.noise_BCYX

    def target_BCYX(self) -> Tensor:
        return self.noise_BCYX - self.image_BCYX


# ---- parameters: name -> shape, role, group --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """`role` is how the two dimensions scale with width; `group` selects the learning rate's own multiplier."""

    shape: tuple[int, ...]
    role: str  # input | hidden | output | vector
    group: str  # one of GROUPS
    width_in_gradient: bool = True  # False: its gradient keeps its size as the model widens, so eps must too


def parameters(s: Shape) -> dict[str, Parameter]:
    """Every parameter of the model, by name."""
    d, table = s.width, {}

    def linear(name: str, rows: int, fan_in: int, role: str, group: str | None = None) -> None:
        table[f"{name}.weight"] = Parameter(shape=(rows, fan_in), role=role, group=group or role)
        table[f"{name}.bias"] = Parameter(
            shape=(rows,), role="vector", group="vector", width_in_gradient=role != "output"
        )

    linear("embed.patch", d, s.patch_features, "input")
    table["embed.token_table.weight"] = Parameter(shape=(s.vocab, d), role="input", group="table")
    linear("embed.time.in", d, TIME_FEATURES, "input")
    linear("embed.time.mid", d, d, "hidden")
    linear("embed.pooled.in", d, d, "hidden")
    linear("embed.pooled.mid", d, d, "hidden")
    for i in range(s.depth):
        for stream in STREAMS:
            prefix, pre_only = f"blocks.{i}.{stream}", stream == "txt" and i == s.depth - 1
            linear(f"{prefix}.ada", (2 if pre_only else 6) * d, d, "hidden", "modulation")
            linear(f"{prefix}.qkv", 3 * d, d, "hidden")
            for gain in ("q_norm", "k_norm") if s.qk_norm else ():
                table[f"{prefix}.{gain}.weight"] = Parameter(
                    shape=(s.head_dim,), role="vector", group="vector", width_in_gradient=False
                )
            if not pre_only:
                linear(f"{prefix}.proj", d, d, "hidden")
                linear(f"{prefix}.fc1", 4 * d, d, "hidden")
                linear(f"{prefix}.fc2", d, 4 * d, "hidden")
    linear("head.ada", 2 * d, d, "hidden", "modulation")
    linear("head.out", s.patch_features, d, "output")
    return table


# ---- the parametrization ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Base (proxy) hyperparameters, and how they follow the width. At width == base_width sp and mup are the same."""

    parametrization: str = "mup"  # sp | mup
    base_width: int
    lr: float = 1e-3
    weight_decay: float = 0.01
    eps: float = 1e-8
    wd_rule: str = "independent"  # independent | sqrt | const: hidden decay x m, x sqrt(m), x 1
    eps_rule: str = "scaled"  # scaled | constant
    adaln_init: str = "zero"  # zero | hidden
    readout_init: str = "zero"  # zero | base
    output_mult: float = 1.0
    lr_mult: dict[str, float] = field(default_factory=dict)  # by group; 1 where absent
    wd_vector: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one parameter gets. The initial value is constant where init_std is 0: 1 for a gain, else 0."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float
    multiplier: float


def rules(s: Shape, r: Recipe) -> dict[str, Rule]:
    """The rule of every parameter, by name: Zheng et al., table 1, where only the readout has a multiplier."""
    if unknown := set(r.lr_mult) - set(GROUPS):
        raise ValueError(f"lr_mult: {sorted(unknown)} are no groups, those are {GROUPS}")
    m = {"sp": 1.0, "mup": s.width / r.base_width}[r.parametrization]
    hidden_wd = {"independent": m, "sqrt": math.sqrt(m), "const": 1.0}[r.wd_rule]
    scaled_eps = {"scaled": r.eps / m, "constant": r.eps}[r.eps_rule]
    return {
        name: Rule(
            init_std=_init_std(name, p, r),
            lr=r.lr * r.lr_mult.get(p.group, 1.0) / (m if p.role == "hidden" else 1.0),
            weight_decay={
                "input": r.weight_decay,
                "hidden": r.weight_decay * hidden_wd,
                "output": r.weight_decay,
                "vector": r.weight_decay if r.wd_vector else 0.0,
            }[p.role],
            eps=scaled_eps if p.width_in_gradient else r.eps,
            multiplier=r.output_mult / m if p.role == "output" else 1.0,
        )
        for name, p in parameters(s).items()
    }


def _init_std(name: str, p: Parameter, r: Recipe) -> float:
    if p.role == "vector":
        return 0.0
    if p.group == "table":
        return 1.0
    if p.group == "modulation" and r.adaln_init == "zero":
        return 0.0
    if p.role == "output":
        if r.readout_init == "zero":
            return 0.0
        return 1 / math.sqrt(r.base_width if r.parametrization == "mup" else p.shape[-1])
    return 1 / math.sqrt(p.shape[-1])


def init(s: Shape, seed: int, recipe: Recipe | None = None) -> dict[str, Tensor]:
    """Initial weights of its own. Without a recipe only biases start at zero, so that every path is exercised."""
    recipe = recipe or Recipe(base_width=s.width, adaln_init="hidden", readout_init="base")
    generator, table = torch.Generator().manual_seed(seed), parameters(s)
    return {
        name: torch.ones(table[name].shape)
        if name.endswith("_norm.weight")
        else torch.randn(table[name].shape, generator=generator) * rule.init_std
        for name, rule in rules(s, recipe).items()
    }


# ---- the model -------------------------------------------------------------------------------------------------------


def patchify(x_BCYX: Tensor, patch: int) -> Tensor:
    """Image to tokens: patches in raster order, each flattened as (row, column, channel). (B,C,Y,X) -> (S,B,F)"""
    b, c, y, x = x_BCYX.shape
    x_BCipjq = x_BCYX.reshape(b, c, y // patch, patch, x // patch, patch)
    return x_BCipjq.permute(2, 4, 0, 3, 5, 1).reshape((y // patch) * (x // patch), b, patch * patch * c)


def unpatchify(x_SBF: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of patchify, for a grid of (rows, columns) patches. (S,B,F) -> (B,C,Y,X)"""
    (rows, columns), (_, b, f) = grid, x_SBF.shape
    x_ijBpqC = x_SBF.reshape(rows, columns, b, patch, patch, f // patch**2)
    return x_ijBpqC.permute(2, 5, 0, 3, 1, 4).reshape(b, f // patch**2, rows * patch, columns * patch)


def positions_1d(coordinates_S: Tensor, dim: int) -> Tensor:
    """concat(sin, cos) of coordinate x 10000^(-k / (dim/2)). (S,) -> (S, dim), in float64"""
    omega_k = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle_Sk = coordinates_S.double()[:, None] * omega_k
    return torch.cat([angle_Sk.sin(), angle_Sk.cos()], dim=-1)


def positions_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """First half of the width from the column, second half from the row, as in MAE and DiT. -> (rows * columns, dim)"""
    rows, columns = grid
    y_S = torch.arange(rows).repeat_interleave(columns)
    x_S = torch.arange(columns).repeat(rows)
    return torch.cat([positions_1d(x_S, dim // 2), positions_1d(y_S, dim // 2)], dim=-1)


def time_features(t_B: Tensor) -> Tensor:
    """concat(cos, sin) of 1000 t x 10000^(-k / 128), k = 0..127. (B,) -> (B, 256), in float32"""
    half = TIME_FEATURES // 2
    f_k = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angle_Bk = (1000 * t_B.float())[:, None] * f_k
    return torch.cat([angle_Bk.cos(), angle_Bk.sin()], dim=-1)


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def modulate(x_SBD: Tensor, shift_1BD: Tensor, scale_1BD: Tensor) -> Tensor:
    return F.layer_norm(x_SBD, x_SBD.shape[-1:], eps=1e-6) * (1 + scale_1BD) + shift_1BD


def rms_norm(x_SBHK: Tensor, gain_K: Tensor) -> Tensor:
    x = _at_least_fp32(x_SBHK)
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain_K).to(x_SBHK.dtype)


def attend(q_SBHK: Tensor, k_SBHK: Tensor, v_SBHK: Tensor, scale: float | None) -> Tensor:
    """Every token looks at every token. Three (S,B,H,K) -> (S,B,D)"""
    o_BHSK = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBHK, v_SBHK)), scale=scale)
    return o_BHSK.permute(2, 0, 1, 3).flatten(2)


def embed_text(w: dict[str, Tensor], ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Text tokens with positions, and the mean of the table's rows over what is no padding. -> (L,B,D), (B,D)"""
    rows_BLD = w["embed.token_table.weight"][ids_BL]
    real_BL1 = (ids_BL != PAD)[..., None].to(rows_BLD.dtype)
    pooled_BD = (rows_BLD * real_BL1).sum(1) / real_BL1.sum(1)
    positions_LD = positions_1d(torch.arange(ids_BL.shape[1]), rows_BLD.shape[-1]).to(rows_BLD.dtype)
    return rows_BLD.transpose(0, 1) + positions_LD[:, None], pooled_BD


def embed_condition(w: dict[str, Tensor], t_B: Tensor, pooled_BD: Tensor) -> Tensor:
    """What modulates every block; the SiLU that stands before each adaLN linear is applied here, once. -> (1,B,D)"""
    features = time_features(t_B).to(pooled_BD.dtype)
    time_BD = linear(w, "embed.time.mid", F.silu(linear(w, "embed.time.in", features)))
    text_BD = linear(w, "embed.pooled.mid", F.silu(linear(w, "embed.pooled.in", pooled_BD)))
    return F.silu(time_BD + text_BD)[None]


def block(w: dict[str, Tensor], prefix: str, s: Shape, x: dict[str, Tensor], cond_1BD: Tensor) -> dict[str, Tensor]:
    """One dual-stream block. A stream without `proj` (text in the last block) gives keys and values and ends there."""
    modulation, queries, keys, values = {}, [], [], []
    for stream in STREAMS:
        name = f"{prefix}.{stream}"
        modulation[stream] = linear(w, f"{name}.ada", cond_1BD).chunk(6 if f"{name}.proj.weight" in w else 2, dim=-1)
        qkv_SBH3K = linear(w, f"{name}.qkv", modulate(x[stream], *modulation[stream][:2])).unflatten(
            -1, (s.heads, 3, s.head_dim)
        )
        q_SBHK, k_SBHK, v_SBHK = qkv_SBH3K.unbind(-2)
        if s.qk_norm:
            q_SBHK = rms_norm(q_SBHK, w[f"{name}.q_norm.weight"])
            k_SBHK = rms_norm(k_SBHK, w[f"{name}.k_norm.weight"])
        queries.append(q_SBHK), keys.append(k_SBHK), values.append(v_SBHK)

    o_SBD = attend(torch.cat(queries), torch.cat(keys), torch.cat(values), s.softmax_scale)
    out, outputs = {}, o_SBD.split([x[stream].shape[0] for stream in STREAMS])
    for stream, o in zip(STREAMS, outputs, strict=True):
        if len(modulation[stream]) == 6:
            name, (_, _, gate_attn, shift_mlp, scale_mlp, gate_mlp) = f"{prefix}.{stream}", modulation[stream]
            y = x[stream] + gate_attn * linear(w, f"{name}.proj", o)
            inner = F.gelu(linear(w, f"{name}.fc1", modulate(y, shift_mlp, scale_mlp)), approximate="tanh")
            out[stream] = y + gate_mlp * linear(w, f"{name}.fc2", inner)
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
    grid = x_BCYX.shape[2] // s.patch, x_BCYX.shape[3] // s.patch
    img_SBD = linear(w, "embed.patch", patchify(x_BCYX, s.patch))
    img_SBD = img_SBD + positions_2d(grid, s.width).to(img_SBD.dtype)[:, None]
    txt_LBD, pooled_BD = embed_text(w, ids_BL)
    cond_1BD = embed_condition(w, t_B, pooled_BD)
    return trunk(w, s, {"img": img_SBD, "txt": txt_LBD}, cond_1BD, multiplier)


def forward(w: dict[str, Tensor], s: Shape, batch: Batch, multiplier: float = 1.0) -> Tensor:
    """The velocity predicted at the batch's noisy images, as tokens. `multiplier` is head.out.weight's. -> (S,B,F)"""
    return denoise(w, s, batch.noisy_BCYX(), batch.t_B, batch.ids_BL, multiplier)


def loss_of(w: dict[str, Tensor], s: Shape, batch: Batch, multiplier: float = 1.0) -> Tensor:
    """Mean squared error over samples, tokens and features, in at least float32. -> ()"""
    out_SBF = _at_least_fp32(forward(w, s, batch, multiplier))
    return (out_SBF - _at_least_fp32(patchify(batch.target_BCYX(), s.patch))).pow(2).mean()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- the training step -----------------------------------------------------------------------------------------------


class AdamW:
    """Decoupled decay first, then Adam with bias correction; eps is added to the root of the corrected v."""

    def __init__(self, weights: dict[str, Tensor], rules: dict[str, Rule], betas: tuple[float, float]):
        self.weights, self.rules, self.betas, self.steps = weights, rules, betas, 0
        self.first = {n: torch.zeros_like(w) for n, w in weights.items()}
        self.second = {n: torch.zeros_like(w) for n, w in weights.items()}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], lr_scale: float = 1.0) -> None:
        self.steps += 1
        b1, b2 = self.betas
        for name, g in grads.items():
            p, rule, m, v = self.weights[name], self.rules[name], self.first[name], self.second[name]
            lr = rule.lr * lr_scale
            p -= lr * rule.weight_decay * p
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            m_hat, v_hat = m / (1 - b1**self.steps), v / (1 - b2**self.steps)
            p -= lr * m_hat / (v_hat.sqrt() + rule.eps)


def clip_by_global_norm(grads: dict[str, Tensor], limit: float | None) -> float:
    """Scales the gradients in place so that their joint norm is at most `limit`; gives the norm they had."""
    norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))
    if limit is not None and norm > limit:
        for g in grads.values():
            g *= limit / (norm + 1e-6)
    return norm


def train(
    weights: dict[str, Tensor],
    rules: dict[str, Rule],
    batches: Iterable[Batch],
    steps: int,
    *,
    shape: Shape,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float | None = 1.0,
    schedule: Callable[[int], float] = lambda step: 1.0,
    ema: dict[str, Tensor] | None = None,
    ema_decay: float = 0.999,
) -> tuple[list[float], list[float]]:
    """`steps` optimizer steps; the loss before each and its gradient norm before clipping.

    `weights` and, when given, `ema` are updated in place. Step i multiplies every learning rate by schedule(i).
    """
    optimizer, source, losses, norms = AdamW(weights, rules, betas), iter(batches), [], []
    for step in range(steps):
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        loss = loss_of(leaves, shape, next(source), rules["head.out.weight"].multiplier)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norms.append(clip_by_global_norm(grads, clip))
        losses.append(loss.item())
        optimizer.step(grads, schedule(step))
        for name in ema or ():
            ema[name].mul_(ema_decay).add_(weights[name].detach(), alpha=1 - ema_decay)
    return losses, norms
