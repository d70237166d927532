"""Guards what a trial's process is given, cores and GPUs, and what is kept of its last words."""

from pathlib import Path

import pytest
from sweep_specs import tree, write

import commands
from mpdit_tools.sweep import main, trial


@pytest.mark.parametrize(
    ("named", "workers", "ranks", "given"),
    [
        ("4,7", 2, 1, [("4",), ("7",)]),
        ("GPU-a, ,GPU-b", 3, 1, [("GPU-a",), ("GPU-b",), ("GPU-a",)]),
        ("0,1,2,3", 2, 2, [("0", "1"), ("2", "3")]),
        ("0,1,2", 2, 2, [("0", "1"), ("2", "0")]),
        ("0,1", 1, 2, [()]),  # one worker: all that it sees
        ("", 2, 1, [(), ()]),
    ],
)
def test_workers_share_the_gpus_that_are_visible(
    named: str, workers: int, ranks: int, given: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    slots = main._slots(workers, ranks)
    assert [slot.devices for slot in slots] == given
    for slot in slots:
        assert slot.environment(ranks)["CUDA_VISIBLE_DEVICES"] == (",".join(slot.devices) or named)


def test_gpus_are_numbered_from_zero_whatever_their_devices_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with GPUs 2 and 5 of eight has /dev/nvidia2 and /dev/nvidia5, which CUDA calls 0 and 1."""
    for name in ("nvidia2", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert trial.visible_devices(tmp_path) == ["0", "1"]


def test_more_ranks_than_gpus_is_a_sentence(tmp_path: Path, tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    path = write(tmp_path, tree(tiny_set, ranks=2))
    code, _, error = commands.run("sweep", path, "parallel.tp=2", "--out", tmp_path / "s")
    assert (code, "ranks is 2, but there is 1 GPU; give at most as many." in error) == (2, True), error


@pytest.mark.parametrize(
    ("said", "code", "kept"),
    [
        ("Traceback\nValueError: no\n\n", 1, "ValueError: no"),
        ("mpdit: data.path is gone.\nE1122 torchrun\n=====\n", 1, "mpdit: data.path is gone."),
        ("a warning\n", -9, "killed by SIGKILL"),
        ("", 3, "exit code 3 without a word"),
        ("x" * 999, 1, "x" * 300),
        ("can't reach https://me:pw@host/?token=abc\n", 1, "can't reach https://***@host/?token=***"),
    ],
)
def test_last_words(said: str, code: int, kept: str) -> None:
    assert trial.last_words(said, code) == kept
