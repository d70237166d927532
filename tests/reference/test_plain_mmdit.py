"""The reference against what others wrote: diffusers' SD3 transformer, torch's AdamW, torch's clipping."""

import importlib
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from reference import plain_cases
from reference import plain_mmdit as plain
from reference.plain_cases import GRID, SMALL, make_batch
from reference.plain_mmdit import (
    PAD,
    AdamW,
    Recipe,
    Shape,
    clip_by_global_norm,
    embed_text,
    forward,
    init,
    loss_of,
    parameters,
    patchify,
    positions_1d,
    positions_2d,
    rules,
    train,
    unpatchify,
)

SHAPE = Shape(**SMALL)
make_weights = partial(plain_cases.make_weights, plain)


# ---- the model ------------------------------------------------------------------------------------------------------


def swap_halves(x: Tensor) -> Tensor:
    """(shift, scale) to (scale, shift): diffusers' AdaLayerNormContinuous has them in the other order."""
    return torch.cat(x.chunk(2)[::-1])


def to_diffusers(w: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    """The reference's tensors under the names and layouts of SD3Transformer2DModel. Also right for gradients."""
    patch_Dpqc = w["embed.patch.weight"].unflatten(1, (s.patch, s.patch, s.channels))
    out = {"pos_embed.proj.weight": patch_Dpqc.permute(0, 3, 1, 2), "pos_embed.proj.bias": w["embed.patch.bias"]}
    for kind in ("weight", "bias"):
        for ours, theirs in {"time": "timestep_embedder", "pooled": "text_embedder"}.items():
            out[f"time_text_embed.{theirs}.linear_1.{kind}"] = w[f"embed.{ours}.in.{kind}"]
            out[f"time_text_embed.{theirs}.linear_2.{kind}"] = w[f"embed.{ours}.mid.{kind}"]
        out[f"norm_out.linear.{kind}"] = swap_halves(w[f"head.ada.{kind}"])
        out[f"proj_out.{kind}"] = w[f"head.out.{kind}"]
    for i in range(s.depth):
        for stream in ("img", "txt"):
            ours = {n.split(".", 3)[3]: x for n, x in w.items() if n.startswith(f"blocks.{i}.{stream}.")}
            out |= {f"transformer_blocks.{i}.{n}": x for n, x in _stream(ours, stream, s).items()}
    return out


def _stream(w: dict[str, Tensor], stream: str, s: Shape) -> dict[str, Tensor]:
    img = stream == "img"
    names = ("to_q", "to_k", "to_v") if img else ("add_q_proj", "add_k_proj", "add_v_proj")
    norm, ff, project = ("norm1", "ff", "to_out.0") if img else ("norm1_context", "ff_context", "to_add_out")
    out = {}
    for kind in ("weight", "bias"):
        pre_only = "proj.weight" not in w
        out[f"{norm}.linear.{kind}"] = swap_halves(w[f"ada.{kind}"]) if pre_only else w[f"ada.{kind}"]
        heads_3_K = w[f"qkv.{kind}"].unflatten(0, (s.heads, 3, s.head_dim))
        out |= {f"attn.{name}.{kind}": heads_3_K[:, j].flatten(0, 1) for j, name in enumerate(names)}
        if not pre_only:
            out[f"attn.{project}.{kind}"] = w[f"proj.{kind}"]
            out[f"{ff}.net.0.proj.{kind}"], out[f"{ff}.net.2.{kind}"] = w[f"fc1.{kind}"], w[f"fc2.{kind}"]
    for letter in "qk" if s.qk_norm else "":
        out[f"attn.norm_{'' if img else 'added_'}{letter}.weight"] = w[f"{letter}_norm.weight"]
    return out


def diffusers_twin(w: dict[str, Tensor], s: Shape):
    """SD3Transformer2DModel with these weights; its text input is taken as it is (context_embedder = identity)."""
    model_class = importlib.import_module("diffusers").SD3Transformer2DModel
    side = max(GRID)
    model = model_class(
        sample_size=side * s.patch,
        patch_size=s.patch,
        in_channels=s.channels,
        out_channels=s.channels,
        num_layers=s.depth,
        attention_head_dim=s.head_dim,
        num_attention_heads=s.heads,
        joint_attention_dim=s.width,
        caption_projection_dim=s.width,
        pooled_projection_dim=s.width,
        pos_embed_max_size=side,
        qk_norm="rms_norm" if s.qk_norm else None,
    )
    top, left = (side - GRID[0]) // 2, (side - GRID[1]) // 2  # diffusers cuts the grid out of the middle
    positions = torch.zeros(side, side, s.width)
    positions[top : top + GRID[0], left : left + GRID[1]] = positions_2d(GRID, s.width).float().unflatten(0, GRID)
    state = to_diffusers(w, s) | {
        "context_embedder.weight": torch.eye(s.width),
        "context_embedder.bias": torch.zeros(s.width),
        "pos_embed.pos_embed": positions.flatten(0, 1)[None],
    }
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("qk_norm", [True, False])
def test_forward_and_gradients_equal_diffusers(qk_norm: bool) -> None:
    s = replace(SHAPE, qk_norm=qk_norm)
    w, batch = {n: x.requires_grad_() for n, x in make_weights(s).items()}, make_batch(s)
    twin = diffusers_twin({n: x.detach() for n, x in w.items()}, s)

    txt_LBD, pooled_BD = embed_text({n: x.detach() for n, x in w.items()}, batch.ids_BL)
    theirs_BCYX = twin(
        hidden_states=batch.noisy_BCYX(),
        encoder_hidden_states=txt_LBD.transpose(0, 1),
        pooled_projections=pooled_BD,
        timestep=1000 * batch.t_B,
    ).sample
    ours_SBF = forward(w, s, batch)
    torch.testing.assert_close(unpatchify(ours_SBF, s.patch, GRID), theirs_BCYX, rtol=1e-5, atol=1e-5)
    assert ours_SBF.std() > 0.3

    (theirs_BCYX - batch.target_BCYX()).pow(2).mean().backward()
    loss_of(w, s, batch).backward()
    theirs = dict(twin.named_parameters())
    for name, grad in to_diffusers({n: x.grad for n, x in w.items()}, s).items():
        assert (grad - theirs[name].grad).norm() <= 3e-5 * theirs[name].grad.norm(), name


def test_positions_equal_diffusers_own() -> None:
    """Which half of the width is the column's cannot be seen in the comparison above, which sets diffusers' buffer."""
    patch_embed = importlib.import_module("diffusers.models.embeddings").PatchEmbed
    theirs = patch_embed(height=12, width=12, patch_size=2, embed_dim=48, pos_embed_max_size=6).pos_embed[0]
    torch.testing.assert_close(positions_2d((6, 6), 48).float(), theirs, rtol=1e-6, atol=1e-6)
    row, column = 2, 1
    assert torch.equal(positions_2d((6, 4), 48)[row * 4 + column], positions_2d((6, 6), 48)[row * 6 + column])


def test_text_positions_written_out() -> None:
    positions = positions_1d(torch.arange(5), 6)
    for k in range(3):
        angle = 3 * 10000 ** (-k / 3)
        assert positions[3, k].item() == pytest.approx(math.sin(angle))
        assert positions[3, 3 + k].item() == pytest.approx(math.cos(angle))


def test_patchify_round_trip_and_order() -> None:
    x_BCYX = torch.randn(2, 3, 12, 8)
    tokens_SBF = patchify(x_BCYX, 2)
    assert tokens_SBF.shape == (24, 2, 12)
    assert torch.equal(unpatchify(tokens_SBF, 2, GRID), x_BCYX)
    row, column, p, q, channel = 4, 3, 1, 0, 2
    assert torch.equal(tokens_SBF[row * 4 + column, :, (p * 2 + q) * 3 + channel], x_BCYX[:, channel, 9, 6])


def test_pooled_text_leaves_padding_out() -> None:
    w, ids_BL = make_weights(SHAPE), torch.tensor([[3, 4, 9, PAD, PAD]])
    txt_LBD, pooled_BD = embed_text(w, ids_BL)
    rows = w["embed.token_table.weight"]
    torch.testing.assert_close(pooled_BD[0], (rows[3] + rows[4] + rows[9]) / 3)
    torch.testing.assert_close(txt_LBD[4, 0], rows[PAD] + positions_1d(torch.tensor([4]), SHAPE.width)[0].float())


def test_multiplier_leaves_the_bias_alone() -> None:
    w, batch = make_weights(SHAPE), make_batch(SHAPE)
    bias = w["head.out.bias"]
    full, quarter = forward(w, SHAPE, batch), forward(w, SHAPE, batch, multiplier=0.25)
    torch.testing.assert_close(quarter - bias, (full - bias) / 4)


def test_softmax_scale() -> None:
    """A scale c times the default is the default with queries c times as large."""
    scaled = replace(SHAPE, softmax_scale=2.5 / math.sqrt(12))
    w, batch = make_weights(SHAPE), make_batch(SHAPE)
    wide = {n: x * 2.5 if n.endswith("q_norm.weight") else x for n, x in w.items()}
    torch.testing.assert_close(forward(w, scaled, batch), forward(wide, SHAPE, batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(forward(w, scaled, batch), forward(w, SHAPE, batch), atol=1e-2)


# ---- the parametrization --------------------------------------------------------------------------------------------

BASE = {"base_width": 48, "lr": 2e-3, "weight_decay": 0.1, "eps": 1e-6}
WIDE = replace(SHAPE, width=192, depth=2)  # m = 4


@pytest.mark.parametrize(
    ("name", "init_std", "lr", "weight_decay", "eps", "multiplier"),
    [
        ("embed.patch.weight", 12**-0.5, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.token_table.weight", 1, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.time.in.weight", 1 / 16, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.time.mid.weight", 192**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("embed.pooled.in.weight", 192**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.0.img.ada.weight", 0, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.0.txt.fc2.weight", 768**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.1.txt.qkv.bias", 0, 2e-3, 0, 2.5e-7, 1),
        ("blocks.1.txt.k_norm.weight", 0, 2e-3, 0, 1e-6, 1),
        ("head.ada.weight", 0, 5e-4, 0.4, 2.5e-7, 1),
        ("head.ada.bias", 0, 2e-3, 0, 2.5e-7, 1),
        ("head.out.weight", 0, 2e-3, 0.1, 2.5e-7, 0.25),
        ("head.out.bias", 0, 2e-3, 0, 1e-6, 1),
    ],
)
def test_mup_at_four_times_the_width(name, init_std, lr, weight_decay, eps, multiplier) -> None:
    rule = rules(WIDE, Recipe(**BASE))[name]
    got = (rule.init_std, rule.lr, rule.weight_decay, rule.eps, rule.multiplier)
    assert got == pytest.approx((init_std, lr, weight_decay, eps, multiplier))


def test_choices_of_the_parametrization() -> None:
    def rule(name: str, **choices):
        return rules(WIDE, Recipe(**BASE, **choices))[name]

    hidden, readout, ada = "blocks.0.img.fc1.weight", "head.out.weight", "blocks.0.img.ada.weight"
    assert rule(hidden, wd_rule="sqrt").weight_decay == pytest.approx(0.2)
    assert rule(hidden, wd_rule="const").weight_decay == pytest.approx(0.1)
    assert rule(hidden, eps_rule="constant").eps == 1e-6
    assert rule(ada, adaln_init="hidden").init_std == pytest.approx(192**-0.5)
    assert rule(readout, readout_init="base").init_std == pytest.approx(48**-0.5)
    assert rule(readout, readout_init="base", parametrization="sp").init_std == pytest.approx(192**-0.5)
    assert rule(readout, output_mult=2.0).multiplier == pytest.approx(0.5)
    assert rule("head.out.bias", wd_vector=True).weight_decay == pytest.approx(0.1)
    assert rule(ada, lr_mult={"modulation": 0.5}).lr == pytest.approx(2.5e-4)
    assert rule(hidden, lr_mult={"modulation": 0.5}).lr == pytest.approx(5e-4)
    assert rule("embed.token_table.weight", lr_mult={"input": 3.0, "table": 0.5}).lr == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="attention"):
        rule(hidden, lr_mult={"attention": 2.0})


@pytest.mark.parametrize("readout_init", ["zero", "base"])
def test_sp_and_mup_are_one_at_the_base_width(readout_init: str) -> None:
    same = BASE | {"base_width": WIDE.width, "readout_init": readout_init, "lr_mult": {"output": 2.0}}
    assert rules(WIDE, Recipe(parametrization="sp", **same)) == rules(WIDE, Recipe(**same))


def test_sp_is_one_rule_for_all_matrices() -> None:
    sp = rules(WIDE, Recipe(parametrization="sp", **BASE))
    kinds = {(r.lr, r.weight_decay, r.eps, r.multiplier) for n, r in sp.items() if len(parameters(WIDE)[n].shape) == 2}
    assert kinds == {(2e-3, 0.1, 1e-6, 1.0)}


def test_init_follows_the_rules() -> None:
    recipe = Recipe(**BASE, readout_init="base")
    weights = init(WIDE, 3, recipe)
    for name, rule in rules(WIDE, recipe).items():
        assert weights[name].shape == parameters(WIDE)[name].shape
        if rule.init_std:
            assert weights[name].std().item() == pytest.approx(rule.init_std, rel=0.1)
        else:
            assert weights[name].unique().tolist() == [1.0 if "_norm" in name else 0.0]


# ---- the training step ----------------------------------------------------------------------------------------------


def torch_groups(w: dict[str, Tensor], table) -> list[dict]:
    return [
        {"params": [x], "lr": table[n].lr, "weight_decay": table[n].weight_decay, "eps": table[n].eps}
        for n, x in w.items()
    ]


def test_adamw_equals_torch_over_ten_steps() -> None:
    s = replace(SHAPE, depth=1)
    table = rules(s, Recipe(base_width=12, lr=1e-2, weight_decay=0.3, eps=1e-2, wd_vector=True))
    ours = {n: x.double() for n, x in make_weights(s).items()}
    theirs = {n: x.clone().requires_grad_() for n, x in ours.items()}
    reference = torch.optim.AdamW(torch_groups(theirs, table), betas=(0.8, 0.9))
    optimizer = AdamW(ours, table, betas=(0.8, 0.9))
    for step in range(10):
        scale = 1 - step / 10
        grads = {n: torch.randn(x.shape, dtype=x.dtype) * 0.1 for n, x in ours.items()}
        for name, x in theirs.items():
            x.grad = grads[name].clone()
        for group, name in zip(reference.param_groups, theirs, strict=True):
            group["lr"] = table[name].lr * scale
        reference.step()
        optimizer.step(grads, scale)
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name].detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("limit", [0.5, 100.0, None])
def test_clipping_equals_torch(limit: float | None) -> None:
    grads = {"a": torch.randn(30), "b": torch.randn(4, 5)}
    theirs = [torch.zeros_like(g).requires_grad_() for g in grads.values()]
    for x, g in zip(theirs, grads.values(), strict=True):
        x.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit if limit is not None else math.inf)
    assert clip_by_global_norm(grads, limit) == pytest.approx(norm.item(), rel=1e-6)
    for x, g in zip(theirs, grads.values(), strict=True):
        torch.testing.assert_close(g, x.grad)


def test_train_equals_a_loop_of_torch_parts() -> None:
    """In float64, where AdamW's division by a small root does not magnify rounding."""
    s = replace(SHAPE, width=24, depth=2)
    table = rules(s, Recipe(base_width=12, lr=5e-3, weight_decay=0.1, output_mult=3.0))
    ours = {n: x.double() for n, x in make_weights(s).items()}
    theirs = {n: x.clone().requires_grad_() for n, x in ours.items()}
    batch, schedule = make_batch(s, dtype=torch.float64), (0.5, 1.0, 0.25, 0.1)
    averaged = {n: x.detach().clone() for n, x in theirs.items()}
    ema = {n: x.clone() for n, x in ours.items()}

    optimizer, losses, norms = torch.optim.AdamW(torch_groups(theirs, table), betas=(0.9, 0.95)), [], []
    for scale in schedule:
        optimizer.zero_grad()
        loss = loss_of(theirs, s, batch, multiplier=1.5)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.values(), 0.2).item())
        for group, name in zip(optimizer.param_groups, theirs, strict=True):
            group["lr"] = table[name].lr * scale
        optimizer.step()
        averaged = {n: 0.7 * average + 0.3 * theirs[n].detach() for n, average in averaged.items()}

    got = train(ours, table, [batch] * 4, 4, shape=s, clip=0.2, schedule=schedule.__getitem__, ema=ema, ema_decay=0.7)
    assert min(norms) > 0.2
    assert losses[3] < losses[0]
    assert got[0] == pytest.approx(losses, rel=1e-9)
    assert got[1] == pytest.approx(norms, rel=1e-8)
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name].detach(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(ema[name], averaged[name], rtol=1e-8, atol=1e-9)


def test_rectified_flow() -> None:
    batch = make_batch(SHAPE)
    ends = [replace(batch, t_B=torch.full((3,), t)) for t in (0.0, 1.0)]
    assert torch.equal(ends[0].noisy_BCYX(), batch.image_BCYX)
    assert torch.equal(ends[1].noisy_BCYX(), batch.noise_BCYX)
    assert torch.equal(batch.target_BCYX(), batch.noise_BCYX - batch.image_BCYX)
