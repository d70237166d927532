"""What the four references share besides layers (plain_layers.py): shapes, batches, rules, AdamW, training.

Plain PyTorch, one process, nothing of mpdit imported. Written from the papers and the parametrization's table
alone, so that an error in mpdit's layers, rules or optimizer cannot be repeated here by import. The references are
read more often than they are run: every equation stands where it is used.

Rules: muP for diffusion transformers, Zheng et al. (arXiv 2505.15270); depth: CompleteP, Dey et al. (2505.01618);
batch size and number of images: Complete(d)P, Mlodozeniec et al. (2512.22382).
AdamW: Loshchilov & Hutter (1711.05101). Rectified flow: Liu et al. (2209.03003).

Letters in a name's suffix are its dimensions, in order:
    B batch    S tokens of a sequence    L text tokens    D width    H heads    K head_dim    C channels
    Y, X rows and columns of an image    E features of a text token that a text encoder gave
    F features of a token: of a patch (patch * patch * channels) going in, of what is predicted for it coming out
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reference.plain_layers import Weights, at_least_fp32, patchify

GROUPS = ("input", "table", "hidden", "modulation", "output", "vector")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What fixes the parameters, and two constants of the blocks. Image size and text length are the batch's."""

    width: int
    depth: int
    head_dim: int = 64
    patch: int = 2
    channels: int = 4
    vocab: int = 512
    qk_norm: bool = True
    side: int | None = None  # patches a side of the square on whose middle grids are centred; None: each has its own
    learn_sigma: bool = False  # twice the output channels: (row, column, 2 C) in each token
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    residual: float = 1.0  # every residual branch times this: residual_multiplier(shape, recipe)

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def patch_features(self) -> int:
        return self.patch * self.patch * self.channels

    @property
    def output_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def output_features(self) -> int:
        return self.patch * self.patch * self.output_channels


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One global batch of rectified flow: x_t = (1 - t) image + t noise, the velocity noise - image to predict.

    Any other objective's batch works as well: a model reads noisy_BCYX(), t_B and the text, the loss the rest.
    """

    image_BCYX: Tensor
    noise_BCYX: Tensor
    t_B: Tensor  # in [0, 1]
    ids_BL: Tensor  # long: tokens, or class labels with L = 1
    features_LBE: Tensor | None = None  # read in place of the ids where the shape has a text_dim

    def noisy_BCYX(self) -> Tensor:
        t_B111 = self.t_B[:, None, None, None].to(self.image_BCYX.dtype)
        return (1 - t_B111) * self.image_BCYX + t_B111 * self.noise_BCYX

    def target_BCYX(self) -> Tensor:
        return self.noise_BCYX - self.image_BCYX


# ---- parameters: name -> shape, role, group --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """`role` is how its dimensions scale with width; `group` selects the learning rate's own multiplier."""

    shape: tuple[int, ...]
    role: str  # input | hidden | output | vector
    group: str  # one of GROUPS
    width_in_gradient: bool = True  # False: its gradient keeps its size as the model widens, so eps must too
    std: float | None = None  # of the initial values; None: the role's, from the fan-in
    mean: float = 0.0  # of the initial values: 1 for a gain


def linear_parameters(
    name: str,
    rows: int,
    fan_in: int,
    role: str,
    group: str | None = None,
    *,
    bias: bool = True,
    std: float | None = None,
) -> dict[str, Parameter]:
    table = {f"{name}.weight": Parameter(shape=(rows, fan_in), role=role, group=group or role, std=std)}
    if bias:
        table[f"{name}.bias"] = Parameter(
            shape=(rows,), role="vector", group="vector", width_in_gradient=role != "output"
        )
    return table


def table_parameter(rows: int, width: int, std: float = 1.0) -> Parameter:
    """Rows that are looked up or added: as the weight of a linear over one-hot vectors, an input weight."""
    return Parameter(shape=(rows, width), role="input", group="table", std=std)


def norm_parameters(name: str, width: int) -> dict[str, Parameter]:
    """Gain and bias of a LayerNorm over the width."""
    return {
        f"{name}.weight": Parameter(shape=(width,), role="vector", group="vector", mean=1.0),
        f"{name}.bias": Parameter(shape=(width,), role="vector", group="vector"),
    }


def qk_norm_parameters(prefix: str, s: Shape) -> dict[str, Parameter]:
    """One gain for all heads: its gradient sums over them, so it keeps its size as the model widens."""
    gain = Parameter(shape=(s.head_dim,), role="vector", group="vector", width_in_gradient=False, mean=1.0)
    return {f"{prefix}.{name}.weight": gain for name in ("q_norm", "k_norm")} if s.qk_norm else {}


def mlp_parameters(prefix: str, width: int) -> dict[str, Parameter]:
    return linear_parameters(f"{prefix}.fc1", 4 * width, width, "hidden") | linear_parameters(
        f"{prefix}.fc2", width, 4 * width, "hidden"
    )


# ---- the parametrization ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Base (proxy) hyperparameters, and how they follow width, depth, batch size and images trained on.

    At width == base_width sp and mup are the same; at depth == base_depth mup and completep are.
    """

    parametrization: str = "mup"  # sp | mup | completep
    base_width: int
    base_depth: int | None = None  # completep only; None: the shape's own
    base_batch_size: int | None = None  # where one of such a pair is None its ratio is 1
    batch_size: int | None = None
    base_images: int | None = None
    images: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.01
    eps: float = 1e-8
    wd_rule: str = "independent"  # independent | sqrt | const: hidden decay x m, x sqrt(m), x 1
    eps_rule: str = "scaled"  # scaled | constant: in width and depth
    adaln_init: str = "zero"  # zero | hidden
    readout_init: str = "zero"  # zero | base
    output_mult: float = 1.0
    lr_mult: dict[str, float] = field(default_factory=dict)  # by group; 1 where absent
    wd_vector: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one parameter gets. The initial values are constant where init_std is 0: the parameter's mean."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float
    multiplier: float


def rules(parameters: Callable[[Shape], dict[str, Parameter]], s: Shape, r: Recipe) -> dict[str, Rule]:
    """The rule of every parameter, by name: Zheng et al., table 1, where only the readout has a multiplier."""
    if unknown := set(r.lr_mult) - set(GROUPS):
        raise ValueError(f"lr_mult: {sorted(unknown)} are no groups, those are {GROUPS}")
    m, root = _width_ratio(s, r), math.sqrt(batch_ratio(r))
    hidden_wd = {"independent": m, "sqrt": math.sqrt(m), "const": 1.0}[r.wd_rule]
    wd = {"hidden": hidden_wd, "vector": 1.0 if r.wd_vector else 0.0}
    return {
        name: Rule(
            init_std=_init_std(p, r),
            lr=r.lr * root * r.lr_mult.get(p.group, 1.0) / (m if p.role == "hidden" else 1.0),
            weight_decay=r.weight_decay * root * wd.get(p.role, 1.0),
            eps=r.eps / root * _eps_factor(name, p, s, r),
            multiplier=r.output_mult / m if p.role == "output" else 1.0,
        )
        for name, p in parameters(s).items()
    }


def _width_ratio(s: Shape, r: Recipe) -> float:
    return {"sp": 1.0, "mup": s.width / r.base_width, "completep": s.width / r.base_width}[r.parametrization]


def residual_multiplier(s: Shape, r: Recipe) -> float:
    """What Shape.residual has to be under the recipe: CompleteP's 1 / m_L = base_depth / depth, else 1."""
    return (r.base_depth or s.depth) / s.depth if r.parametrization == "completep" else 1.0


def batch_ratio(r: Recipe) -> float:
    """m_B / m_D: how much more noise is averaged in a step, over how much longer the training is."""

    def ratio(now: int | None, base: int | None) -> float:
        return 1.0 if now is None or base is None else now / base

    return ratio(r.batch_size, r.base_batch_size) / ratio(r.images, r.base_images)


def betas(r: Recipe, base: tuple[float, float]) -> tuple[float, float]:
    """AdamW's betas: both averages keep their length in images, as a share of those trained on."""
    b1, b2 = (1 - (1 - beta) * batch_ratio(r) for beta in base)
    if min(b1, b2) < 0:
        raise ValueError(f"batch ratio {batch_ratio(r)}: betas {base} become {(b1, b2)}, and none may be negative")
    return b1, b2


def _eps_factor(name: str, p: Parameter, s: Shape, r: Recipe) -> float:
    """Gradients shrink with the width, and inside the blocks with their residual multiplier: eps follows them.

    A U-ViT's skip layer is on the main path, between the branches that are multiplied.
    """
    in_width = 1 / _width_ratio(s, r) if p.width_in_gradient else 1.0
    on_branch = name.startswith("blocks.") and ".skip." not in name
    in_depth = residual_multiplier(s, r) if on_branch else 1.0
    return {"scaled": in_width * in_depth, "constant": 1.0}[r.eps_rule]


def _init_std(p: Parameter, r: Recipe) -> float:
    if p.std is not None:
        return p.std
    if p.role == "vector" or (p.group == "modulation" and r.adaln_init == "zero"):
        return 0.0
    fan_in = math.prod(p.shape[1:])
    if p.role == "output":
        if r.readout_init == "zero":
            return 0.0
        return 1 / math.sqrt(fan_in if r.parametrization == "sp" else r.base_width)
    return 1 / math.sqrt(fan_in)


def init(
    parameters: Callable[[Shape], dict[str, Parameter]], s: Shape, seed: int, recipe: Recipe | None = None
) -> dict[str, Tensor]:
    """Initial weights. Without a recipe only biases and what is zero by design are zero."""
    recipe = recipe or Recipe(base_width=s.width, adaln_init="hidden", readout_init="base")
    generator, table = torch.Generator().manual_seed(seed), parameters(s)
    return {
        name: torch.full(table[name].shape, table[name].mean)
        if table[name].mean
        else torch.randn(table[name].shape, generator=generator) * rule.init_std
        for name, rule in rules(parameters, s, recipe).items()
    }


# ---- the loss and the training step ----------------------------------------------------------------------------------

Loss = Callable[[Tensor, Batch], Tensor]  # of the prediction (S,B,F) and its batch, a scalar
Forward = Callable[[Weights, Shape, Batch, float], Tensor]


def mse(prediction_SBF: Tensor, s: Shape, batch: Batch) -> Tensor:
    """Mean squared error over samples, tokens and features, in at least float32. -> ()

    Of the first C channels of every pixel: the others, if there are any (learn_sigma), need a loss of their own.
    """
    mean_SBF = prediction_SBF.unflatten(-1, (-1, s.output_channels))[..., : s.channels].flatten(-2)
    return (at_least_fp32(mean_SBF) - at_least_fp32(patchify(batch.target_BCYX(), s.patch))).pow(2).mean()


def loss_of(
    forward: Forward, w: Weights, s: Shape, batch: Batch, multiplier: float = 1.0, loss: Loss | None = None
) -> Tensor:
    """The loss of the prediction at the batch: `loss`, or mse to the batch's target. -> ()"""
    prediction_SBF = forward(w, s, batch, multiplier)
    return mse(prediction_SBF, s, batch) if loss is None else loss(prediction_SBF, batch)


class AdamW:
    """Decoupled decay first, then Adam with bias correction; eps is added to the root of the corrected v."""

    def __init__(self, weights: Weights, rules: dict[str, Rule], betas: tuple[float, float]):
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
    forward: Forward,
    weights: Weights,
    rules: dict[str, Rule],
    batches: Iterable[Batch],
    steps: int,
    *,
    shape: Shape,
    loss: Loss | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float | None = 1.0,
    schedule: Callable[[int], float] = lambda step: 1.0,
    ema: Weights | None = None,
    ema_decay: float = 0.999,
) -> tuple[list[float], list[float]]:
    """`steps` optimizer steps; the loss before each and its gradient norm before clipping.

    `weights` and, when given, `ema` are updated in place. Step i multiplies every learning rate by schedule(i).
    """
    optimizer, source, losses, norms = AdamW(weights, rules, betas), iter(batches), [], []
    for step in range(steps):
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        value = loss_of(forward, leaves, shape, next(source), rules["head.out.weight"].multiplier, loss)
        grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        norms.append(clip_by_global_norm(grads, clip))
        losses.append(value.item())
        optimizer.step(grads, schedule(step))
        for name in ema or ():
            ema[name].mul_(ema_decay).add_(weights[name].detach(), alpha=1 - ema_decay)
    return losses, norms
