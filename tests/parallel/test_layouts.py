"""Law 3: the layout changes nothing. Every network in every layout against its plain-PyTorch reference."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import tiny
from mpdit.config import Config
from parallel.compared import difference, train_layout, train_reference, whole
from parallel.layouts import CASES, Case

LOSS_BOUND = 1e-5  # relative, fp32
EMA_BOUND = 1e-4  # absolute, after the last step at a learning rate of 4e-3
BF16_BOUND = 3e-2

ROWS = [(case, name) for case in CASES for name in CASES[case].layouts]


@pytest.fixture(scope="module")
def config_of(tiny_set: Path, labelled_set: Path) -> Any:
    def config(case: Case, parallel: dict[str, Any]) -> Config:
        data = labelled_set if case.labels else tiny_set
        return tiny.config(data, parallel=parallel, **case.sections)

    return config


@pytest.fixture(scope="module")
def references(config_of: Any) -> dict[str, dict[str, Any]]:
    """Trained when first asked for."""

    class References(dict[str, dict[str, Any]]):
        def __missing__(self, name: str) -> dict[str, Any]:
            case = CASES[name]
            self[name] = ranks.run(1, train_reference, config=config_of(case, {}), case=case)[0]
            return self[name]

    return References()


@pytest.fixture(scope="module")
def printed() -> Iterator[list[str]]:
    """Rows for the table, which comes when all are there."""
    columns = ("initial weights", "loss fp32", "grad norm", "EMA", "loss bf16")
    lines = [f"{'network':16s} {'layout':36s} {'ranks':>5s} " + " ".join(f"{c:>15s}" for c in columns)]
    yield lines
    print("\n" + "\n".join(lines))


@pytest.mark.dist
@pytest.mark.parametrize(("of", "name"), ROWS, ids=[f"{of}, {name}" for of, name in ROWS])
def test_layouts(of: str, name: str, config_of: Any, references: Any, printed: list[str]) -> None:
    case, reference = CASES[of], references[of]
    world, parallel = case.layouts[name]
    fp32 = ranks.run(world, train_layout, config=config_of(case, parallel))
    initial, wanted = whole(fp32), reference["initial"]
    identical = initial.keys() == wanted.keys() and all(torch.equal(initial[n], v) for n, v in wanted.items())
    averaged = whole(fp32, "ema")
    ema_error = max((averaged[n] - v).abs().max().item() for n, v in reference["ema"].items())
    loss, norm = difference(fp32[0]["losses"], reference["losses"]), difference(fp32[0]["norms"], reference["norms"])
    loss_bf16 = None
    if name in case.bf16:
        bf16 = ranks.run(world, train_layout, config=config_of(case, {**parallel, "precision": "bf16"}))
        loss_bf16 = difference(bf16[0]["losses"], reference["losses"])

    verdict = "identical" if identical else "DIFFERENT"
    numbers = [f"{x:15.1e}" for x in (loss, norm, ema_error)] + [f"{loss_bf16:15.1e}" if loss_bf16 else f"{'-':>15s}"]
    printed.append(f"{of:16s} {name:36s} {world:5d} {verdict:>15s} {' '.join(numbers)}")
    assert identical
    assert loss <= LOSS_BOUND
    assert norm <= 10 * LOSS_BOUND
    assert ema_error <= EMA_BOUND
    assert loss_bf16 is None or loss_bf16 <= BF16_BOUND
    assert all(r["losses"] == fp32[0]["losses"] for r in fp32), "ranks report different losses"


@pytest.mark.dist
@pytest.mark.parametrize("of", CASES)
def test_initial_weights_are_drawn_as_the_reference_says(of: str, references: Any) -> None:
    """The rows above start from the project's own: here their spread, or constant, is the reference's."""
    for name, (std, mean) in references[of]["drawn"].items():
        value = references[of]["initial"][name]
        if std == 0:
            assert torch.equal(value, torch.full_like(value, mean)), name
        else:
            assert value.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * value.numel())), name
            assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel()), name


@pytest.mark.dist
def test_the_references_met_both_losses_of_a_learned_variance(references: Any) -> None:
    """Timestep 0 has another loss than the rest: without it the table would say nothing of that."""
    for name, case in CASES.items():
        if case.sections.get("objective", {}).get("kind") == "ddpm":
            assert 0 in references[name]["timesteps"]
