"""Guards what `mpdit sweep` runs next and which setting wins, on paper: trials are records, losses formulas."""

import dataclasses
import math
from typing import Any

import pytest
import sweep_stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_specs import EXAMPLES

from mpdit_tools.sweep import coordinate, plan, results, spec
from mpdit_tools.sweep.results import Record
from mpdit_tools.sweep.spec import Spec

# ---- what runs next --------------------------------------------------------------------------------------------------


def play(of: Spec, outcome: Any, together: int = 1, most: int = 500) -> list[Record]:
    """Run a sweep on paper, `together` trials at a time; `outcome(params, seed)` is a value, or a state's name."""
    records: list[Record] = []
    running: list[Record] = []
    while len(records) < most:
        wish = plan.following(of, [*records, *running])
        if wish == plan.DONE:
            return sorted(records, key=lambda record: record.number)
        if wish == plan.WAIT or len(running) == together:
            done = running.pop(0)
            came = outcome(done.params, done.seed)
            state = came if isinstance(came, str) else "complete"
            records.append(dataclasses.replace(done, state=state, value=None if isinstance(came, str) else came))
            continue
        number = len(records) + len(running)
        params = wish.params or {axis.key: number / 100 for axis in of.axes}
        running.append(Record(number=number, kind=wish.kind, state="running", params=params, seed=wish.seed))
    raise AssertionError("does not end")


def loss(params: dict[str, Any], seed: int) -> float:
    modulation = params.get("mup.lr_mult.modulation", 1.0)
    return sweep_stand_in.final_loss(math.log2(params["optim.lr"] or 1e-9), seed, modulation)


@settings(deadline=None)
@given(together=st.integers(1, 5), seeds=st.integers(1, 3), top=st.integers(0, 3))
def test_a_grid_runs_every_point_with_every_seed_once_and_the_best_again(together: int, seeds: int, top: int) -> None:
    base = spec.load(EXAMPLES / "pixart.yaml")
    confirm = spec.Confirm(top=top, seeds=(7, 8)) if top else None
    records = play(dataclasses.replace(base, seeds=tuple(range(seeds)), confirm=confirm), loss, together)
    ran = [(record.params["optim.lr"], record.seed, record.kind) for record in records]
    assert len({*ran}) == len(ran)
    assert {r[:2] for r in ran if r[2] == "search"} == {(2.0**e, s) for e in range(-13, -8) for s in range(seeds)}
    assert {r[:2] for r in ran if r[2] == "confirm"} == {(2.0**e, s) for e in range(-9, -9 - top, -1) for s in (7, 8)}


@settings(deadline=None)
@given(together=st.integers(1, 4), trials=st.integers(2, 12), bad=st.sampled_from(["pruned", "diverged", "failed"]))
def test_the_budget_is_of_runs_and_a_bad_first_seed_spares_the_others(together: int, trials: int, bad: str) -> None:
    base = dataclasses.replace(spec.load(EXAMPLES / "mmdit.yaml"), seeds=(0, 1), trials=trials, confirm=None)
    records = play(base, lambda params, seed: bad if round(params["optim.lr"] * 100) % 3 == 0 else 1.0, together)
    assert trials - 1 <= len(records) <= trials
    for setting in results.settings(records).values():
        spared = setting.by_seed[0].state == bad
        assert {*setting.by_seed} == ({0} if spared else {0, 1})


def test_a_lucky_seed_does_not_win_and_a_setting_that_diverges_once_neither() -> None:
    base = spec.load(EXAMPLES / "pixart.yaml")
    lucky, steady, shaky = {"optim.lr": 2.0**-13}, {"optim.lr": 2.0**-12}, {"optim.lr": 2.0**-11}
    values: list[tuple[dict[str, float], int, float | None]] = [
        *((lucky, 0, 0.30), (steady, 0, 0.32), (shaky, 0, 0.31)),
        *((lucky, 1, 0.40), (steady, 1, 0.32), (shaky, 1, None)),
    ]
    records = [
        Record(number=n, kind="search", state="diverged" if v is None else "complete", params=p, seed=s, value=v)
        for n, (p, s, v) in enumerate(values)
    ]
    assert results.best(base, records[:3]).params == lucky  # type: ignore[union-attr]
    assert results.best(base, records).params == steady  # type: ignore[union-attr]
    assert results.best(base, []) is None


# ---- coordinate search -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def around() -> Spec:
    return spec.load(EXAMPLES / "coordinate.yaml")


def paper(noise: float, gains: dict[str, float], best: float = -4.75) -> Any:
    """A proxy on paper: a best learning rate, groups with a best multiplier (log2), and noise a run."""

    def value(params: dict[str, Any], seed: int) -> float:
        total = 0.5 * (1 + 0.02 * (math.log2(params["optim.lr"]) - best) ** 2)
        for group, where in gains.items():
            total *= 1 + 0.02 * (math.log2(params[f"mup.lr_mult.{group}"]) - where) ** 2
        draw = sweep_stand_in.random.Random(repr((sorted(params.items()), seed)))
        common = sweep_stand_in.random.Random(seed).gauss(0, 0.02)  # of the seed alone: pairing takes it out
        return total * (1 + common + draw.gauss(0, noise))

    return value


@given(together=st.integers(1, 6))
@settings(max_examples=6, deadline=None)
def test_coordinate_search_keeps_what_helps_and_nothing_else(together: int, around: Spec) -> None:
    """Modulation is best at 1/4, output at 4: both take both rounds; the others change nothing."""
    records = play(around, paper(0.0005, {"modulation": -2, "output": 2}), together)
    best = plan.winner(around, records)
    assert best is not None
    assert {key.rpartition(".")[2]: value for key, value in best.params.items() if value != 1} == {
        **{"lr": 2.0**-4.5 if best.params["optim.lr"] > 2**-4.9 else 2.0**-5, "modulation": 0.25, "output": 4.0}
    }
    rounds = coordinate.Search(around, results.settings(records)).log
    assert [type(entry).__name__ for entry in rounds] == ["Sweep", "Round", "Round", "Sweep"]
    assert rounds[1].together.kept  # type: ignore[union-attr]


def test_coordinate_search_keeps_nothing_that_is_noise(around: Spec) -> None:
    """Of 40 searches where no multiplier matters, few keep one: a change has to pass two standard errors."""
    kept = 0
    for number in range(40):
        shifted = dataclasses.replace(around, seeds=tuple(range(10 * number, 10 * number + 3)))
        best = plan.winner(shifted, play(shifted, paper(0.004, {})))
        assert best is not None
        kept += any(value != 1 for key, value in best.params.items() if key != "optim.lr")
    assert kept <= 20


def test_a_grid_whose_end_is_best_grows(around: Spec) -> None:
    records = play(around, paper(0.0001, {}, best=-2.5))
    best = plan.winner(around, records)
    assert best is not None
    assert best.params["optim.lr"] == pytest.approx(2**-2.5)


def test_a_change_that_diverges_is_not_kept_and_does_not_count_as_noise(around: Spec) -> None:
    def outcome(params: dict[str, Any], seed: int) -> Any:
        hot = params["mup.lr_mult.hidden"] > 1
        return "diverged" if hot and seed == 1 else paper(0.0005, {"modulation": -1})(params, seed) * (3 if hot else 1)

    best = plan.winner(around, play(around, outcome))
    assert best is not None
    assert (best.params["mup.lr_mult.hidden"], best.params["mup.lr_mult.modulation"]) == (1, 0.5)


def test_a_crashed_trial_is_wanted_again(around: Spec) -> None:
    """No decision may rest on a run that never was."""
    first = plan.following(around, [])
    assert isinstance(first, plan.Wish)
    assert first.params is not None
    crashed = Record(number=0, kind="search", state="failed", params=first.params, seed=first.seed)
    assert plan.following(around, [crashed]) == first


def test_all_diverging_is_an_end_without_a_best(around: Spec) -> None:
    records = play(around, lambda params, seed: "diverged")
    assert plan.winner(around, records) is None
    assert len(records) == 6, "the first sweep alone, and no second seed of what diverged"


def test_what_can_never_run_does_not_stop_a_search(around: Spec) -> None:
    """A factor that leads where nothing can be trained: tried twice, then as good as diverged."""

    def outcome(params: dict[str, Any], seed: int) -> Any:
        return "failed" if params["mup.lr_mult.hidden"] > 1 else paper(0.0005, {"modulation": -1})(params, seed)

    records = play(around, outcome)
    best = plan.winner(around, records)
    assert best is not None
    assert (best.params["mup.lr_mult.hidden"], best.params["mup.lr_mult.modulation"]) == (1, 0.5)
    failed = [record for record in records if record.state == "failed"]
    assert len(failed) == 2 * len(results.settings(failed))


def test_a_crash_while_confirming_does_not_cost_the_best_its_place() -> None:
    base = dataclasses.replace(spec.load(EXAMPLES / "pixart.yaml"), confirm=spec.Confirm(top=2, seeds=(1, 2)))
    crashes = iter(["failed"])

    def outcome(params: dict[str, Any], seed: int) -> Any:
        best = params["optim.lr"] == 2.0**-10
        return next(crashes, 0.4) if best and seed == 1 else 0.4 if best else 0.5

    records = play(base, outcome)
    found = results.best(base, records)
    assert found is not None
    assert found.params == {"optim.lr": 2.0**-10}
    assert found.has((0, 1, 2))


def test_noise_is_of_settings_that_came_through_with_every_seed() -> None:
    base = dataclasses.replace(spec.load(EXAMPLES / "pixart.yaml"), confirm=spec.Confirm(top=1, seeds=(1, 2)))
    records = play(base, lambda params, seed: "diverged" if seed == 2 else 0.4 + params["optim.lr"])
    assert results.noise(base, records) is None


@given(scale=st.floats(1e-4, 1e-2), seeds=st.integers(2, 6), number=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_noise_is_that_of_paired_differences_and_outliers_do_not_move_it(
    scale: float, seeds: int, number: int
) -> None:
    draw = sweep_stand_in.random.Random(number)
    quiet = [coordinate.Change(what=(), gains=tuple(draw.gauss(0, scale) for _ in range(seeds))) for _ in range(400)]
    wild = [coordinate.Change(what=(), gains=tuple(draw.gauss(-0.3, 0.2) for _ in range(seeds))) for _ in range(40)]
    needed = coordinate.needed_gain([*quiet, *wild], 0.0)
    assert needed == pytest.approx(2 * scale / math.sqrt(seeds), rel=0.35)
    assert coordinate.needed_gain(quiet, 1.0) == 1.0
