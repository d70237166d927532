"""A proxy is refused, with the key in the way, where muP does not carry its values over; else mup.base_* are set."""

import dataclasses
from typing import Any

import pytest

from mpdit import config as configs
from mpdit.config import Config
from mpdit.errors import InputError
from mpdit.mup import rules
from mpdit.mup.transferable import transfer_from

BASE: dict[str, Any] = {
    "model": {"width": 64, "depth": 4, "head_dim": 16, "vocab_size": 300},
    "mup": {"base_width": 64, "output_mult": 2.0, "lr_mult": {"table": 4.0}},
    "optim": {"lr": 2e-3, "warmup_steps": 50, "schedule": "wsd", "decay_steps": 100},
    "objective": {"repa_weight": 0.5, "repa_block": 2},
    "train": {"steps": 1000, "batch_size": 32},
}


def make(*overrides: str) -> Config:
    tree: dict[str, Any] = {section: dict(values) for section, values in BASE.items()}
    for assignment in overrides:
        configs.override(tree, assignment)
    return configs.from_dict(tree)


def wide(*overrides: str) -> Config:
    return make("model.width=640", *overrides)


def refusal(base: Config, target: Config) -> str:
    with pytest.raises(InputError) as caught:
        transfer_from(base, target)
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said
    return said


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# ---- what transfers --------------------------------------------------------------------------------------------------


def test_the_target_gets_the_sizes_of_its_proxy_and_nothing_else() -> None:
    target = wide("train.batch_size=128", "train.steps=4000", "parallel.tp=2", "run.dir=runs/wide", "train.seed=7")
    found = transfer_from(make(), target)
    sizes = {"base_width": 64, "base_depth": 4, "base_head_dim": 16, "base_batch_size": 32, "base_images": 32_000}
    assert found == dataclasses.replace(target, mup=dataclasses.replace(target.mup, **sizes))
    assert rules.noise_ratio(found) == pytest.approx(4 / 16)


def test_sizes_that_the_target_named_before_are_replaced() -> None:
    assert transfer_from(make(), wide("mup.base_width=320", "mup.base_batch_size=8")) == transfer_from(make(), wide())


def test_a_proxy_is_its_own_proxy() -> None:
    found = transfer_from(make(), make())
    assert (rules.noise_ratio(found), rules.depth_ratio(found)) == (1, 1)
    assert transfer_from(found, found) == found
    assert transfer_from(found, wide()) == transfer_from(make(), wide())


def test_depth_transfers_under_completep() -> None:
    completep = "mup.parametrization=completep"
    found = transfer_from(make(completep), wide(completep, "model.depth=8"))
    assert rules.depth_ratio(found) == 2


def test_head_dim_transfers_where_the_target_says_that_it_knows() -> None:
    found = transfer_from(make(), wide("model.head_dim=64", "mup.base_head_dim=16"))
    assert rules.softmax_scale(64, found.mup) == pytest.approx(16**0.5 / 64)


@pytest.mark.parametrize("vocabulary", [("300", "0"), ("0", "300"), ("0", "0"), ("300", "300")])
def test_a_vocabulary_that_the_data_set_will_say_is_no_difference(vocabulary: tuple[str, str]) -> None:
    base, target = (f"model.vocab_size={size}" for size in vocabulary)
    transfer_from(make(base), wide(target))


@pytest.mark.parametrize(
    "longer",
    [
        ["optim.warmup_steps=50", "optim.decay_steps=100"],  # as many steps
        ["optim.warmup_steps=200", "optim.decay_steps=400"],  # the same share of four times as many
        ["optim.warmup_steps=50", "optim.decay_steps=400"],
    ],
)
def test_a_longer_run_keeps_the_steps_of_its_schedule_or_their_share(longer: list[str]) -> None:
    transfer_from(make(), wide("train.steps=4000", *longer))


def test_a_preset_and_its_numbers_are_the_same() -> None:
    named = {"model": {"preset": "mmdit-0.18b"}, "mup": {"base_width": 512}}
    spelled = configs.to_dict(configs.from_dict(named)) | {"mup": {"base_width": 512}}
    spelled["model"]["preset"] = None
    transfer_from(configs.from_dict(spelled), configs.from_dict({"model": {"preset": "mmdit-18b"}}))


# ---- what does not ---------------------------------------------------------------------------------------------------

# what is wrong: (overrides of the base, overrides of the target, words of the sentence)
BAD: dict[str, tuple[list[str], list[str], list[str]]] = {
    "arch": ([], ["model.arch=uvit"], ["model.arch is uvit", "base's is mmdit", "set it to mmdit"]),
    "patch": ([], ["model.patch=2"], ["model.patch is 2", "set it to 4", "proxy that has the target's"]),
    "image_size": ([], ["model.image_size=64"], ["model.image_size is 64", "base's is 32"]),
    "qk_norm": ([], ["model.qk_norm=false"], ["model.qk_norm is False", "base's is True"]),
    "vocabulary": ([], ["model.vocab_size=500"], ["model.vocab_size is 500", "base's is 300", "leave both out"]),
    "objective": ([], ["objective.kind=ddpm"], ["objective.kind is ddpm", "base's is flow", "proxy on the target's"]),
    "data set": ([], ["data.path=data/faces"], ["data.path is data/faces", "base's is data/icons"]),
    "learning rate": ([], ["optim.lr=1e-3"], ["optim.lr is 0.001", "base's is 0.002", "base values are the proxy's"]),
    "a multiplier": ([], ["mup.lr_mult.table=1"], ["mup.lr_mult.table is 1.0", "base's is 4.0", "set it to 4.0"]),
    "weight decay's rule": ([], ["mup.wd_rule=sqrt"], ["mup.wd_rule is sqrt", "independent"]),
    "depth": ([], ["model.depth=8"], ["model.depth is 8", "base's is 4", "mup.parametrization to completep in both"]),
    "depth and parametrization": (
        [],
        ["model.depth=8", "mup.parametrization=completep"],
        ["mup.parametrization is completep", "base's is mup", "tune the proxy with the target's"],
    ),
    "head_dim": ([], ["model.head_dim=64"], ["model.head_dim is 64", "more heads", "mup.base_head_dim to 16"]),
    "another head_dim": (
        [],
        ["model.head_dim=64", "mup.base_head_dim=32"],
        ["mup.base_head_dim is 32", "model.head_dim is 16"],
    ),
    "sp": ([], ["mup.parametrization=sp"], ["mup.parametrization of the target is sp", "set it to mup in both"]),
    "sp before": (["mup.parametrization=sp"], [], ["mup.parametrization of the base is sp", "set it to mup in both"]),
    "a proxy's width": (["mup.base_width=32"], [], ["mup.base_width of the base is 32", "its own is 64", "to 64"]),
    "a proxy's depth": (["mup.base_depth=2"], [], ["mup.base_depth of the base is 2", "its own is 4"]),
    "a proxy's head_dim": (["mup.base_head_dim=8"], [], ["mup.base_head_dim of the base is 8", "its own is 16"]),
    "a proxy's batch": (["mup.base_batch_size=8"], [], ["mup.base_batch_size of the base is 8", "its own is 32"]),
    "a proxy's images": (["mup.base_images=9"], [], ["mup.base_images of the base is 9", "its own is 32000"]),
    "warm-up": ([], ["optim.warmup_steps=60"], ["optim.warmup_steps is 60", "set it to 50."]),
    "warm-up of a longer run": (
        [],
        ["train.steps=4000", "optim.warmup_steps=100"],
        ["optim.warmup_steps is 100", "base's is 50", "set it to 50, or to 200, the same share of train.steps"],
    ),
    "block of REPA": ([], ["objective.repa_block=3"], ["objective.repa_block is 3", "set it to 2."]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sentence_names_the_key_and_what_would_be_right(case: str) -> None:
    base, target, words = BAD[case]
    said = refusal(make(*base), wide(*target))
    assert all(word in said for word in words), said


# What the two may differ in, one at a time; the tests above say when head_dim and depth may.
FREE = {
    *("model.preset", "model.width", "model.vocab_size", "data.workers", "mup.base_width", "mup.base_depth"),
    *("mup.base_batch_size", "mup.base_images", "model.text_dim", "data.cache"),
}
SECTIONS = ("model", "mup", "optim", "data", "objective")


def other(value: Any) -> Any:
    """A value that is not `value`, whatever the type hints say."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"not {value}"


def changed(config: Any, dotted: str) -> Any:
    key, _, rest = dotted.partition(".")
    value = getattr(config, key)
    return dataclasses.replace(config, **{key: changed(value, rest) if rest else other(value)})


@pytest.mark.parametrize("key", [key for key in leaves(configs.to_dict(Config())) if key.split(".")[0] in SECTIONS])
def test_every_key_is_compared_or_known_to_be_free(key: str) -> None:
    """A key that is added to the config is compared until someone says that it need not be."""
    base = make("model.vocab_size=0")
    target = changed(base, key)
    if key in FREE:
        transfer_from(base, target)
    else:
        assert key in refusal(base, target)
