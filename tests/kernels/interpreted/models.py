"""Whole networks whose kernels run in Triton's interpreter (started by test_fused.py)."""

import pytest

from kernels import model_runs
from mpdit_kernels import switch
from mpdit_kernels.fused import launch


@pytest.mark.parametrize("name", model_runs.ARCHITECTURES)
def test_losses_are_those_of_the_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: dict[str, int] = {}

    def count(kernel, *arguments, **constants) -> None:
        launched[kernel.__name__] = launched.get(kernel.__name__, 0) + 1
        launch.launch(kernel, *arguments, **constants)

    for module in ("norm", "residual", "heads"):
        monkeypatch.setattr(f"mpdit_kernels.fused.{module}.launch", count)
    fused = model_runs.losses(name, "triton", steps=2)
    assert switch.chosen() == "triton"
    assert {"norm_forward", "norm_backward", "heads_forward", "heads_backward"} <= launched.keys()
    assert ("residual_forward" in launched) == (name != "uvit")  # which has no gates
    plain = model_runs.losses(name, "torch", steps=2)
    assert plain[0] != plain[1]
    assert fused == pytest.approx(plain, rel=1e-5)
