"""The equations of the parametrization: against numbers worked out by hand, and the identities they keep."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit.config import Config, LrMult, Model, Mup, Optim, Train
from mpdit.mup.roles import Group, Role, Tag, Width, matrix, table, vector
from mpdit.mup.rules import Rule, betas, depth_ratio, noise_ratio, residual_multiplier, rule, softmax_scale, width_ratio

BASE, WIDTH = 512, 5120  # m = 10: 0.18B -> 18B
OPTIM = Optim(lr=2e-3, weight_decay=0.1, eps=1e-8)


def tags_at(D: Width) -> dict[str, Tag]:
    """One tag of every kind there is in a network of width D."""
    return {
        "patch": matrix(D, 16),
        "table": table(300, D),
        "qkv": matrix(3 * D, D),
        "fc2": matrix(D, 4 * D),
        "adaLN": matrix(6 * D, D, group=Group.MODULATION, gain=0.0),
        "readout": matrix(16, D),
        "finite": matrix(112, 2048),  # inside a projector, behind its readout
        "bias": vector(D),
        "readout bias": vector(16),
        "QK gain": vector(64, fill=1.0),
    }


WIDE, PROXY = tags_at(Width(WIDTH, BASE)), tags_at(Width(BASE, BASE))


def config(*, train: dict[str, int] | None = None, depth: int = 4, **mup: Any) -> Config:
    section = Mup(**{"output_mult": 1.5, **mup})
    return Config(model=Model(depth=depth), mup=section, optim=OPTIM, train=Train(**train or {}))


def at(tag: Tag, **keys: Any) -> Rule:
    return rule(tag, config(**keys))


# tag: init std, lr, weight decay, eps, multiplier, each worked out by hand for m = 10
GOLDEN = {
    "patch":        (0.25,        2e-3, 0.1, 1e-9, 1.0),   # 1 / sqrt(16)
    "table":        (1.0,         2e-3, 0.1, 1e-9, 1.0),   # looked up: a fan-in of one
    "qkv":          (0.013975425, 2e-4, 1.0, 1e-9, 1.0),   # 1 / sqrt(512) / sqrt(10)
    "fc2":          (0.006987712, 2e-4, 1.0, 1e-9, 1.0),   # 1 / sqrt(2048) / sqrt(10)
    "adaLN":        (0.0,         2e-4, 1.0, 1e-9, 1.0),
    "readout":      (0.044194174, 2e-3, 0.1, 1e-9, 0.15),  # 1 / sqrt(512), as in the proxy; 1.5 / 10
    "finite":       (0.022097087, 2e-3, 0.1, 1e-8, 1.0),   # 1 / sqrt(2048); knows nothing of the width
    "bias":         (0.0,         2e-3, 0.0, 1e-9, 1.0),
    "readout bias": (0.0,         2e-3, 0.0, 1e-8, 1.0),   # its gradient does not shrink
    "QK gain":      (0.0,         2e-3, 0.0, 1e-8, 1.0),   # one for all heads: nor does this one's
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_table_at_ten_times_the_width(name: str) -> None:
    assert dataclasses.astuple(at(WIDE[name])) == pytest.approx(GOLDEN[name], rel=1e-7)


@pytest.mark.parametrize("parametrization", ["sp", "mup", "completep"])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_same_table_at_the_proxy(name: str, parametrization: str) -> None:
    """At m = 1 nothing is scaled: only the fan-in tells."""
    tag = PROXY[name]
    small = at(tag, parametrization=parametrization)
    assert (small.lr, small.eps) == (2e-3, 1e-8)
    assert small.weight_decay == (0.0 if tag.role is Role.VECTOR else 0.1)
    assert small.multiplier == (1.5 if tag.role is Role.OUTPUT else 1.0)
    assert small.init_std == (0.0 if tag.role is Role.VECTOR else tag.gain / math.sqrt(tag.fan_in))


# ---- every tensor has its own ratio ----------------------------------------------------------------------------------


def test_a_hidden_weights_ratio_is_that_of_its_fan_in() -> None:
    """Not the model's, and not its fan-out's: here 10 beside 3."""
    tag = matrix(Width(300, 100), Width(640, 64))
    found = at(tag, base_width=999)
    assert width_ratio(tag, Mup()) == 10.0
    assert (found.lr, found.weight_decay, found.eps) == pytest.approx((2e-4, 1.0, 1e-9))
    assert found.init_std == pytest.approx(0.039528471)  # 1 / sqrt(640)


def test_a_finite_fan_in_leaves_all_but_eps() -> None:
    """The gradient of what feeds a width shrinks with it, so eps does; LR, decay and init are the proxy's."""
    wide, proxy = at(matrix(Width(300, 100), 640)), at(matrix(Width(100, 100), 640))
    assert wide == dataclasses.replace(proxy, eps=wide.eps)
    assert wide.eps == pytest.approx(1e-8 / 3)


def test_a_readouts_ratio_is_that_of_its_fan_in() -> None:
    found = at(matrix(640, Width(640, 64)))
    assert (found.multiplier, found.lr, found.weight_decay, found.eps) == pytest.approx((0.15, 2e-3, 0.1, 1e-9))


def test_the_fan_in_of_a_convolution_counts_its_window() -> None:
    """The rule reads the fans and not the shape: a 3 x 3 kernel, input and hidden."""
    D = Width(96, 32)
    entry = dataclasses.replace(matrix(D, 4 * 9), shape=(96, 4, 3, 3))
    inner = dataclasses.replace(matrix(D, 9 * D), shape=(96, 96, 3, 3))
    assert at(entry).init_std == pytest.approx(1 / 6)
    assert (at(entry).lr, at(entry).eps) == pytest.approx((2e-3, 1e-8 / 3))
    assert at(inner).init_std == pytest.approx(0.034020691)  # 1 / sqrt(864)
    assert (at(inner).lr, at(inner).weight_decay, at(inner).eps) == pytest.approx((2e-3 / 3, 0.3, 1e-8 / 3))


def test_a_base_that_does_not_divide_gives_a_broken_ratio() -> None:
    """From 37 to 100: no whole number, and no rounding."""
    D = Width(100, 37)
    for tag in (matrix(3 * D, D), matrix(D, 4 * D), matrix(5, D), matrix(D, 5), table(7, D), vector(2 * D)):
        assert width_ratio(tag, Mup()) == pytest.approx(2.702702703, rel=1e-9)
    assert at(matrix(D, D)).lr == pytest.approx(7.4e-4)
    assert at(matrix(5, D)).multiplier == pytest.approx(0.555)


def test_narrower_than_the_proxy_is_as_good() -> None:
    D = Width(256, 512)
    assert (at(matrix(D, D)).lr, at(matrix(16, D)).multiplier) == (4e-3, 3.0)


# ---- weight decay, eps, multipliers, init ----------------------------------------------------------------------------


@pytest.mark.parametrize(("wd_rule", "hidden"), [("const", 0.1), ("independent", 1.0), ("sqrt", 0.316227766)])
def test_weight_decay_rules(wd_rule: str, hidden: float) -> None:
    for name in ("qkv", "fc2", "adaLN"):
        assert at(WIDE[name], wd_rule=wd_rule).weight_decay == pytest.approx(hidden, rel=1e-8)
    for name in ("patch", "table", "readout", "finite"):
        assert at(WIDE[name], wd_rule=wd_rule).weight_decay == 0.1
    for name in ("bias", "readout bias", "QK gain"):
        assert at(WIDE[name], wd_rule=wd_rule).weight_decay == 0.0
        assert at(WIDE[name], wd_rule=wd_rule, wd_vector=True).weight_decay == 0.1


@pytest.mark.parametrize("name", GOLDEN)
def test_independent_decay_keeps_the_decay_of_a_step(name: str) -> None:
    """AdamW shrinks a weight by lr * wd a step: the same at every width, as in the proxy."""
    wide, proxy = (at(tags[name], wd_vector=True) for tags in (WIDE, PROXY))
    assert wide.lr * wide.weight_decay == pytest.approx(proxy.lr * proxy.weight_decay)


@pytest.mark.parametrize(("eps_rule", "eps"), [("scaled", 1e-9), ("constant", 1e-8)])
def test_eps_rules(eps_rule: str, eps: float) -> None:
    """What has no width in it keeps its eps: the readout's bias, QK gains, the inside of a projector."""
    finite = ("readout bias", "QK gain", "finite")
    for name, tag in WIDE.items():
        assert at(tag, eps_rule=eps_rule).eps == pytest.approx(1e-8 if name in finite else eps), name


def test_each_group_has_a_learning_rate_multiplier_of_its_own() -> None:
    mult = LrMult(input=2.0, table=3.0, hidden=5.0, modulation=7.0, output=11.0, vector=13.0)
    lrs = {tag.group: at(tag, lr_mult=mult).lr for tag in WIDE.values()}
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


def test_sp_shrinks_the_readouts_init_and_keeps_its_multiplier() -> None:
    """Under muP it is the other way round."""
    sp = at(WIDE["readout"], parametrization="sp")
    assert (sp.init_std, sp.multiplier) == (pytest.approx(0.013975425), 1.5)  # 1 / sqrt(5120)


def test_gain_is_in_units_of_the_fan_in() -> None:
    for tag in WIDE.values():
        half = dataclasses.replace(tag, gain=0.5)
        assert at(half).init_std == pytest.approx(0.5 * at(dataclasses.replace(tag, gain=1.0)).init_std)
        assert at(dataclasses.replace(tag, gain=0.0)).init_std == 0.0


# ---- identities over all settings ------------------------------------------------------------------------------------

positive, sizes = st.floats(1e-8, 1e3), st.integers(1, 9999)
widths = st.builds(Width, sizes, sizes)
tags = st.one_of(
    st.builds(matrix, sizes | widths, sizes | widths, gain=st.sampled_from([0.0, 0.02, 1.0])),
    st.builds(matrix, widths, widths, group=st.just(Group.MODULATION)),
    st.builds(table, sizes, widths),
    st.builds(vector, sizes | widths, fill=st.sampled_from([0.0, 1.0])),
).flatmap(lambda tag: st.sampled_from([tag, dataclasses.replace(tag, in_block=True)]))
configs = st.builds(
    Config,
    model=st.builds(Model, depth=st.integers(1, 99)),
    mup=st.builds(
        Mup,
        wd_rule=st.sampled_from(["independent", "const", "sqrt"]),
        eps_rule=st.sampled_from(["scaled", "constant"]),
        wd_vector=st.booleans(),
        output_mult=positive,
        base_batch_size=st.none() | sizes,
        base_images=st.none() | sizes,
        lr_mult=st.builds(LrMult, **{group.value: positive for group in Group}),
    ),
    optim=st.builds(Optim, lr=positive, weight_decay=positive, eps=positive),
    train=st.builds(Train, steps=sizes, batch_size=sizes),
)


def under(config: Config, parametrization: str, **mup: Any) -> Config:
    return dataclasses.replace(config, mup=dataclasses.replace(config.mup, parametrization=parametrization, **mup))


def with_base(tag: Tag, fan_in: int, fan_out: int) -> Tag:
    return dataclasses.replace(tag, base_fan_in=fan_in, base_fan_out=fan_out)


@given(tag=tags, config=configs)
@settings(deadline=None)
def test_sp_and_mup_are_the_same_at_the_proxy(tag: Tag, config: Config) -> None:
    own = with_base(tag, tag.fan_in, tag.fan_out)
    assert rule(own, under(config, "sp")) == rule(own, under(config, "mup"))


@given(tag=tags, config=configs, fan_in=sizes, fan_out=sizes)
@settings(deadline=None)
def test_sp_ignores_the_width(tag: Tag, config: Config, fan_in: int, fan_out: int) -> None:
    """Whatever the proxy was, and as if there were none."""
    sp = under(config, "sp")
    assert rule(tag, sp) == rule(with_base(tag, fan_in, fan_out), sp)
    assert rule(tag, sp) == rule(with_base(tag, tag.fan_in, tag.fan_out), sp)


@given(tag=tags, config=configs, k=st.integers(2, 64))
@settings(deadline=None)
def test_only_ratios_of_widths_matter(tag: Tag, config: Config, k: int) -> None:
    """A network and its proxy k times as wide: the same but for the init, which follows the fan-in."""
    wider = dataclasses.replace(tag, fan_in=k * tag.fan_in, fan_out=k * tag.fan_out)
    wider = with_base(wider, k * tag.base_fan_in, k * tag.base_fan_out)
    one, other = (dataclasses.astuple(rule(t, under(config, "mup"))) for t in (tag, wider))
    assert other[1:] == pytest.approx(one[1:], rel=1e-12)
    assert other[0] == pytest.approx(one[0] / math.sqrt(k), rel=1e-12)


@given(tag=tags, config=configs, base_depth=st.none() | st.integers(1, 99))
@settings(deadline=None)
def test_completep_is_mup_but_for_eps_on_residual_branches(tag: Tag, config: Config, base_depth: int | None) -> None:
    """At the proxy's depth it is mup; at another only eps of the blocks' parameters differs, by that ratio."""
    complete = under(config, "completep", base_depth=base_depth)
    mup_rule, found = rule(tag, under(config, "mup", base_depth=base_depth)), rule(tag, complete)
    ratio = config.model.depth / (base_depth or config.model.depth)
    assert depth_ratio(complete) == ratio
    assert residual_multiplier(complete) == pytest.approx(1 / ratio)
    followed = ratio if tag.in_block and config.mup.eps_rule == "scaled" else 1.0
    assert found.eps == pytest.approx(mup_rule.eps / followed)
    assert dataclasses.replace(found, eps=mup_rule.eps) == mup_rule
    assert ratio != 1.0 or found == mup_rule


@pytest.mark.parametrize("parametrization", ["sp", "mup"])
def test_depth_is_completeps_alone(parametrization: str) -> None:
    deep = config(depth=28, base_depth=4, parametrization=parametrization)
    assert (depth_ratio(deep), residual_multiplier(deep)) == (1.0, 1.0)


def test_completep_at_seven_times_the_depth() -> None:
    """By hand: 28 blocks, 4 in the proxy, ten times as wide."""
    deep = {"depth": 28, "base_depth": 4, "parametrization": "completep"}
    inside = {name: at(dataclasses.replace(tag, in_block=True), **deep) for name, tag in WIDE.items()}
    assert residual_multiplier(config(**deep)) == pytest.approx(1 / 7)
    assert inside["qkv"].eps == pytest.approx(1e-8 / 70)
    assert inside["QK gain"].eps == pytest.approx(1e-8 / 7)
    assert at(WIDE["qkv"], **deep).eps == pytest.approx(1e-9)  # the timestep's MLP is in no block
    assert (inside["qkv"].lr, inside["qkv"].weight_decay) == pytest.approx((2e-4, 1.0))


# ---- batch size and number of images ---------------------------------------------------------------------------------

PROXY_RUN = {"base_batch_size": 64, "base_images": 64 * 1000}


def test_a_run_of_other_batch_size_and_length() -> None:
    """By hand: batch 256 = 4 x 64 and 16 times the images, so r = 4 / 16 and its square root 1/2."""
    train = {"batch_size": 256, "steps": 4000}
    run = config(train=train, **PROXY_RUN)
    assert noise_ratio(run) == 0.25
    assert betas(run) == pytest.approx((0.975, 0.9975))  # 1 - 0.1 / 4, 1 - 0.01 / 4
    for name, tag in WIDE.items():
        found, plain = at(tag, train=train, **PROXY_RUN), at(tag)
        assert (found.lr, found.weight_decay) == pytest.approx((plain.lr / 2, plain.weight_decay / 2)), name
        assert found.eps == pytest.approx(plain.eps * 2), name
        assert (found.init_std, found.multiplier) == (plain.init_std, plain.multiplier), name


@given(tag=tags, config=configs, k=st.integers(1, 64), steps=st.integers(1, 999))
@settings(deadline=None)
def test_decay_over_the_run_does_not_follow_the_batch(tag: Tag, config: Config, k: int, steps: int) -> None:
    """k times the batch on the same images: lr * wd * steps, all that AdamW forgets, stays; r = k."""
    batch = config.train.batch_size
    runs = [
        dataclasses.replace(under(config, "mup", base_batch_size=batch, base_images=batch * k * steps), train=train)
        for train in (Train(batch_size=batch, steps=k * steps), Train(batch_size=k * batch, steps=steps))
    ]
    assert [noise_ratio(run) for run in runs] == pytest.approx([1.0, k])
    small, large = (rule(tag, run) for run in runs)
    assert large.lr * large.weight_decay * steps == pytest.approx(small.lr * small.weight_decay * k * steps)
    assert (large.lr, large.eps) == pytest.approx((small.lr * math.sqrt(k), small.eps / math.sqrt(k)))
    spans = [1 - beta for run in runs for beta in betas(run)]
    assert spans[2:] == pytest.approx([k * span for span in spans[:2]])


@given(tag=tags, config=configs)
@settings(deadline=None)
def test_the_proxys_own_batch_and_length_change_nothing(tag: Tag, config: Config) -> None:
    """r = 1 where the base values are left out, where they are the run's own, and where both grow alike."""
    train = config.train
    plain = under(config, "mup", base_batch_size=None, base_images=None)
    same = under(config, "mup", base_batch_size=train.batch_size, base_images=train.batch_size * train.steps)
    alike = dataclasses.replace(same, train=Train(batch_size=3 * train.batch_size, steps=train.steps))
    assert noise_ratio(plain) == noise_ratio(same) == noise_ratio(alike) == 1.0
    assert rule(tag, plain) == rule(tag, same) == rule(tag, alike)
    assert betas(plain) == betas(same) == pytest.approx((config.optim.beta1, config.optim.beta2))


# ---- attention -------------------------------------------------------------------------------------------------------


def test_softmax_scale_of_a_fixed_head_dim_is_the_usual_one() -> None:
    for mup in (Mup(), Mup(base_head_dim=64), Mup(parametrization="sp"), Mup(parametrization="sp", base_head_dim=32)):
        assert softmax_scale(64, mup) == pytest.approx(0.125)


@pytest.mark.parametrize("parametrization", ["mup", "completep"])
def test_softmax_scale_of_a_changed_head_dim_falls_with_its_inverse(parametrization: str) -> None:
    mup = Mup(base_head_dim=64, parametrization=parametrization)
    assert softmax_scale(128, mup) == pytest.approx(0.0625)  # sqrt(64) / 128
    assert softmax_scale(16, mup) == pytest.approx(0.5)  # sqrt(64) / 16
    assert softmax_scale(128, Mup(base_head_dim=64, parametrization="sp")) == pytest.approx(1 / math.sqrt(128))
