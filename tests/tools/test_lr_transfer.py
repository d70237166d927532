"""Guards examples/lr_transfer: the arithmetic of its results, the decisions of its tuning, and (slow) that the best
learning rate carries over in width under muP and does not under SP."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

EXAMPLE = Path(__file__).parents[2] / "examples" / "lr_transfer"


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """(plan, analyse) of the example."""
    sys.path.insert(0, str(EXAMPLE))
    import analyse
    import plan

    yield plan, analyse
    sys.path.remove(str(EXAMPLE))


@given(
    where=st.floats(-7, -4),
    height=st.floats(0.1, 1),
    curvature=st.floats(0.01, 1),
    rate=st.floats(-0.5, 0.5),
)
def test_a_parabola_is_read_back(
    modules: tuple[ModuleType, ModuleType], where: float, height: float, curvature: float, rate: float
) -> None:
    _, analyse = modules

    def loss(x: float) -> float:
        return height * math.exp(curvature * (x - where) ** 2)

    losses = {float(x): loss(x) for x in range(-10, 0)}
    assert analyse.vertex(losses) == pytest.approx((where, height), rel=1e-6)
    assert analyse.at(losses, where + rate) == pytest.approx(loss(where + rate), rel=1e-6)


def test_an_optimum_at_the_edge_stays_there(modules: tuple[ModuleType, ModuleType]) -> None:
    _, analyse = modules
    assert analyse.vertex({-6.0: 0.5, -5.0: 0.6, -4.0: 0.9}) == (-6.0, 0.5)
    assert analyse.at({-6.0: 0.5, -5.0: 0.6}, -9.0) == 0.5


def test_steps_to_a_loss_lie_between_looks(modules: tuple[ModuleType, ModuleType]) -> None:
    _, analyse = modules
    curve = {"25": 1.0, "50": 0.8, "75": 0.6}
    assert analyse._steps_to(curve, 0.7) == pytest.approx(62.5)
    assert analyse._steps_to(curve, 2.0) == 25
    assert analyse._steps_to(curve, 0.1) == math.inf


def test_who_is_faster_to_the_same_loss(modules: tuple[ModuleType, ModuleType]) -> None:
    _, analyse = modules
    fast, slow = {"50": 0.8, "100": 0.4}, {"50": 0.9, "100": 0.6}
    assert analyse.speed(fast, slow, "100") == pytest.approx(100 / 75)
    assert analyse.speed(slow, fast, "100") == pytest.approx(75 / 100)
    assert analyse.speed(fast, {"50": 1.2}, "100") == math.inf


def test_tuning_keeps_what_helps_beyond_the_noise(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    """A proxy whose loss is known: a best rate of 2^-5, modulation at 1/2 helps by 2 %, input at 1/2 by 0.1 %."""
    plan, _ = modules
    path = tmp_path / "results.jsonl"
    path.touch()

    def loss(point: object) -> float:
        mult = dict(point.lr_mult)  # type: ignore[attr-defined]
        x = 0.5 + 0.02 * (point.log2_lr + 5) ** 2  # type: ignore[attr-defined]
        gain = {0.5: 0.98, 2.0: 1.05}.get(mult.get("modulation", 1.0), 1.0)
        return x * gain * (0.999 if mult.get("input") == 0.5 else 1.0)

    for _ in range(20):
        tuning = plan.Tuning(plan.Results(path), "dit")
        if tuning.choice:
            break
        wanted = {p.key: p for p in tuning.wanted}
        known = plan.Results(path).rows
        with path.open("a") as file:
            for key, point in wanted.items():
                if key not in known:
                    file.write(json.dumps({"point": json.loads(key), "loss": loss(point), "ema_loss": 9.0}) + "\n")
    assert tuning.choice == (-5.0, (("modulation", 0.5),))


def test_results_in_the_repository_are_of_points_of_the_plan(modules: tuple[ModuleType, ModuleType]) -> None:
    plan, _ = modules
    results = plan.Results(EXAMPLE / "results.jsonl")
    assert len(results.rows) > 50
    for row in results.rows.values():
        point = row["point"]
        assert point["arch"] in plan.ARCHS
        assert point["width"] in plan.WIDTHS
        assert row["loss"] > 0


@pytest.mark.slow
def test_the_best_learning_rate_carries_over(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    """A DiT on digits, widths 32, 64, 128, 200 steps, one seed: about two core-minutes."""
    plan, analyse = modules
    data = tmp_path / "data" / "digits16"
    build = [sys.executable, "-m", "mpdit", "data", "build", "digits", "--out", str(data), "--size", "16"]
    subprocess.run(build, check=True, timeout=600)
    kept = tmp_path / "results.jsonl"
    run = [sys.executable, str(EXAMPLE / "run.py"), "quick", "--data", str(data.parent), "--results", str(kept)]
    subprocess.run(run, check=True, timeout=3000)
    results = plan.Results(kept)
    where = {}
    for rule in ("mup", "sp"):
        for width in plan.WIDTHS[:3]:
            of = "mup" if width == plan.WIDTHS[0] else rule  # at the proxy both rules are one model
            points = [p for p in plan.quick(results) if (p.rule, p.width) == (of, width)]
            where[rule, width] = analyse.vertex({p.log2_lr: results.loss(p) for p in points})[0]
    base = where["mup", 32]
    assert all(abs(where["mup", width] - base) <= 0.75 for width in (64, 128))
    assert where["sp", 128] - base <= -1.1
