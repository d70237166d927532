"""The equations of the parametrization against numbers worked out by hand, and muP at the proxy's width against SP."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpdit.config import LrMult, Mup, Optim
from mpdit.mup.roles import Group, Role, Tag, matrix, table, vector
from mpdit.mup.rules import Rule, rule, softmax_scale, width_ratio

BASE, WIDTH = 512, 5120  # m = 10: 0.18B -> 18B
MUP = Mup(base_width=BASE, output_mult=1.5)
OPTIM = Optim(lr=2e-3, weight_decay=0.1, eps=1e-8)

PATCH = matrix(Role.INPUT, WIDTH, 16)
WORDS = table(300, WIDTH)
QKV = matrix(Role.HIDDEN, 3 * WIDTH, WIDTH)
FC2 = matrix(Role.HIDDEN, WIDTH, 4 * WIDTH)
ADA = matrix(Role.HIDDEN, 6 * WIDTH, WIDTH, group=Group.MODULATION)
READOUT = matrix(Role.OUTPUT, 16, WIDTH)
BIAS = vector(WIDTH)
READOUT_BIAS = vector(16, eps_follows_width=False)
QK_GAIN = vector(64, fill=1.0, eps_follows_width=False)


def at(tag: Tag, width: int = WIDTH, optim: Optim = OPTIM, **mup: object) -> Rule:
    return rule(tag, mup=dataclasses.replace(MUP, **mup), optim=optim, width=width)


# tag: init std, lr, weight decay, eps, multiplier, each worked out by hand for m = 10
GOLDEN = {
    "patch":        (PATCH,        (0.25,        2e-3, 0.1, 1e-9, 1.0)),   # 1 / sqrt(16)
    "table":        (WORDS,        (1.0,         2e-3, 0.1, 1e-9, 1.0)),   # looked up: a fan-in of one
    "qkv":          (QKV,          (0.013975425, 2e-4, 1.0, 1e-9, 1.0)),   # 1 / sqrt(512) / sqrt(10)
    "fc2":          (FC2,          (0.006987712, 2e-4, 1.0, 1e-9, 1.0)),   # 1 / sqrt(2048) / sqrt(10)
    "adaLN":        (ADA,          (0.0,         2e-4, 1.0, 1e-9, 1.0)),
    "readout":      (READOUT,      (0.0,         2e-3, 0.1, 1e-9, 0.15)),  # 1.5 / 10
    "bias":         (BIAS,         (0.0,         2e-3, 0.0, 1e-9, 1.0)),
    "readout bias": (READOUT_BIAS, (0.0,         2e-3, 0.0, 1e-8, 1.0)),   # its gradient does not shrink
    "QK gain":      (QK_GAIN,      (0.0,         2e-3, 0.0, 1e-8, 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_table_at_ten_times_the_width(name: str) -> None:
    tag, expected = GOLDEN[name]
    assert dataclasses.astuple(at(tag)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_same_table_at_the_proxy(name: str) -> None:
    """At m = 1 nothing is scaled: only the fan-in tells."""
    tag, _ = GOLDEN[name]
    small = at(tag, width=BASE)
    assert (small.lr, small.eps) == (2e-3, 1e-8)
    assert small.weight_decay == (0.0 if tag.role is Role.VECTOR else 0.1)
    assert small.multiplier == (1.5 if tag.role is Role.OUTPUT else 1.0)


def test_width_ratio_is_over_the_proxys_width() -> None:
    assert width_ratio(5120, MUP) == 10.0
    assert width_ratio(256, MUP) == 0.5  # narrower than the proxy is as good


@pytest.mark.parametrize(("wd_rule", "hidden"), [("const", 0.1), ("independent", 1.0), ("sqrt", 0.316227766)])
def test_weight_decay_rules(wd_rule: str, hidden: float) -> None:
    for tag in (QKV, FC2, ADA):
        assert at(tag, wd_rule=wd_rule).weight_decay == pytest.approx(hidden, rel=1e-8)
    for tag in (PATCH, WORDS, READOUT):
        assert at(tag, wd_rule=wd_rule).weight_decay == 0.1
    assert at(BIAS, wd_rule=wd_rule).weight_decay == 0.0


def test_independent_decay_keeps_the_decay_of_a_step() -> None:
    """AdamW shrinks a weight by lr * wd a step: the same at every width, as each group's lr was."""
    assert at(QKV).lr * at(QKV).weight_decay == pytest.approx(OPTIM.lr * OPTIM.weight_decay)


def test_vectors_are_decayed_when_asked() -> None:
    for tag in (BIAS, READOUT_BIAS, QK_GAIN):
        assert at(tag, wd_vector=True).weight_decay == 0.1
        assert at(tag, wd_vector=True, wd_rule="independent").weight_decay == 0.1


@pytest.mark.parametrize(("eps_rule", "eps"), [("scaled", 1e-9), ("constant", 1e-8)])
def test_eps_rules(eps_rule: str, eps: float) -> None:
    for tag in (PATCH, WORDS, QKV, FC2, ADA, READOUT, BIAS):
        assert at(tag, eps_rule=eps_rule).eps == pytest.approx(eps)
    for tag in (READOUT_BIAS, QK_GAIN):
        assert at(tag, eps_rule=eps_rule).eps == 1e-8


def test_each_group_has_a_learning_rate_multiplier_of_its_own() -> None:
    mult = LrMult(input=2.0, table=3.0, hidden=5.0, modulation=7.0, output=11.0, vector=13.0)
    lrs = {tag.group: at(tag, lr_mult=mult).lr for tag in (PATCH, WORDS, QKV, ADA, READOUT, BIAS)}
    expected = {
        Group.INPUT: 4e-3,
        Group.TABLE: 6e-3,
        Group.HIDDEN: 1e-3,  # 5 * 2e-3 / 10
        Group.MODULATION: 1.4e-3,
        Group.OUTPUT: 2.2e-2,
        Group.VECTOR: 2.6e-2,
    }
    assert lrs == pytest.approx(expected)
    assert set(lrs) == set(Group)


def test_readout_init_base_is_the_proxys_std_at_any_width() -> None:
    """Under muP the readout's weights do not shrink with the width, its multiplier does."""
    assert at(READOUT, readout_init="base").init_std == pytest.approx(0.044194174)  # 1 / sqrt(512)
    small = matrix(Role.OUTPUT, 16, BASE)
    assert at(small, width=BASE, readout_init="base").init_std == pytest.approx(0.044194174)
    sp = at(READOUT, readout_init="base", parametrization="sp")
    assert sp.init_std == pytest.approx(0.013975425)  # 1 / sqrt(5120)
    assert sp.multiplier == 1.5


def test_adaln_init_hidden_is_that_of_every_hidden_weight() -> None:
    assert at(ADA, adaln_init="hidden").init_std == at(QKV).init_std
    assert at(QKV, adaln_init="hidden").init_std == at(QKV).init_std


def test_gain_is_in_units_of_the_fan_in() -> None:
    for tag in (PATCH, WORDS, QKV, FC2):
        assert at(dataclasses.replace(tag, gain=0.5)).init_std == pytest.approx(0.5 * at(tag).init_std)
    half = dataclasses.replace(READOUT, gain=0.5)
    assert at(half, readout_init="base").init_std == pytest.approx(0.5 * 0.044194174)


def test_sp_scales_nothing_but_the_init() -> None:
    for tag, _ in GOLDEN.values():
        found = at(tag, parametrization="sp")
        assert (found.lr, found.eps) == (2e-3, 1e-8)
        assert found.weight_decay == (0.0 if tag.role is Role.VECTOR else 0.1)
        assert found.multiplier == (1.5 if tag.role is Role.OUTPUT else 1.0)


# ---- at the proxy both are one ---------------------------------------------------------------------------------------

positive = st.floats(1e-8, 1e3)
tags = st.one_of(
    st.builds(
        matrix, st.sampled_from([Role.INPUT, Role.HIDDEN, Role.OUTPUT]), st.integers(1, 9999), st.integers(1, 9999)
    ),
    st.builds(matrix, st.just(Role.HIDDEN), st.integers(1, 99), st.integers(1, 99), group=st.just(Group.MODULATION)),
    st.builds(table, st.integers(1, 9999), st.integers(1, 9999)),
    st.builds(vector, st.integers(1, 9999), fill=st.sampled_from([0.0, 1.0]), eps_follows_width=st.booleans()),
)
parametrizations = st.builds(
    Mup,
    base_width=st.integers(1, 9999),
    wd_rule=st.sampled_from(["independent", "const", "sqrt"]),
    eps_rule=st.sampled_from(["scaled", "constant"]),
    wd_vector=st.booleans(),
    output_mult=positive,
    adaln_init=st.sampled_from(["zero", "hidden"]),
    readout_init=st.sampled_from(["zero", "base"]),
    lr_mult=st.builds(LrMult, **{group.value: positive for group in Group}),
)
optims = st.builds(Optim, lr=positive, weight_decay=positive, eps=positive)


@given(tag=tags, mup=parametrizations, optim=optims)
def test_sp_and_mup_are_the_same_at_the_proxy(tag: Tag, mup: Mup, optim: Optim) -> None:
    sp = dataclasses.replace(mup, parametrization="sp")
    assert rule(tag, mup=mup, optim=optim, width=mup.base_width) == rule(tag, mup=sp, optim=optim, width=mup.base_width)


@given(tag=tags, mup=parametrizations, optim=optims, m=st.integers(1, 64))
def test_only_the_ratio_of_widths_matters(tag: Tag, mup: Mup, optim: Optim, m: int) -> None:
    doubled = dataclasses.replace(mup, base_width=2 * mup.base_width)
    one = rule(tag, mup=mup, optim=optim, width=m * mup.base_width)
    assert dataclasses.astuple(rule(tag, mup=doubled, optim=optim, width=2 * m * mup.base_width)) == pytest.approx(
        dataclasses.astuple(one), rel=1e-12
    )


# ---- attention -------------------------------------------------------------------------------------------------------


def test_softmax_scale_of_a_fixed_head_dim_is_the_usual_one() -> None:
    for mup in (Mup(), Mup(base_head_dim=64), Mup(parametrization="sp"), Mup(parametrization="sp", base_head_dim=32)):
        assert softmax_scale(64, mup) == pytest.approx(0.125)


def test_softmax_scale_of_a_changed_head_dim_falls_with_its_inverse() -> None:
    assert softmax_scale(128, Mup(base_head_dim=64)) == pytest.approx(0.0625)  # sqrt(64) / 128
    assert softmax_scale(16, Mup(base_head_dim=64)) == pytest.approx(0.5)  # sqrt(64) / 16
    assert softmax_scale(128, Mup(base_head_dim=64, parametrization="sp")) == pytest.approx(1 / math.sqrt(128))
