"""The reference U-ViT against one of torch.nn's modules, the published sizes, and the table of rules by hand."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import plain_uvit as plain
from reference.plain_cases import (
    GRID,
    SMALL,
    TOKENS,
    assert_gradients_close,
    assert_rule,
    count,
    make_batch,
    make_weights,
    swap_patch_order,
)
from reference.plain_common import Recipe
from reference.plain_layers import time_features, unpatchify
from reference.plain_uvit import Shape

SHAPE = Shape(**SMALL | {"depth": 5}, grid=GRID, text_tokens=TOKENS, learn_sigma=True, qk_norm=False)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"),
    [(512, 13, 8, 44), (768, 17, 12, 131), (1024, 21, 16, 287), (1152, 29, 16, 501)],
)
def test_published_sizes(width: int, depth: int, heads: int, millions: int) -> None:
    """S, M, L, H of the paper's table 1, here all with patch 2, 256 patches and 1001 labels."""
    s = Shape(width=width, depth=depth, head_dim=width // heads, vocab=1001, grid=(16, 16), qk_norm=False)
    assert count(plain, s) / 1e6 == pytest.approx(millions, abs=0.8)


def test_u_vit_h_2_to_the_last_parameter() -> None:
    """12 D^2 and 2 D^2 more for a skip, but qkv has no bias; D = 1152, 1 + 1 + 256 positions."""
    d, skips, blocks, positions = 1152, 14, 29, 258
    block, skip = 12 * d * d + (1 + 4 + 1 + 4) * d, 2 * d * d + d
    ends = (16 * d + d) + 1001 * d + positions * d + 2 * d + (16 * d + 16) + (9 * 4 * 4 + 4)
    s = Shape(width=d, depth=blocks, head_dim=72, vocab=1001, grid=(16, 16), qk_norm=False)
    assert count(plain, s) == blocks * block + skips * skip + ends == 500_832_164


class Twin(nn.Module):
    """The same model in torch.nn's modules, batch first, one list of blocks for each half."""

    def __init__(self, s: Shape):
        super().__init__()
        d, c = s.width, s.output_channels
        self.s = s
        self.patch = nn.Conv2d(s.channels, d, s.patch, stride=s.patch)
        self.text = nn.Linear(s.text_dim, d) if s.text_dim else nn.Embedding(s.vocab, d)
        self.positions = nn.Parameter(torch.empty(1 + TOKENS + GRID[0] * GRID[1], d))
        self.early, self.late = (nn.ModuleList(self.block() for _ in range(s.depth // 2)) for _ in range(2))
        self.middle = self.block()
        self.skips = nn.ModuleList(nn.Linear(2 * d, d) for _ in self.late)
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, s.patch**2 * c)
        self.convolution = nn.Conv2d(c, c, 3, padding=1)

    def block(self) -> nn.Module:
        s, gelu = self.s, partial(F.gelu, approximate="tanh")
        return nn.TransformerEncoderLayer(
            s.width, s.heads, 4 * s.width, dropout=0.0, activation=gelu, batch_first=True, norm_first=True
        )

    def forward(self, x_BCYX: Tensor, t_B: Tensor, text: Tensor) -> Tensor:
        """-> (B,C,Y,X)"""
        img_BSD = self.patch(x_BCYX).flatten(2).transpose(1, 2)
        time_B1D = time_features(t_B, self.s.width)[:, None]
        x_BTD = torch.cat([time_B1D, self.text(text), img_BSD], dim=1) + self.positions
        kept = [x_BTD]
        for block in self.early:
            kept.append(block(kept[-1]))
        x_BTD = self.middle(kept[-1])
        for i, (skip, block) in enumerate(zip(self.skips, self.late, strict=True)):
            x_BTD = block(skip(torch.cat([x_BTD, kept[-1 - i]], dim=2)))
        pixels_BFS = self.out(self.norm(x_BTD))[:, -img_BSD.shape[1] :].transpose(1, 2)
        return self.convolution(F.fold(pixels_BFS, x_BCYX.shape[2:], self.s.patch, stride=self.s.patch))


def to_twin(w: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    """The reference's tensors under the twin's names and layouts. Also right for gradients."""
    patch_Dpqc = w["embed.patch.weight"].unflatten(1, (s.patch, s.patch, s.channels))
    out = {"patch.weight": patch_Dpqc.permute(0, 3, 1, 2), "positions": w["embed.positions.table"]}
    out |= {"patch.bias": w["embed.patch.bias"], "text.weight": w["embed.text.weight"]}
    if s.text_dim:
        out["text.bias"] = w["embed.text.bias"]
    half = s.depth // 2
    names = [f"early.{i}" for i in range(half)] + ["middle"] + [f"late.{i}" for i in range(half)]
    for i, name in enumerate(names):
        ours = {n.split(".", 2)[2]: x for n, x in w.items() if n.startswith(f"blocks.{i}.")}
        out |= {f"{name}.{n}": x for n, x in _block(ours, s).items()}
        if i > half:
            out |= {f"skips.{i - half - 1}.{kind}": ours[f"skip.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        out[f"norm.{kind}"], out[f"convolution.{kind}"] = w[f"head.norm.{kind}"], w[f"head.conv.{kind}"]
        out[f"out.{kind}"] = swap_patch_order(w[f"head.out.{kind}"], s)
    return out


def _block(w: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    heads_3_KD = w["qkv.weight"].unflatten(0, (s.heads, 3, s.head_dim))
    out = {"self_attn.in_proj_weight": heads_3_KD.transpose(0, 1).flatten(0, 2)}
    names = {"proj": "self_attn.out_proj", "fc1": "linear1", "fc2": "linear2", "norm_1": "norm1", "norm_2": "norm2"}
    for ours, theirs in names.items():
        out |= {f"{theirs}.{kind}": w[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    return out


def make_twin(w: dict[str, Tensor], s: Shape) -> Twin:
    """torch's attention has a bias in qkv or none in proj either: it is kept, at zero."""
    twin = Twin(s)
    missing = twin.load_state_dict(to_twin(w, s), strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("in_proj_bias") for name in missing.missing_keys)
    for name, x in twin.named_parameters():
        if name.endswith("in_proj_bias"):
            nn.init.zeros_(x).requires_grad_(False)
    return twin


@pytest.mark.parametrize("text_dim", [0, 10])
def test_forward_and_gradients_equal_torch_modules(text_dim: int) -> None:
    s = replace(SHAPE, text_dim=text_dim)
    w, batch = {n: x.requires_grad_() for n, x in make_weights(plain, s).items()}, make_batch(s)
    twin = make_twin({n: x.detach() for n, x in w.items()}, s)

    text = batch.features_LBE.transpose(0, 1) if text_dim else batch.ids_BL
    theirs_BCYX = twin(batch.noisy_BCYX(), batch.t_B, text)
    ours_SBF = plain.forward(w, s, batch)
    torch.testing.assert_close(unpatchify(ours_SBF, s.patch, GRID), theirs_BCYX, rtol=1e-5, atol=1e-5)
    assert ours_SBF.std() > 0.3

    (theirs_BCYX[:, : s.channels] - batch.target_BCYX()).pow(2).mean().backward()
    plain.loss_of(w, s, batch).backward()
    grads = to_twin({n: x.grad for n, x in w.items()}, s)
    assert_gradients_close(grads, {n: x.grad for n, x in twin.named_parameters() if x.requires_grad})


def test_depth_is_odd() -> None:
    with pytest.raises(ValueError, match="depth 4"):
        replace(SHAPE, depth=4)


@pytest.mark.parametrize(
    ("name", "init_std", "lr", "weight_decay", "eps", "multiplier"),
    [
        ("embed.patch.weight", 12**-0.5, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.text.weight", 1, 2e-3, 0.1, 2.5e-7, 1),
        ("embed.positions.table", 0.02, 2e-3, 0.1, 2.5e-7, 1),
        ("blocks.1.norm_2.weight", 0, 2e-3, 0, 2.5e-7, 1),
        ("blocks.1.norm_1.bias", 0, 2e-3, 0, 2.5e-7, 1),
        ("blocks.1.qkv.weight", 192**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("blocks.4.skip.weight", 384**-0.5, 5e-4, 0.4, 2.5e-7, 1),
        ("head.norm.weight", 0, 2e-3, 0, 2.5e-7, 1),
        ("head.out.weight", 0, 2e-3, 0.1, 2.5e-7, 0.25),
        ("head.out.bias", 0, 2e-3, 0, 1e-6, 1),
        ("head.conv.weight", (9 * 6) ** -0.5, 2e-3, 0.1, 1e-6, 1),
        ("head.conv.bias", 0, 2e-3, 0, 1e-6, 1),
    ],
)
def test_mup_at_four_times_the_width(name, init_std, lr, weight_decay, eps, multiplier) -> None:
    assert_rule(plain, replace(SHAPE, width=192), name, (init_std, lr, weight_decay, eps, multiplier))


def test_a_text_encoder_makes_the_text_an_input() -> None:
    parameters = plain.parameters(replace(SHAPE, text_dim=10))
    assert parameters["embed.text.weight"].shape == (48, 10)
    assert (parameters["embed.text.weight"].group, parameters["embed.text.bias"].role) == ("input", "vector")
    assert plain.rules(replace(SHAPE, text_dim=10), Recipe(base_width=48))["embed.text.weight"].init_std == 10**-0.5
    assert plain.parameters(SHAPE)["embed.text.weight"].group == "table"
    assert plain.parameters(SHAPE)["head.conv.weight"].group == "output"
