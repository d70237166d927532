"""The reference DiT against diffusers' DiT, published numbers of parameters, and the table of rules by hand."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference import plain_dit as plain
from reference.plain_cases import SMALL, assert_gradients_close, assert_rule, count, make_batch, make_weights
from reference.plain_dit import Shape
from reference.plain_layers import unpatchify

SHAPE = Shape(**SMALL, learn_sigma=True)
GRID = (6, 6)  # diffusers' DiT unpatchifies squares only; the patches' order is held by the other models' tests
PUBLISHED = {"head_dim": 64, "channels": 4, "vocab": 1001, "qk_norm": False, "learn_sigma": True}


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ({"width": 384, "depth": 12}, 33),
        ({"width": 768, "depth": 12}, 130),
        ({"width": 1024, "depth": 24}, 458),
        ({"width": 1152, "depth": 28, "head_dim": 72}, 675),
    ],
)
def test_published_sizes(size: dict, millions: int) -> None:
    """Table 1 of the paper, S/2 to XL/2; the authors count the fixed positions of a 16 x 16 grid as parameters."""
    assert (count(plain, Shape(**PUBLISHED | size)) + 256 * size["width"]) / 1e6 == pytest.approx(millions, abs=0.6)


def test_dit_xl_2_to_the_last_parameter() -> None:
    assert count(plain, Shape(**PUBLISHED | {"width": 1152, "depth": 28, "head_dim": 72})) + 256 * 1152 == 675_129_632


def to_diffusers(w: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    """The reference's tensors under the names and layouts of DiTTransformer2DModel. Also right for gradients."""
    patch_Dpqc = w["embed.patch.weight"].unflatten(1, (s.patch, s.patch, s.channels))
    out = {"pos_embed.proj.weight": patch_Dpqc.permute(0, 3, 1, 2), "pos_embed.proj.bias": w["embed.patch.bias"]}
    for i in range(s.depth):
        ours = {n.split(".", 2)[2]: x for n, x in w.items() if n.startswith(f"blocks.{i}.")}
        theirs = _block(ours, s) | {"norm1.emb.class_embedder.embedding_table.weight": w["embed.label.weight"]}
        for kind in ("weight", "bias"):
            theirs[f"norm1.emb.timestep_embedder.linear_1.{kind}"] = w[f"embed.time.in.{kind}"]
            theirs[f"norm1.emb.timestep_embedder.linear_2.{kind}"] = w[f"embed.time.mid.{kind}"]
        out |= {f"transformer_blocks.{i}.{n}": x for n, x in theirs.items()}
    for kind in ("weight", "bias"):
        out[f"proj_out_1.{kind}"], out[f"proj_out_2.{kind}"] = w[f"head.ada.{kind}"], w[f"head.out.{kind}"]
    return out


def _block(w: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    out = {f"attn1.norm_{letter}.weight": w[f"{letter}_norm.weight"] for letter in ("qk" if s.qk_norm else "")}
    for kind in ("weight", "bias"):
        heads_3_K = w[f"qkv.{kind}"].unflatten(0, (s.heads, 3, s.head_dim))
        out |= {f"attn1.to_{letter}.{kind}": heads_3_K[:, j].flatten(0, 1) for j, letter in enumerate("qkv")}
        out |= {f"attn1.to_out.0.{kind}": w[f"proj.{kind}"], f"norm1.linear.{kind}": w[f"ada.{kind}"]}
        out |= {f"ff.net.0.proj.{kind}": w[f"fc1.{kind}"], f"ff.net.2.{kind}": w[f"fc2.{kind}"]}
    return out


def diffusers_twin(w: dict[str, Tensor], s: Shape):
    """DiTTransformer2DModel with these weights. Its blocks' embedders of time and label are made one."""
    model = importlib.import_module("diffusers").DiTTransformer2DModel(
        num_attention_heads=s.heads,
        attention_head_dim=s.head_dim,
        in_channels=s.channels,
        out_channels=s.output_channels,
        num_layers=s.depth,
        sample_size=GRID[0] * s.patch,
        patch_size=s.patch,
        num_embeds_ada_norm=s.vocab - 1,  # it adds the row for "no class"
        norm_eps=1e-6,
    )
    embedder = model.transformer_blocks[0].norm1.emb
    embedder.time_proj.downscale_freq_shift = 0  # the authors' frequencies; diffusers has 127 for their 128
    for block in model.transformer_blocks:
        block.norm1.emb = embedder
        if s.qk_norm:
            block.attn1.norm_q, block.attn1.norm_k = (torch.nn.RMSNorm(s.head_dim, eps=1e-6) for _ in range(2))
    model.load_state_dict(to_diffusers(w, s), strict=True)
    return model.eval()  # no labels dropped


@pytest.mark.parametrize("qk_norm", [True, False])
def test_forward_and_gradients_equal_diffusers(qk_norm: bool) -> None:
    s = replace(SHAPE, qk_norm=qk_norm)
    w, batch = {n: x.requires_grad_() for n, x in make_weights(plain, s).items()}, make_batch(s, grid=GRID, tokens=1)
    batch.ids_BL[0] = s.vocab - 1
    twin = diffusers_twin({n: x.detach() for n, x in w.items()}, s)

    theirs_BCYX = twin(batch.noisy_BCYX(), timestep=1000 * batch.t_B, class_labels=batch.ids_BL[:, 0]).sample
    ours_SBF = plain.forward(w, s, batch)
    torch.testing.assert_close(unpatchify(ours_SBF, s.patch, GRID), theirs_BCYX, rtol=1e-5, atol=1e-5)
    assert ours_SBF.std() > 0.3

    (theirs_BCYX[:, : s.channels] - batch.target_BCYX()).pow(2).mean().backward()
    plain.loss_of(w, s, batch).backward()
    grads = to_diffusers({n: x.grad for n, x in w.items()}, s)
    assert_gradients_close(grads, {n: x.grad for n, x in twin.named_parameters()})


def test_labels_with_and_without_a_token_dimension() -> None:
    w, batch = make_weights(plain, SHAPE), make_batch(SHAPE, tokens=1)
    flat = replace(batch, ids_BL=batch.ids_BL[:, 0])
    assert torch.equal(plain.forward(w, SHAPE, batch), plain.forward(w, SHAPE, flat))


@pytest.mark.parametrize(
    ("name", "init_std", "lr", "weight_decay", "eps", "multiplier"),
    [
        ("embed.patch.weight", 12**-0.5, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.label.weight", 1, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.time.in.weight", 1 / 16, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.time.mid.weight", 192**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.1.ada.weight", 0, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.1.qkv.weight", 192**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.1.fc2.weight", 768**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.1.ada.bias", 0, 2e-3, 0, 2.5e-7, 1),
        ("blocks.1.q_norm.weight", 0, 2e-3, 0, 1e-6, 1),
        ("head.out.weight", 0, 2e-3, 0.1, 2.5e-7, 0.25),
        ("head.out.bias", 0, 2e-3, 0, 1e-6, 1),
    ],
)
def test_mup_at_four_times_the_width(name, init_std, lr, weight_decay, eps, multiplier) -> None:
    assert_rule(plain, replace(SHAPE, width=192), name, (init_std, lr, weight_decay, eps, multiplier))
