"""What all references have in common: depth and batch in the rules, the residual multiplier, losses passed in."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference import plain_mmdit
from reference.plain_cases import CASES, SMALL, case_batch, make_weights
from reference.plain_common import Recipe, betas, mse, residual_multiplier, rules
from reference.plain_layers import patchify

BRANCH_ENDS = (".proj.weight", ".proj.bias", ".fc2.weight", ".fc2.bias")  # cross.proj too

every_model = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("plain_*.py")), ids=lambda f: f.name)
def test_nothing_of_mpdit_is_imported(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert not node.module.startswith("mpdit")
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("mpdit")]


# ---- the models ------------------------------------------------------------------------------------------------------


@every_model
def test_gradients_reach_every_parameter(case: str) -> None:
    plain, s = CASES[case]
    w = {n: x.requires_grad_() for n, x in make_weights(plain, s).items()}
    loss = plain.loss_of(w, s, case_batch(plain, s))
    grads = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    if plain is plain_mmdit:  # text ends in the last block, so its queries there ask for nothing
        grads = {n: g for n, g in grads.items() if not n.startswith("blocks.2.txt.q")}
    for name, grad in grads.items():
        looked_up = plain.parameters(s)[name].group == "table"  # some rows of it
        assert (grad != 0).float().mean() > (0.1 if looked_up else 0.9), name


@every_model
def test_residual_multiplies_every_branch(case: str) -> None:
    plain, s = CASES[case]
    w, batch = make_weights(plain, s), case_batch(plain, s)
    scaled = {n: x * 0.4 if n.startswith("blocks.") and n.endswith(BRANCH_ENDS) else x for n, x in w.items()}
    out = plain.forward(w, replace(s, residual=0.4), batch)
    torch.testing.assert_close(out, plain.forward(scaled, s, batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, plain.forward(w, s, batch), atol=1e-2)


@every_model
def test_multiplier_is_the_readout_weight_s(case: str) -> None:
    plain, s = CASES[case]
    w, batch = make_weights(plain, s), case_batch(plain, s)
    scaled = w | {"head.out.weight": w["head.out.weight"] * 0.25}
    got = plain.forward(w, s, batch, multiplier=0.25)
    torch.testing.assert_close(got, plain.forward(scaled, s, batch), rtol=1e-5, atol=1e-5)


@every_model
def test_softmax_scale(case: str) -> None:
    """A scale c times the default is the default with queries c times as large."""
    plain, s = CASES[case]
    w, batch = make_weights(plain, s), case_batch(plain, s)
    queries = ("q_norm.weight", "cross.q.weight", "cross.q.bias")
    wide = {n: x * 2.5 if n.endswith(queries) else x for n, x in w.items()}
    out = plain.forward(w, replace(s, softmax_scale=2.5 / math.sqrt(s.head_dim)), batch)
    torch.testing.assert_close(out, plain.forward(wide, s, batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, plain.forward(w, s, batch), atol=1e-3)


@every_model
def test_float64_is_kept(case: str) -> None:
    plain, s = CASES[case]
    w, batch = make_weights(plain, s), case_batch(plain, s, dtype=torch.float64)
    out = plain.forward({n: x.double() for n, x in w.items()}, s, batch)
    assert out.dtype == torch.float64
    assert out.shape == (24, 3, s.output_features)


@every_model
def test_init_follows_the_rules(case: str) -> None:
    plain, s = CASES[case]
    s, recipe = replace(s, width=192), Recipe(base_width=48, readout_init="base")
    weights, parameters = plain.init(s, 3, recipe), plain.parameters(s)
    assert list(weights) == list(parameters)
    for name, rule in plain.rules(s, recipe).items():
        assert weights[name].shape == parameters[name].shape
        if rule.init_std:
            assert weights[name].std().item() == pytest.approx(rule.init_std, rel=0.2)
        else:
            gain = name.endswith(".weight") and "norm" in name
            assert weights[name].unique().tolist() == [1.0 if gain else 0.0]


# ---- losses ----------------------------------------------------------------------------------------------------------


@every_model
def test_the_loss_is_the_callers(case: str) -> None:
    """mse is the default; another one sees the prediction and its batch, through the training too."""
    plain, s = CASES[case]
    batch, table = case_batch(plain, s), plain.rules(s, Recipe(base_width=24, lr=1e-2))
    runs = {}
    for name, loss in {
        "default": None,
        "mse": lambda x_SBF, b: (x_SBF - patchify(b.target_BCYX(), s.patch)).pow(2).mean(),
        "image": lambda x_SBF, b: (x_SBF - patchify(b.image_BCYX, s.patch)).abs().mean(),
    }.items():
        w = make_weights(plain, s)
        runs[name] = plain.train(w, table, [batch] * 3, 3, shape=s, loss=loss)[0]
        assert runs[name][2] < runs[name][0]
    assert runs["default"] == runs["mse"] != runs["image"]
    first = plain.loss_of(make_weights(plain, s), s, batch, table["head.out.weight"].multiplier)
    assert runs["default"][0] == pytest.approx(first.item())


@every_model
def test_learn_sigma_doubles_the_channels(case: str) -> None:
    plain, s = CASES[case]
    s = replace(s, learn_sigma=True)
    w, batch = make_weights(plain, s), case_batch(plain, s)
    out_SBF = plain.forward(w, s, batch)
    assert out_SBF.shape[-1] == 2 * s.patch_features == plain.parameters(s)["head.out.bias"].shape[0]
    mean_SBpC = out_SBF.unflatten(-1, (4, 2, 3))[..., 0, :]
    want = (mean_SBpC.flatten(-2) - patchify(batch.target_BCYX(), 2)).pow(2).mean()
    torch.testing.assert_close(mse(out_SBF, s, batch), want)
    torch.testing.assert_close(plain.loss_of(w, s, batch), want)


# ---- depth and batch in the rules ------------------------------------------------------------------------------------

BASE = {"base_width": 48, "lr": 2e-3, "weight_decay": 0.1, "eps": 1e-6}
DEEP = plain_mmdit.Shape(**SMALL | {"width": 192, "depth": 6})  # m = 4, m_L = 3 over depth 2


def test_completep_is_mup_with_eps_and_residual_of_the_depth() -> None:
    deep = Recipe(**BASE, parametrization="completep", base_depth=2)
    assert residual_multiplier(DEEP, deep) == pytest.approx(1 / 3)
    ours, mup = plain_mmdit.rules(DEEP, deep), plain_mmdit.rules(DEEP, Recipe(**BASE))
    for name, rule in ours.items():
        assert rule.eps == pytest.approx(mup[name].eps / (3 if name.startswith("blocks.") else 1)), name
        assert replace(rule, eps=0) == replace(mup[name], eps=0), name
    assert ours["blocks.0.img.q_norm.weight"].eps == pytest.approx(1e-6 / 3)
    assert ours["blocks.0.img.qkv.weight"].eps == pytest.approx(1e-6 / 12)
    assert ours["embed.time.mid.weight"].eps == pytest.approx(1e-6 / 4)


@pytest.mark.parametrize(
    "choice",
    [{"parametrization": "completep"}, {"base_depth": 2}, {"parametrization": "completep", "base_depth": 6}],
)
def test_no_rule_for_depth(choice: dict) -> None:
    """The proxy as deep as the model, by default or by number; or mup, which does not follow the depth."""
    assert residual_multiplier(DEEP, Recipe(**BASE, **choice)) == 1
    assert plain_mmdit.rules(DEEP, Recipe(**BASE, **choice)) == plain_mmdit.rules(DEEP, Recipe(**BASE))


def test_constant_eps_follows_neither_width_nor_depth() -> None:
    recipe = Recipe(**BASE, parametrization="completep", base_depth=2, eps_rule="constant")
    assert {rule.eps for rule in plain_mmdit.rules(DEEP, recipe).values()} == {1e-6}


@pytest.mark.parametrize("parametrization", ["sp", "mup", "completep"])
def test_batch_size_and_images(parametrization: str) -> None:
    """Eight times the batch on twice the images: q = 4."""
    base = Recipe(**BASE, parametrization=parametrization, base_depth=2, wd_vector=True)
    grown = replace(base, base_batch_size=32, batch_size=256, base_images=1000, images=2000)
    plain_rules = rules(plain_mmdit.parameters, DEEP, base)
    for name, rule in rules(plain_mmdit.parameters, DEEP, grown).items():
        was = plain_rules[name]
        want = (was.init_std, 2 * was.lr, 2 * was.weight_decay, was.eps / 2, was.multiplier)
        got = (rule.init_std, rule.lr, rule.weight_decay, rule.eps, rule.multiplier)
        assert got == pytest.approx(want), name
    assert betas(grown, (0.9, 0.99)) == pytest.approx((0.6, 0.96))
    assert betas(base, (0.9, 0.99)) == pytest.approx((0.9, 0.99))


def test_batch_and_images_together_cancel() -> None:
    same_steps = Recipe(**BASE, base_batch_size=32, batch_size=128, base_images=1000, images=4000)
    assert plain_mmdit.rules(DEEP, same_steps) == plain_mmdit.rules(DEEP, Recipe(**BASE))
    half_given = Recipe(**BASE, base_batch_size=32, images=4000)
    assert plain_mmdit.rules(DEEP, half_given) == plain_mmdit.rules(DEEP, Recipe(**BASE))
    with pytest.raises(ValueError, match="negative"):
        betas(Recipe(**BASE, base_batch_size=1, batch_size=16), (0.9, 0.95))
