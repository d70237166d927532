"""Guards what `mpdit sweep` reads: every mistake in a spec is one sentence, what it means comes back from the
folder that keeps it, and another sweep does not fit into that folder."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sweep_specs import EXAMPLES, tree, write

from mpdit.errors import InputError
from mpdit_tools.sweep import plan, space, spec

# ---- the spec --------------------------------------------------------------------------------------------------------


def test_the_papers_searches_are_what_they_searched() -> None:
    mmdit, pixart = spec.load(EXAMPLES / "mmdit.yaml"), spec.load(EXAMPLES / "pixart.yaml")
    assert (mmdit.mode, mmdit.trials, mmdit.proxy.model.width, mmdit.proxy.train.steps) == ("random", 80, 512, 30_000)
    assert [axis.key for axis in mmdit.axes] == [
        *("optim.lr", "optim.clip", "objective.repa_weight", "optim.warmup_steps"),
    ]
    assert list(plan.grid(pixart)) == [{"optim.lr": 2.0**e} for e in range(-13, -8)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_spec_comes_back_from_the_folder_that_keeps_it(path: Path, tmp_path: Path) -> None:
    read = spec.load(path)
    assert spec.load(write(tmp_path, spec.dump(read))) == read


BAD: dict[str, tuple[dict[str, Any], str]] = {  # what is wrong: keys of the spec, what the sentence holds
    "unknown key": ({"serach": {}}, "unknown key serach; did you mean 'search'?"),
    "unknown config key": (
        {"search": {"optim.lrr": {"grid": [1.0, 2.0]}}},
        "unknown key optim.lrr; did you mean 'lr'?",
    ),
    "huge power": ({"search": {"optim.lr": {"grid": ["2^9999"]}}}, "2^9999 is no finite number"),
    "no power": ({"search": {"optim.lr": {"grid": ["0^-1"]}}}, "0^-1 is no finite number"),
    "unknown section": ({"search": {"optm.lr": {"grid": [1.0, 2.0]}}}, "unknown key optm; did you mean 'optim'?"),
    "a section": ({"search": {"optim": {"grid": [1.0, 2.0]}}}, "optim should be a section with keys"),
    "key in a value": ({"search": {"optim.lr.x": {"grid": [1.0]}}}, "lr is a value, not a section"),
    "unknown distribution": (
        {"search": {"optim.lr": {"loguniform": [1, 2]}}, "mode": "tpe"},
        "did you mean 'log_uniform'?",
    ),
    "no distribution": ({"search": {"optim.lr": 3}}, "optim.lr should be {choice: [linear, cosine]} or {grid:"),
    "of another mode": ({"search": {"optim.lr": {"uniform": [1, 2]}}}, "mode grid takes {choice:"),
    "low above high": (
        {"mode": "random", "search": {"optim.lr": {"uniform": [2, 1]}}},
        "low end 2 should be below the high",
    ),
    "low is high": (
        {"mode": "random", "search": {"optim.lr": {"uniform": [1, 1]}}},
        "low end 1 should be below the high",
    ),
    "log through zero": ({"mode": "random", "search": {"optim.lr": {"log_uniform": [0, 1]}}}, "should be above 0"),
    "one end": ({"mode": "random", "search": {"optim.lr": {"uniform": [1]}}}, "should be two numbers"),
    "no list": ({"search": {"optim.lr": {"grid": 3}}}, "should be a list"),
    "twice": ({"search": {"optim.lr": {"grid": ["2^-1", 0.5]}}}, "holds a value twice"),
    "wrong type": ({"search": {"optim.lr": {"grid": ["fast"]}}}, "optim.lr is 'fast', but should be a number"),
    "half a step": ({"search": {"optim.warmup_steps": {"grid": [1.5]}}}, "should be a whole number"),
    "words on a grid": ({"search": {"optim.schedule": {"grid": ["linear"]}}}, "should hold numbers"),
    "unknown word": ({"search": {"optim.schedule": {"choice": ["linaer"]}}}, "did you mean 'linear'?"),
    "infinite": ({"search": {"optim.lr": {"grid": [float("inf")]}}}, "should be a finite number"),
    "the run folder": ({"search": {"run.dir": {"choice": ["a"]}}}, "run.dir can't be searched"),
    "the seed": ({"search": {"train.seed": {"grid": [1, 2]}}}, "train.seed can't be searched"),
    "nothing to search": ({"search": {}}, "should hold a key to search"),
    "no mode": ({"mode": None}, "mode is missing"),
    "unknown mode": ({"mode": "tpee"}, "did you mean 'tpe'?"),
    "no trials": ({"mode": "tpe"}, "trials is missing"),
    "no trial": ({"trials": 0}, "trials is 0, but should be at least 1"),
    "fewer trials than seeds": ({"trials": 1, "seeds": [0, 1]}, "is not one setting with its 2 seeds"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds should be different whole numbers"),
    "seeds of words": ({"seeds": ["a"]}, "seeds should be a list of whole numbers"),
    "confirmed by the same seed": ({"confirm": {"seeds": [0]}}, "seeds that are not among (0,)"),
    "unknown pruner": ({"prune": "medium"}, "prune.kind is 'medium'; did you mean 'median'?"),
    "pruning key": ({"prune": {"evry": 3}}, "unknown key prune.evry; did you mean 'every'?"),
    "pruning all": ({"prune": {"keep": 0}}, "prune.keep is 0.0, but should be a share"),
    "pruning after the end": ({"prune": {"warmup_steps": 20}}, "less than the proxy's train.steps, which is 20"),
    "pruning by nothing": ({"prune": {"metric": "val_loss"}}, "needs train.val_every of the proxy"),
    "one seed": ({"mode": "coordinate"}, "give at least two, such as seeds: [0, 1, 2]"),
    "two grids": (
        {"mode": "coordinate", "seeds": [0, 1], "search": {"optim.lr": {"factors": [0.5]}}},
        "grids are given for no key",
    ),
    "factor of nothing": (
        {
            "mode": "coordinate",
            "seeds": [0, 1],
            "search": {"optim.lr": {"grid": [1, 2]}, "optim.clip": {"factors": [2]}},
        },
        "optim.clip is 0 in the proxy",
    ),
    "factor of 1": (
        {
            "mode": "coordinate",
            "seeds": [0, 1],
            "search": {"optim.lr": {"grid": [1, 2]}, "mup.output_mult": {"factors": [1]}},
        },
        "numbers above 0 and other than 1",
    ),
    "pruned coordinates": ({"mode": "coordinate", "seeds": [0, 1], "prune": "median"}, "leave prune out"),
    "a proxy that is a number": ({"proxy": 3}, "proxy should be the path of a config"),
    "a proxy that is not there": ({"proxy": "gone.yaml"}, "gone.yaml: can't be read as a config"),
    "a bad proxy": ({"proxy": {"model": {"widht": 3}}}, "unknown key model.widht; did you mean 'width'?"),
    "a secret": ({"proxy": {"run": {"mlflow_uri": "http://me:open-sesame@host"}}}, "holds credentials"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_spec_is_one_sentence(what: str, tmp_path: Path) -> None:
    keys, said = BAD[what]
    base = tree()
    base["proxy"] = {**base["proxy"], "optim": {**base["proxy"]["optim"], "clip": 0}}
    with pytest.raises(InputError) as caught:
        spec.load(write(tmp_path, {**base, **keys}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", "?"))
    assert "open-sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "is not YAML"), ("- 1", "should hold keys"), ("", "should hold keys")]
)
def test_a_file_that_is_no_spec(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        spec.load(write(tmp_path, text))
    with pytest.raises(InputError, match=r"can't be read as the spec of a sweep"):
        spec.load(tmp_path / "gone.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML would keep the second range without a word."""
    with pytest.raises(InputError, match=r"the key 'optim.lr' stands twice"):
        spec.load(write(tmp_path, "search:\n  optim.lr: {grid: [1]}\n  optim.lr: {grid: [2]}\n"))


def test_the_proxy_may_lie_beside_the_spec_and_be_overridden(tmp_path: Path) -> None:
    write(tmp_path / "deep", {"optim": {"clip": 0.5}, "train": {"steps": 30}}, "proxy.yaml")
    path = write(tmp_path, tree(proxy="deep/proxy.yaml"))
    assert spec.load(path).proxy.optim.clip == 0.5
    assert spec.load(path, ("optim.clip=2",), trials=2).proxy.optim.clip == 2
    assert spec.load(path, trials=2).trials == 2


@settings(deadline=None)
@given(exponent=st.integers(-40, 0).map(lambda halves: halves / 2))
def test_a_power_is_that_number(exponent: float) -> None:
    assert space.typed("optim.lr", f"2^{exponent:g}", "spec") == 2.0**exponent
    assert exponent > -6 or space.number(2.0**exponent) == f"2^{exponent:g}"


# ---- what may change -------------------------------------------------------------------------------------------------


def test_another_sweep_does_not_fit_into_the_folder_and_more_trials_do(tmp_path: Path) -> None:
    base = spec.load(write(tmp_path, tree(trials=3)))
    moved = dataclasses.replace(base.proxy, data=dataclasses.replace(base.proxy.data, path="elsewhere"))
    for free in (
        dataclasses.replace(base, trials=9),
        dataclasses.replace(base, confirm=spec.Confirm()),
        dataclasses.replace(base, proxy=moved),
    ):
        spec.same(base, free, tmp_path)
        assert spec.fingerprint(free) == spec.fingerprint(base)
    longer = dataclasses.replace(base.proxy, train=dataclasses.replace(base.proxy.train, steps=99))
    wider = (space.Values(key="optim.lr", values=(0.1, 0.2), ordered=True),)
    for key, other in {
        "proxy.train.steps": dataclasses.replace(base, proxy=longer),
        "search.optim.lr": dataclasses.replace(base, axes=wider),
        "seeds": dataclasses.replace(base, seeds=(0, 1)),
        "metric": dataclasses.replace(base, metric="loss"),
        "prune.every": dataclasses.replace(base, prune=spec.Prune(every=1, warmup_steps=1)),
    }.items():
        with pytest.raises(InputError, match=f"holds a sweep with {key.replace('.', '[.]')}"):
            spec.same(base, other, tmp_path)
        assert spec.fingerprint(other) != spec.fingerprint(base)


def test_a_narrow_proxy_is_warned_of() -> None:
    narrow = spec.load(EXAMPLES / "coordinate.yaml", ("model.patch=8",))
    assert "not well above patch^2 x channels = 64" in spec.advice(narrow)[0]
    assert spec.advice(spec.load(EXAMPLES / "small.yaml")) == []


# ---- is the optimum inside? ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(low=st.floats(-20, 0), length=st.floats(0.5, 10), at=st.floats(0, 1), log=st.booleans())
def test_an_optimum_near_an_end_is_told_with_a_wider_range(low: float, length: float, at: float, log: bool) -> None:
    assume(min(abs(at - 0.1), abs(at - 0.9)) > 1e-6)
    ends = (2.0**low, 2.0 ** (low + length)) if log else (2.0**low, 2.0**low + length)
    axis = space.Range(key="optim.lr", low=ends[0], high=ends[1], log=log, whole=False)
    best = ends[0] * (ends[1] / ends[0]) ** at if log else ends[0] + at * length
    said = space.too_narrow(axis, [best])
    assert bool(said) == (at < 0.1 or at > 0.9)
    if said:
        words, value = said.rsplit(" ", 1)
        assert words == ("lower the low end to" if at < 0.1 else "raise the high end to")
        proposed = space.typed("optim.lr", value, "")
        assert proposed < ends[0] if at < 0.1 else proposed > ends[1]


def test_the_best_alone_is_chance_where_the_others_lie_elsewhere() -> None:
    axis = space.Range(key="optim.clip", low=0.1, high=10.0, log=True, whole=False)
    assert space.too_narrow(axis, [9.9, 0.2, 1.0]) == ""
    assert space.too_narrow(axis, [9.9, 0.2, 4.0]) == "raise the high end to 100"
    assert space.too_narrow(axis, [1.0, 9.9, 9.5]) == ""


def test_a_grids_end_asks_for_the_next_point() -> None:
    axis = space.Values(key="optim.lr", values=(2**-12, 2**-11, 2**-10), ordered=True)
    assert space.too_narrow(axis, [2**-10]) == "add 2^-9 to the grid"
    assert space.too_narrow(axis, [2**-12]) == "add 2^-13 to the grid"
    assert space.too_narrow(axis, [2**-11]) == ""
    assert space.too_narrow(space.Values(key="optim.schedule", values=("a", "b"), ordered=False), ["a"]) == ""
    zero = space.Range(key="optim.clip", low=0.0, high=1.0, log=False, whole=False)
    assert space.too_narrow(zero, [0.0]) == "", "nothing lies below"
