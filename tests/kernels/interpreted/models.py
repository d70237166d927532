"""Whole networks whose kernels run in Triton's interpreter (started by test_fused.py)."""

import pytest

from kernels import model_runs
from mpdit_kernels import switch
from mpdit_kernels.fused import launch


@pytest.mark.parametrize("name", model_runs.ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: dict[str, int] = {}

    def count(kernel, *arguments, **constants) -> None:
        launched[kernel.__name__] = launched.get(kernel.__name__, 0) + 1
        launch.launch(kernel, *arguments, **constants)

    for module in ("norm", "residual", "heads"):
        monkeypatch.setattr(f"mpdit_kernels.fused.{module}.launch", count)
    losses, norms = model_runs.trained(name, "triton", steps=2)
    assert switch.chosen() == "triton"
    assert {"norm_forward", "norm_backward", "heads_forward", "heads_backward"} <= launched.keys()
    assert ("residual_forward" in launched) == (name != "uvit")  # which has no gates
    wanted_losses, wanted_norms = model_runs.trained(name, "torch", steps=2)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert norms == pytest.approx(wanted_norms, rel=1e-4)
