"""Guards what `mpdit sweep` says of its trials: none is left out of a picture, importances and noise are those
that were planted, and an end of a range is told."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_specs import EXAMPLES

import ranks
from mpdit import config as configs
from mpdit_tools.sweep import coordinate, figure, report, results, rounds, space, spec, text
from mpdit_tools.sweep.results import Record
from mpdit_tools.sweep.spec import Spec
from mpdit_tools.sweep.summary import Summary, importances, summarize


@pytest.fixture(scope="module")
def mmdit() -> Spec:
    return spec.load(EXAMPLES / "mmdit.yaml")


def trials(of: Spec, count: int, loss: Any, seed: int = 0) -> list[Record]:
    """`count` random settings; `loss(params)` is a value or a state's name."""
    draw, records = random.Random(seed), []
    for number in range(count):
        params: dict[str, Any] = {}
        for axis in of.axes:
            if isinstance(axis, space.Range):
                share = draw.random()
                value = (
                    axis.low * (axis.high / axis.low) ** share
                    if axis.log
                    else axis.low + (axis.high - axis.low) * share
                )
                params[axis.key] = round(value) if axis.whole else value
            elif isinstance(axis, space.Values):
                params[axis.key] = draw.choice(axis.values)
        came = loss(params)
        state = came if isinstance(came, str) else "complete"
        value = None if isinstance(came, str) else came
        records.append(
            Record(number=number, kind="search", state=state, params=params, seed=0, value=value, images=100, wall_s=9)
        )
    return records


def bowl(params: dict[str, Any]) -> float:
    return 0.4 + 0.03 * (math.log2(params["optim.lr"]) + 10) ** 2 + 0.01 * math.log10(params["optim.clip"]) ** 2


def summary(of: Spec, records: list[Record]) -> Summary:
    return summarize("a sweep", of, records)


# ---- figures ---------------------------------------------------------------------------------------------------------


def drawn(axis: Any) -> int:
    """Points in a panel, without the star."""
    return sum(len(marks.get_offsets()) for marks in axis.collections if marks.get_offsets().size) - 1


@settings(max_examples=5, deadline=None)
@given(
    worst=st.floats(1, 1e30),
    states=st.lists(st.sampled_from(["complete", "pruned", "diverged", "failed"]), min_size=1, max_size=30),
)
def test_every_trial_is_in_every_panel_between_the_limits(worst: float, states: list[str], mmdit: Spec) -> None:
    from matplotlib import pyplot

    came = iter(["complete", *states])

    def loss(params: dict[str, Any]) -> Any:
        state = next(came)
        return (bowl(params) if len(states) % 3 else worst * bowl(params) ** 20) if state == "complete" else state

    told = summary(mmdit, trials(mmdit, len(states) + 1, loss))
    picture = figure._responses(told)
    picture.canvas.draw()
    panels = [axis for axis in picture.axes if axis.get_xlabel() in dict.fromkeys(a.key for a in mmdit.axes)]
    assert len(panels) == 4
    for axis in panels:
        assert drawn(axis) == len(told.over)
        (low, high), (left, right) = axis.get_ylim(), axis.get_xlim()
        for marks in axis.collections:
            for x, y in marks.get_offsets():
                assert low <= y <= high
                assert left <= x <= right
    pyplot.close(picture)


def reported(rank: int, world: int, folder: Path, told: Summary) -> list[str]:
    return [path.name for _ in range(4) for path in report.write_report(folder, told)]


@pytest.mark.dist
def test_workers_that_end_together_write_their_reports_side_by_side(tmp_path: Path) -> None:
    of = spec.load(EXAMPLES / "pixart.yaml")
    told = summary(of, trials(of, 5, lambda params: 0.4 + params["optim.lr"]))
    for names in ranks.run(3, reported, folder=tmp_path, told=told):
        assert names == 4 * ["REPORT.md", "response.png", "progress.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["REPORT.md", "progress.png", "response.png"]


@pytest.mark.parametrize("name", ["mmdit", "pixart", "small"])
def test_each_kind_of_space_has_its_pictures(name: str, tmp_path: Path) -> None:
    of = spec.load(EXAMPLES / f"{name}.yaml")
    one = len(of.axes) == 1
    records = trials(of, 40, lambda params: 0.4 + 0.01 * (math.log2(params["optim.lr"]) + 8) ** 2)
    files = [path.name for path in report.write_report(tmp_path, summary(of, records))]
    assert files == ["REPORT.md", "response.png", *([] if one else ["importance.png"]), "progress.png"]
    assert all(f"({name})" in (tmp_path / "REPORT.md").read_text() for name in files[1:])
    nothing = [path.name for path in report.write_report(tmp_path, summary(of, []))]
    assert nothing == ["REPORT.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["REPORT.md"], "pictures of what is no more are gone"


def test_a_coordinate_search_has_a_panel_a_decision(tmp_path: Path) -> None:
    """Also where a change made one seed diverge: its bar is a cross, not a number."""
    of = spec.load(EXAMPLES / "coordinate.yaml")
    start = {axis.key: space.of(of.proxy, axis.key) for axis in of.axes}
    changes = (
        coordinate.Change(what=(("mup.lr_mult.output", 2.0),), gains=(0.01, 0.02, 0.015), kept=True),
        coordinate.Change(what=(("mup.lr_mult.hidden", 2.0),), gains=(-0.3, -math.inf, -0.2)),
    )
    log = [
        coordinate.Sweep(key="optim.lr", start=start, losses={2**-6: 0.5, 2**-5: 0.45, 2**-4: math.inf}),
        coordinate.Round(start=start, loss=0.45, needed=0.004, changes=changes, together=changes[0]),
    ]
    told = dataclasses.replace(summary(of, []), log=log)
    picture = rounds.draw(told)
    assert [axis.get_title() for axis in picture.axes] == ["1. sweep", "2. changes at 0.4500"]
    assert [tick.get_text() for tick in picture.axes[1].get_yticklabels()] == ["output x 2", "hidden x 2", "together"]
    assert "**2^-5**" in text.markdown(told, [])
    assert "output x 2 (+1.50%) helped by more than the noise; together +1.50%" in text.markdown(told, [])


# ---- what is concluded -----------------------------------------------------------------------------------------------


def test_importance_is_that_of_the_key_that_matters_and_nothing_is_said_of_too_few(mmdit: Spec) -> None:
    shares, why = importances(mmdit, trials(mmdit, 80, bowl))
    assert (next(iter(shares)), why) == ("optim.lr", "")
    assert shares["optim.lr"] > 0.6
    assert sum(shares.values()) == pytest.approx(1)
    few, why = importances(mmdit, trials(mmdit, 19, bowl))
    assert few == {}
    assert "19 trials, of which 19 complete, are too few" in why
    pixart = spec.load(EXAMPLES / "pixart.yaml")
    assert importances(pixart, trials(pixart, 40, lambda params: 1.0)) == ({}, "one key was searched")


def test_diverged_trials_count_as_bad_for_importance(mmdit: Spec) -> None:
    """Clipping decides who survives and nothing else: without the dead nobody would see it."""
    records = trials(
        mmdit, 80, lambda params: "diverged" if params["optim.clip"] > 0.3 else 0.5 + random.random() * 1e-6
    )
    assert next(iter(importances(mmdit, records)[0])) == "optim.clip"


@given(common=st.floats(0.001, 0.03), own=st.floats(0.001, 0.03), number=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_noise_tells_what_a_seed_brings_to_all_from_what_it_brings_to_one(
    common: float, own: float, number: int, mmdit: Spec
) -> None:
    of = dataclasses.replace(mmdit, seeds=tuple(range(40)))
    draw = random.Random(number)
    luck = [draw.gauss(0, common) for _ in of.seeds]
    records = [
        Record(
            number=40 * row + seed,
            kind="search",
            state="complete",
            params={"optim.lr": float(row)},
            seed=seed,
            value=math.exp(luck[seed] + draw.gauss(0, own)),
        )
        for row in range(6)
        for seed in of.seeds
    ]
    found = results.noise(of, records)
    assert found is not None
    assert found.paired == pytest.approx(own, rel=0.25)
    assert found.seed == pytest.approx(math.hypot(common, own), rel=0.5)
    assert results.noise(mmdit, records[:1]) is None


def test_the_report_says_how_to_widen(mmdit: Spec) -> None:
    """The learning rate is told in each of 20 searches; keys that do not matter are seldom, of 60."""
    found = [summary(mmdit, trials(mmdit, 80, lambda params: 1 / params["optim.lr"], n)).narrow for n in range(20)]
    assert all("optim.lr" in narrow for narrow in found)
    assert sum(len(narrow) - 1 for narrow in found) <= 8
    told = summary(mmdit, trials(mmdit, 80, lambda params: 1 / params["optim.lr"]))
    assert told.narrow["optim.lr"].startswith("raise the high end to 0.0")
    assert f"lies at an end; the optimum may lie beyond: {told.narrow['optim.lr']}." in text.markdown(told, [])
    assert "add `confirm" in text.markdown(told, []), "one seed says nothing of noise"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_trials_jsonl_and_best_yaml_are_the_contract(mmdit: Spec, tmp_path: Path) -> None:
    states = iter(["diverged", "pruned", "failed"])
    records = trials(mmdit, 6, lambda params: next(states, None) or bowl(params))
    running = dataclasses.replace(records[0], number=6, state="running")
    report.write_results(tmp_path, mmdit, [*records, running])
    rows = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == list(range(6))
    for row, record in zip(rows, records, strict=True):
        assert [*row] == ["number", "state", "value", "params", "images", "flops", "seed"]
        assert row["params"] == record.params
        assert (row["value"] is None) == (row["state"] != "complete")
    best = min(records[3:], key=lambda record: record.loss)
    config = configs.load(tmp_path / "best.yaml")
    assert {key: space.of(config, key) for key in best.params} == best.params
    assert space.filled(config, {k: space.of(mmdit.proxy, k) for k in best.params}, "") == mmdit.proxy
