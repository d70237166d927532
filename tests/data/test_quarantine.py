"""The quarantine: each bad sample written down once, over kills and resumes, and too many of them stop the run."""

import json
from pathlib import Path

import pytest

from mpdit.data.quarantine import FILE, Bad, Quarantine
from mpdit.errors import CheckFailed, InputError


def bad(sample: int, reason: str = "image damaged") -> Bad:
    return Bad(sample=sample, where=f"train-00000.tar: {sample:08d}.png", reason=reason)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_sample_with_the_step_it_was_found_at(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / FILE, samples=1000, max_fraction=0.01)
    quarantine.add([], 0)
    assert not (tmp_path / FILE).exists()
    quarantine.add([bad(5), bad(3, "no image"), bad(5)], 7)
    quarantine.add([bad(5), bad(9)], 8)
    assert quarantine.count == 3
    where = "train-00000.tar: 0000000{}.png"
    assert lines(tmp_path / FILE) == [
        {"sample": 5, "where": where.format(5), "reason": "image damaged", "step": 7},
        {"sample": 3, "where": where.format(3), "reason": "no image", "step": 7},
        {"sample": 9, "where": where.format(9), "reason": "image damaged", "step": 8},
    ]


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    Quarantine(tmp_path / FILE, 1000, 0.01).add([bad(5), bad(3)], 7)
    again = Quarantine(tmp_path / FILE, 1000, 0.01)
    assert again.count == 2
    again.add([bad(3), bad(4)], 6)
    assert [line["sample"] for line in lines(tmp_path / FILE)] == [5, 3, 4]


@pytest.mark.parametrize("kept", [1, 20, 60])
def test_a_line_that_a_kill_left_torn_is_found_again(tmp_path: Path, kept: int) -> None:
    path = tmp_path / FILE
    Quarantine(path, 1000, 0.01).add([bad(5), bad(3)], 7)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    again = Quarantine(path, 1000, 0.01)
    assert again.count == 1
    again.add([bad(3)], 8)
    assert [(line["sample"], line["step"]) for line in lines(path)] == [(5, 7), (3, 8)]


@pytest.mark.parametrize(
    "content", [b"junk\n", b"[1]\n", b'{"sample": 1}\n', b'{"sample": "x", "where": 1}\n', b"\xff\n"]
)
def test_another_file_in_its_place_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"quarantine.jsonl: is no list of damaged samples"):
        Quarantine(tmp_path / FILE, 1000, 0.01)


def test_too_many_stop_the_run_with_the_list(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / FILE, samples=1200, max_fraction=0.01)
    quarantine.add(map(bad, range(12)), 3)
    with pytest.raises(CheckFailed) as caught:
        quarantine.add([bad(12, "no image")], 4)
    said = str(caught.value)
    assert said.startswith("step 4: 13 of 1200 samples are damaged, more than data.max_bad_fraction 0.01 allows; ")
    assert str(tmp_path / FILE) in said
    assert all(bad(sample).where in said for sample in range(10))
    assert bad(10).where not in said
    assert len(lines(tmp_path / FILE)) == 13
    # And at once when the run is started again, with nothing new found.
    with pytest.raises(CheckFailed, match="13 of 1200"):
        Quarantine(tmp_path / FILE, 1200, 0.01).add([], 4)
    Quarantine(tmp_path / FILE, 1200, 0.02).add([], 4)


def test_none_are_allowed_where_the_fraction_is_0(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / FILE, samples=10**9, max_fraction=0.0)
    with pytest.raises(CheckFailed, match=r"1 of 1000000000 .* 00000000.png \(image damaged\)\.$"):
        quarantine.add([bad(0)], 0)


def test_storage_that_takes_nothing_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    quarantine = Quarantine(tmp_path / FILE, samples=1000, max_fraction=0.01)
    quarantine.add([bad(1)], 1)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        quarantine.add([bad(2)], 2)
        assert quarantine.count == 2
        assert quarantine.trouble is not None
        assert quarantine.trouble.startswith(f"{tmp_path / FILE} could not be written (No space left on device)")
        assert [line["sample"] for line in lines(tmp_path / FILE)] == [1], "nothing torn is left"
    quarantine.add([], 3)
    assert quarantine.trouble is None
    assert [(line["sample"], line["step"]) for line in lines(tmp_path / FILE)] == [(1, 1), (2, 2)]
