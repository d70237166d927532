"""Checkpoints as folders: what counts as whole, which are kept, what is said of the others."""

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint_folders as folders
from mpdit.errors import InputError
from mpdit.train import checkpoints


def kept(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoints.steps(run_dir)]


def test_a_complete_one_is_fine_and_its_manifest_covers_every_file(tmp_path: Path) -> None:
    path = folders.write(tmp_path, 4)
    checkpoints.verify(path)
    assert sorted(checkpoints.files_of(path)) == sorted(folders.FILES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("run"), 4)


@settings(deadline=None)
@given(at=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_no_byte_of_a_manifest_can_change_unseen(at: int, mask: int, whole: Path) -> None:
    """Its hashes cover the files, and its own hash and its one form cover it."""
    file = whole / checkpoints.MANIFEST
    before = file.read_bytes()
    changed = bytearray(before)
    changed[at % len(changed)] ^= mask
    file.write_bytes(changed)
    try:
        with pytest.raises(InputError, match=r"manifest\.json"):
            checkpoints.problems(whole)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("form", [{"indent": 2}, {"indent": 1, "sort_keys": True}, {}])
def test_a_manifest_has_one_form(form: dict[str, Any], tmp_path: Path) -> None:
    """The same values in other bytes: somebody has been at it."""
    file = folders.write(tmp_path, 4) / checkpoints.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()), **form) + "\n")
    with pytest.raises(InputError, match="not what its own SHA-256 says"):
        checkpoints.verify(file.parent)


def test_a_manifest_that_is_made_to_fit_another_file_is_no_manifest(tmp_path: Path) -> None:
    path = folders.write(tmp_path, 4)
    file = path / checkpoints.MANIFEST
    found = json.loads(file.read_text())
    found["files"].pop("__1_0.distcp")
    file.write_text(json.dumps(found, indent=1) + "\n")
    with pytest.raises(InputError, match="not what its own SHA-256 says"):
        checkpoints.verify(path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = folders.write(tmp_path, 4)
    (tmp_path / "secret").write_text("x")
    files = {"../../secret": {"bytes": 1, "sha256": "0" * 64}, **checkpoints.files_of(path)}
    (path / checkpoints.MANIFEST).write_text(checkpoints.manifest(files))
    with pytest.raises(InputError, match="lies outside the checkpoint"):
        checkpoints.verify(path)


@settings(deadline=None, max_examples=7)
@given(share=st.integers(1, 7))
def test_shares_of_the_files_are_all_of_them(share: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ranks that verify together miss no file and read none twice."""
    path = folders.write(tmp_path_factory.mktemp("run"), 4)
    for name in folders.FILES:
        folders.damage(path / name, "flipped")
    said = [problem for index in range(share) for problem in checkpoints.problems(path, (index, share))]
    assert sorted(said) == sorted(checkpoints.problems(path))
    assert len(said) == len(folders.FILES)


@settings(deadline=None, max_examples=50)
@given(
    steps=st.sets(st.integers(1, 40), min_size=1, max_size=8),
    keep_last=st.integers(0, 4),
    keep_every=st.integers(0, 10),
    data=st.data(),
)
def test_what_is_kept(
    steps: set[int], keep_last: int, keep_every: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The last few up to the one just written, and the multiples; nothing of a time that the run has left."""
    run_dir = tmp_path_factory.mktemp("run")
    for step in steps:
        folders.write(run_dir, step, {"state.json": b"{}"})
    now = data.draw(st.sampled_from(sorted(steps)))
    assert checkpoints.prune(run_dir, now, keep_last, keep_every) == []
    past = sorted((step for step in steps if step <= now), reverse=True)
    wanted = [s for s in past if not keep_last or s in past[:keep_last] or (keep_every and s % keep_every == 0)]
    assert kept(run_dir) == wanted
    assert kept(run_dir)[0] == now


def test_a_damaged_one_beyond_does_not_push_out_the_good_one(tmp_path: Path) -> None:
    """keep_last counts from the one just written: a damaged step 20 must not make step 18 the one too many."""
    for step in (16, 18, 20):
        folders.write(tmp_path, step)
    folders.damage(tmp_path / "checkpoints/step_20/__0_0.distcp", "emptied")
    checkpoints.prune(tmp_path, 18, keep_last=1, keep_every=0)
    assert kept(tmp_path) == [18]


def test_half_removed_is_partial_and_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        folders.write(tmp_path, step)

    def refuse(self: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "rmdir", refuse)
    (said,) = checkpoints.prune(tmp_path, 4, keep_last=1, keep_every=0)
    assert "step_2 could not be removed (Operation not permitted)" in said
    found = checkpoints.entry(tmp_path / "checkpoints/step_2", time.time())
    assert found.status == "partial"


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    folders.write(tmp_path, 4, {"state.json": b"old"})
    path = folders.write(tmp_path, 4, {"state.json": b"new"})
    assert (path / "state.json").read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["step_4"]


def test_entries_say_what_a_look_tells(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        folders.write(tmp_path, step)
    folders.damage(tmp_path / "checkpoints/step_4/__0_0.distcp", "truncated")
    (tmp_path / "checkpoints/step_6" / checkpoints.MANIFEST).unlink()
    (tmp_path / "checkpoints/step_8.partial-0a").mkdir()
    paths = [path for _, path in checkpoints.steps(tmp_path)] + checkpoints.unfinished(tmp_path)
    found = [checkpoints.entry(path, time.time() + 90) for path in paths]
    assert [(e.step, e.status) for e in found] == [(6, "partial"), (4, "damaged"), (2, "complete"), (8, "partial")]
    assert "__0_0.distcp" in (found[1].problem or "")
    assert found[2].bytes == sum(p.stat().st_size for p in paths[2].iterdir())
    assert 89 < found[2].age_s < 600


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("mpdit-checkpoint/1", "use a run of this version"),
        ("mpdit-checkpoint/9", "a later mpdit wrote it"),
        (None, "use a run of this version"),
        (3, "use a run of this version"),
    ],
)
def test_other_formats_say_why_not(written: object, why: str, tmp_path: Path) -> None:
    path = folders.write(tmp_path, 1, {"state.json": json.dumps({"format": written}).encode()})
    with pytest.raises(InputError, match=f"has format .*, this version reads mpdit-checkpoint/2 and .*{why}"):
        checkpoints.state(path)


@pytest.mark.parametrize("name", [checkpoints.MANIFEST, checkpoints.STATE])
def test_storage_that_fails_is_no_damage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over, a whole checkpoint would be removed by the next save."""
    folders.write(tmp_path, 4)
    newest = folders.write(tmp_path, 8)

    def stale(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if path.name == name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return plain(path, *arguments, **keywords)

    plain = Path.open
    monkeypatch.setattr(Path, "open", stale)
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read())
    with pytest.raises(
        checkpoints.Unreadable, match=r"can't be read \(Stale file handle\); mend the storage and start"
    ):
        checkpoints.newest(tmp_path, pytest.fail)
    monkeypatch.undo()
    assert checkpoints.newest(tmp_path, pytest.fail) == newest
