"""Which implementation runs, and what is said where it can't."""

import os
import subprocess
import sys

import pytest
import torch

from mpdit_kernels import switch


@pytest.fixture(autouse=True)
def _restored():
    before = switch.chosen()
    switch.lacking.cache_clear()
    yield
    switch.lacking.cache_clear()
    switch.use(before)


def test_the_default_is_auto_and_a_cpu_takes_the_reference() -> None:
    assert switch.chosen() == "auto"
    assert not switch.takes(torch.zeros(1))
    assert not switch.takes(torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"triton": False}, "triton is not installed"),
        ({"capabilities": []}, "there is no CUDA device"),
        ({"capabilities": [(9, 0), (7, 5)]}, "the GPU is sm_75"),
        ({"compiler": False}, "there is no C compiler"),
        ({}, ""),
        ({"capabilities": [], "compiler": False, "interpreter": True}, ""),
    ],
)
def test_what_a_machine_lacks(machine: dict, reason: str) -> None:
    said = switch.what_lacks(**{"triton": True, "capabilities": [(9, 0)], "compiler": True} | machine)
    assert said.startswith(reason)
    assert bool(said) == bool(reason)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "lacking", lambda: "there is no CUDA device")
    with pytest.raises(RuntimeError, match=r"Triton's, but there is no CUDA device; auto and torch run without\."):
        switch.use("triton")
    monkeypatch.undo()
    assert switch.chosen() == "auto"


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tritn', but should be one of auto, torch, triton\."):
        switch.use("tritn")  # type: ignore[arg-type]


class OnCuda:
    """What the switch asks of a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("choice", "reason", "dtype", "taken"),
    [
        ("auto", "", torch.bfloat16, True),
        ("auto", "", torch.float64, False),
        ("auto", "there is no C compiler", torch.bfloat16, False),
        ("torch", "", torch.bfloat16, False),
        ("triton", "", torch.bfloat16, True),
        ("triton", "", torch.float64, True),  # the kernels refuse it by name
    ],
)
def test_what_happens_on_a_gpu(
    choice: switch.Choice, reason: str, dtype: torch.dtype, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch, "lacking", lambda: reason)
    switch.use(choice)
    assert switch.takes(OnCuda(dtype)) is taken  # type: ignore[arg-type]
    monkeypatch.undo()


def test_the_interpreter_takes_cpu_tensors_where_it_is_asked_for() -> None:
    code = (
        "import torch; from mpdit_kernels import switch; x = torch.zeros(1); assert not switch.takes(x); "
        "switch.use('triton'); assert switch.takes(x)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
