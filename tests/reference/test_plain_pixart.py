"""The reference PixArt-alpha against diffusers', the published size, and the table of rules by hand."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference import plain_pixart as plain
from reference.plain_cases import (
    GRID,
    SMALL,
    TOKENS,
    assert_gradients_close,
    assert_rule,
    count,
    make_batch,
    make_weights,
)
from reference.plain_common import Recipe
from reference.plain_layers import positions_2d, unpatchify
from reference.plain_pixart import Shape

SHAPE = Shape(**SMALL, learn_sigma=True)
PUBLISHED = Shape(width=1152, depth=28, head_dim=72, channels=4, text_dim=4096, qk_norm=False, learn_sigma=True)


def diffusers_model(s: Shape, side: int):
    return importlib.import_module("diffusers").PixArtTransformer2DModel(
        num_attention_heads=s.heads,
        attention_head_dim=s.head_dim,
        in_channels=s.channels,
        out_channels=s.output_channels,
        num_layers=s.depth,
        cross_attention_dim=s.width,
        sample_size=side * s.patch,
        patch_size=s.patch,
        caption_channels=s.text_dim or None,
        use_additional_conditions=False,
    )


def test_published_size_is_also_diffusers() -> None:
    """0.6B in the paper; every weight and bias of it, and none that diffusers has not."""
    assert count(plain, PUBLISHED) == 610_856_096
    with torch.device("meta"):
        theirs = sum(x.numel() for x in diffusers_model(PUBLISHED, side=16).parameters())
    assert count(plain, PUBLISHED) == theirs


def to_diffusers(w: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    """The reference's tensors as PixArtTransformer2DModel names and lays them out. Also right for gradients."""
    patch_Dpqc = w["embed.patch.weight"].unflatten(1, (s.patch, s.patch, s.channels))
    out = {"pos_embed.proj.weight": patch_Dpqc.permute(0, 3, 1, 2), "pos_embed.proj.bias": w["embed.patch.bias"]}
    out["scale_shift_table"] = w["head.scale_shift.table"]
    for kind in ("weight", "bias"):
        for ours, theirs in {"in": "linear_1", "mid": "linear_2"}.items():
            out[f"adaln_single.emb.timestep_embedder.{theirs}.{kind}"] = w[f"embed.time.{ours}.{kind}"]
            if s.text_dim:
                out[f"caption_projection.{theirs}.{kind}"] = w[f"embed.text.{ours}.{kind}"]
        out[f"adaln_single.linear.{kind}"], out[f"proj_out.{kind}"] = w[f"embed.ada.{kind}"], w[f"head.out.{kind}"]
    for i in range(s.depth):
        ours = {n.split(".", 2)[2]: x for n, x in w.items() if n.startswith(f"blocks.{i}.")}
        out |= {f"transformer_blocks.{i}.{n}": x for n, x in _block(ours, s).items()}
    return out


def _block(w: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    out = {f"attn1.norm_{letter}.weight": w[f"{letter}_norm.weight"] for letter in ("qk" if s.qk_norm else "")}
    out["scale_shift_table"] = w["scale_shift.table"]
    for kind in ("weight", "bias"):
        heads_3_K = w[f"qkv.{kind}"].unflatten(0, (s.heads, 3, s.head_dim))
        heads_2_K = w[f"cross.kv.{kind}"].unflatten(0, (s.heads, 2, s.head_dim))
        out |= {f"attn1.to_{letter}.{kind}": heads_3_K[:, j].flatten(0, 1) for j, letter in enumerate("qkv")}
        out |= {f"attn2.to_{letter}.{kind}": heads_2_K[:, j].flatten(0, 1) for j, letter in enumerate("kv")}
        out[f"attn2.to_q.{kind}"], out[f"attn2.to_out.0.{kind}"] = w[f"cross.q.{kind}"], w[f"cross.proj.{kind}"]
        out[f"attn1.to_out.0.{kind}"] = w[f"proj.{kind}"]
        out |= {f"ff.net.0.proj.{kind}": w[f"fc1.{kind}"], f"ff.net.2.{kind}": w[f"fc2.{kind}"]}
    return out


def diffusers_twin(w: dict[str, Tensor], s: Shape):
    model = diffusers_model(s, side=max(GRID))
    for block in model.transformer_blocks if s.qk_norm else ():
        block.attn1.norm_q, block.attn1.norm_k = (torch.nn.RMSNorm(s.head_dim, eps=1e-6) for _ in range(2))
    model.load_state_dict(to_diffusers(w, s), strict=True)
    # For a grid that is not square diffusers would stretch the positions; ours it takes as they are.
    model.pos_embed.height, model.pos_embed.width = GRID
    model.pos_embed.pos_embed = positions_2d(GRID, s.width).float()[None]
    return model


@pytest.mark.parametrize("text_dim", [0, 10])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_forward_and_gradients_equal_diffusers(qk_norm: bool, text_dim: int) -> None:
    s = replace(SHAPE, qk_norm=qk_norm, text_dim=text_dim)
    w, batch = {n: x.requires_grad_() for n, x in make_weights(plain, s).items()}, make_batch(s)
    twin = diffusers_twin({n: x.detach() for n, x in w.items()}, s)

    table = None if text_dim else w["embed.token_table.weight"].detach().clone().requires_grad_()
    text_BLD = batch.features_LBE.transpose(0, 1) if text_dim else table[batch.ids_BL]
    assert text_BLD.shape[:2] == (3, TOKENS)
    theirs_BCYX = twin(batch.noisy_BCYX(), encoder_hidden_states=text_BLD, timestep=1000 * batch.t_B).sample
    ours_SBF = plain.forward(w, s, batch)
    torch.testing.assert_close(unpatchify(ours_SBF, s.patch, GRID), theirs_BCYX, rtol=1e-5, atol=1e-5)
    assert ours_SBF.std() > 0.3

    (theirs_BCYX[:, : s.channels] - batch.target_BCYX()).pow(2).mean().backward()
    plain.loss_of(w, s, batch).backward()
    grads = to_diffusers({n: x.grad for n, x in w.items()}, s)
    assert_gradients_close(grads, {n: x.grad for n, x in twin.named_parameters()})
    if table is not None:
        assert_gradients_close({"table": w["embed.token_table.weight"].grad}, {"table": table.grad})


def test_the_text_is_a_set() -> None:
    """Tokens have no positions: their order is not seen, and the tokens are."""
    w, batch = make_weights(plain, SHAPE), make_batch(SHAPE)
    out = plain.forward(w, SHAPE, batch)
    torch.testing.assert_close(plain.forward(w, SHAPE, replace(batch, ids_BL=batch.ids_BL.flip(1))), out)
    assert not torch.allclose(plain.forward(w, SHAPE, replace(batch, ids_BL=batch.ids_BL.roll(1, 0))), out, atol=1e-2)


def test_init_starts_without_the_text() -> None:
    batch = make_batch(SHAPE)
    w = plain.init(SHAPE, 0, Recipe(base_width=48, readout_init="base"))
    assert {n for n, x in w.items() if "cross.proj" in n or "embed.ada" in n} == {
        n for n, x in w.items() if n.endswith(".weight") and not x.any()
    } | {n for n in w if n.endswith(("cross.proj.bias", "embed.ada.bias"))}
    other = replace(batch, ids_BL=batch.ids_BL.roll(1, 0))
    assert torch.equal(plain.forward(w, SHAPE, batch), plain.forward(w, SHAPE, other))


@pytest.mark.parametrize(
    ("name", "init_std", "lr", "weight_decay", "eps", "multiplier"),
    [
        ("embed.patch.weight", 12**-0.5, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.text.in.weight", 10**-0.5, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.text.mid.weight", 192**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("embed.ada.weight", 0, 5e-4, 0.4, 2.5e-7, 1),
        ("embed.ada.bias", 0, 2e-3, 0, 2.5e-7, 1),
        ("blocks.1.scale_shift.table", 0.02, 2e-3, 0.1, 2.5e-7, 1),
        ("blocks.1.cross.q.weight", 192**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.1.cross.kv.weight", 192**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.1.cross.proj.weight", 0, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.1.k_norm.weight", 0, 2e-3, 0, 1e-6, 1),
        ("head.scale_shift.table", 0.02, 2e-3, 0.1, 2.5e-7, 1),
        ("head.out.weight", 0, 2e-3, 0.1, 2.5e-7, 0.25),
    ],
)
def test_mup_at_four_times_the_width(name, init_std, lr, weight_decay, eps, multiplier) -> None:
    s = replace(SHAPE, width=192, text_dim=10)
    assert_rule(plain, s, name, (init_std, lr, weight_decay, eps, multiplier))


def test_adaln_init_and_groups() -> None:
    s, recipe = replace(SHAPE, width=192), Recipe(base_width=48, lr=2e-3, adaln_init="hidden", lr_mult={"table": 0.5})
    table = plain.rules(s, recipe)
    assert table["embed.ada.weight"].init_std == pytest.approx(192**-0.5)
    for name in ("embed.token_table.weight", "blocks.0.scale_shift.table", "head.scale_shift.table"):
        assert table[name].lr == pytest.approx(1e-3)
    assert plain.parameters(s)["embed.ada.weight"].group == "modulation"
