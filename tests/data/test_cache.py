"""Rows on disk: what is read is what was written, and nothing damaged, stale or foreign is read without a word."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpdit.data import cache
from mpdit.data.cache import Cache, Wanted
from mpdit.errors import InputError

WANTED = Wanted(kind="text", split="train", samples=5, depends={"model": "a" * 64, "source": "b" * 64, "tokens": 8})
ROWS = [np.full((length, 3), length, np.float16) for length in (2, 0, 5, 1, 3)]


def write(root: Path, rows: Sequence[np.ndarray], per_part: int, wanted: Wanted = WANTED) -> Path:
    """A cache as the builder leaves it."""
    folder = wanted.folder(root)
    folder.mkdir(parents=True)
    for part, first in enumerate(range(0, len(rows), per_part)):
        these = rows[first : first + per_part]
        cache.write_part(folder, part, these, [row.shape for row in these])
    files = {p.name: {"bytes": p.stat().st_size, "sha256": cache.sha256_of(p)} for p in sorted(folder.iterdir())}
    known = {"format": cache.FORMAT, "kind": wanted.kind, "split": wanted.split, "samples": wanted.samples}
    about = {"depends": wanted.depends, "facts": {}, "rows": len(rows), "per_part": per_part, "files": files}
    write_manifest(folder, {**known, **about})
    return folder


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("manifest_sha256", None)
    signed = {**manifest, "manifest_sha256": cache.manifest_sha256(manifest)}
    (folder / "manifest.json").write_text(json.dumps(signed))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=9), per_part=st.integers(1, 4)
)
def test_ragged_rows_come_back(sizes: list[tuple[int, int]], per_part: int, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    rows = [np.random.default_rng(n).standard_normal(size).astype(np.float16) for n, size in enumerate(sizes)]
    write(tmp_path, rows, per_part)
    found = Cache.open(tmp_path, WANTED)
    for number in np.random.default_rng(0).permutation(len(rows)):
        flat, dims = found.row(int(number))
        assert dims == sizes[number]
        np.testing.assert_array_equal(flat.reshape(dims), rows[number])
    assert found.verify() == sum(p.stat().st_size for p in found.folder.iterdir() if p.suffix == ".npy")
    with pytest.raises(IndexError):
        found.row(len(rows))


def read_all(root: Path) -> None:
    found = Cache.open(root, WANTED)
    for number in range(len(ROWS)):
        found.row(number)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    """Every file, by a flipped byte at the start, in the middle and at the end, cut, emptied and removed."""
    names = [path.name for path in write(tmp_path / "good", ROWS, 2).iterdir()]
    assert len(names) == 7
    read_all(tmp_path / "good")
    tried = 0
    for name in names:
        whole = (WANTED.folder(tmp_path / "good") / name).read_bytes()
        flipped = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in (0, len(whole) // 2, len(whole) - 1)]
        for damaged in (*flipped, whole[:-1], b"", None):
            root = tmp_path / f"bad{tried}"
            shutil.copytree(tmp_path / "good", root)
            path = WANTED.folder(root) / name
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(InputError) as caught:
                read_all(root)
            assert str(WANTED.folder(root)) in str(caught.value) or name == "manifest.json"
            assert "\n" not in str(caught.value)
            tried += 1
    assert tried == 7 * 6


def test_padding_in_the_header_is_covered_by_verify(tmp_path: Path) -> None:
    """A byte that no row depends on: reading does not mind, verifying does."""
    path = write(tmp_path, ROWS, 2) / cache.data_name(0)
    whole = path.read_bytes()
    assert whole[100:101] == b" "
    path.write_bytes(whole[:100] + b"\t" + whole[101:])
    read_all(tmp_path)
    with pytest.raises(InputError, match=r"000000\.npy: is damaged"):
        Cache.open(tmp_path, WANTED).verify()


def wanted(**changed: Any) -> Wanted:
    return Wanted(kind="text", split="train", samples=5, depends={**WANTED.depends, **changed})


def test_another_source_is_refused_with_what_differs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no text of the train split; run `mpdit data cache CONFIG`"):
        Cache.open(tmp_path, WANTED)
    write(tmp_path, ROWS, 2)
    write(tmp_path, ROWS, 2, wanted(model="c" * 64, tokens=16))
    with pytest.raises(InputError, match=r"tokens is 8, but the config\'s is 9; run") as caught:
        Cache.open(tmp_path, wanted(tokens=9))
    assert "model" not in str(caught.value), "the nearest one is told"
    with pytest.raises(InputError, match=r'source is "bbbb.*bbbbb", but the config\'s is "dddd'):
        Cache.open(tmp_path, wanted(source="d" * 64))
    with pytest.raises(InputError, match=r"more is null, but the config's is 1"):
        Cache.open(tmp_path, wanted(more=1))
    assert Cache.open(tmp_path, WANTED).folder == WANTED.folder(tmp_path)


def test_without_the_model_the_only_cache_is_used(tmp_path: Path) -> None:
    write(tmp_path, ROWS, 2)
    assert Cache.open(tmp_path, wanted(model=None)).depends["model"] == "a" * 64
    write(tmp_path, ROWS, 2, wanted(model="c" * 64))
    with pytest.raises(InputError, match="are of different models"):
        Cache.open(tmp_path, wanted(model=None))


def test_a_manifest_cannot_reach_outside(tmp_path: Path) -> None:
    folder = write(tmp_path, ROWS, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "secret.npy").write_bytes(b"1")
    manifest["files"]["../secret.npy"] = {"bytes": 1, "sha256": "0"}
    write_manifest(folder, manifest)
    with pytest.raises(InputError, match="should be the plain name of a file"):
        Cache.open(tmp_path, WANTED)


def test_a_manifest_of_nonsense_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path, ROWS, 2)
    good = json.loads((folder / "manifest.json").read_text())
    for key, value in (("rows", "5"), ("per_part", 0), ("files", []), ("depends", 1), ("rows", 50), ("format", "x")):
        write_manifest(folder, {**good, key: value})
        with pytest.raises(InputError, match=r"manifest\.json"):
            Cache.open(tmp_path, WANTED)
