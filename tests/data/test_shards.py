"""A set is opened only when manifest, indices, tables and tars fit; a sample is read only as it was built."""

import concurrent.futures
import hashlib
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.make_shards import caption, edit_manifest, entry, make_shards, pixels, png, reseal
from mpdit.data.shards import BadSample, Shards
from mpdit.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "set")


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        Shards.open(folder, split)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def shard_entry(manifest: dict, number: int = 0) -> dict:
    return manifest["splits"]["train"]["shards"][number]


def rewrite_index(folder: Path, change) -> None:
    """Change the first index's text and hash it anew, as a builder with a mistake would."""
    index = folder / "train-00000.idx"
    index.write_text(change(index.read_text()))
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    edit_manifest(folder, lambda manifest: shard_entry(manifest).update(index_sha256=digest))


def test_reads_every_sample(folder: Path) -> None:
    shards = Shards.open(folder, "train")
    assert (len(shards), shards.name, shards.size) == (9, "tiny", 16)
    for sample in range(9):
        assert shards.read(sample) == (png(pixels(sample)), caption(sample))
        assert shards.caption(sample) == caption(sample)
    assert shards.where(4).endswith("train-00000.tar: 00000004.png")
    assert shards.where(5).endswith("train-00001.tar: 00000005.png")
    assert shards.tokenizer is not None
    assert shards.tokenizer.path == folder / "tokenizer.model"


@pytest.mark.parametrize("sample", [-1, 9])
def test_no_sample_out_of_range(folder: Path, sample: int) -> None:
    with pytest.raises(IndexError):
        Shards.open(folder, "train").read(sample)


def test_agrees_with_tarfile(folder: Path) -> None:
    """The index of the test's own writer is not the only witness of what is in the tar."""
    shards = Shards.open(folder, "train")
    with tarfile.open(folder / "train-00001.tar") as tar:
        member = tar.extractfile("00000007.png")
        assert member is not None
        assert member.read() == shards.read(7)[0]


def test_names_longer_than_tar_s_name_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tarfile.TarInfo
    monkeypatch.setattr(tarfile, "TarInfo", lambda name: original(f"{'deep/' * 24}{name}"))
    shards = Shards.open(make_shards(tmp_path / "set"), "train")
    assert shards.read(6) == (png(pixels(6)), caption(6))
    assert shards.where(6).endswith("deep/00000006.png")


def test_many_threads_read_the_right_bytes(folder: Path) -> None:
    shards = Shards.open(folder, "train")
    samples = [sample % 9 for sample in range(400)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for sample, (image, text) in zip(samples, pool.map(shards.read, samples), strict=True):
            assert (image, text) == (png(pixels(sample)), caption(sample))


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpdit.data.shards._OPEN_TARS", 2)
    shards = Shards.open(make_shards(tmp_path / "set", counts=(1,) * 9), "train")
    opened, opener, closed, closer = [], os.open, [], os.close
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(opener(*arguments)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda number: closed.append(number) or closer(number))
    for sample in [*range(9), 0]:
        assert shards.caption(sample) == caption(sample)
    assert len(opened) == 10
    assert closed == opened[:8]
    del shards
    assert sorted(closed) == sorted(opened)


def test_fingerprint_is_of_the_content(tmp_path: Path, folder: Path) -> None:
    same = make_shards(tmp_path / "copy")
    other = make_shards(tmp_path / "other", image=lambda sample: png(255 - pixels(sample)))
    fingerprints = [Shards.open(path, "train").fingerprint for path in (folder, same, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_no_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "no such folder" in message
    assert "mpdit data build" in message


def test_no_manifest(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "manifest.json" in message
    assert "mpdit data build" in message


def test_no_such_split(folder: Path) -> None:
    assert re.search("no split 'val'.*it has train", refusal(folder, "val"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="mpdit-shards/9"), "'mpdit-shards/9'.*'mpdit-shards/2'"),
        (lambda m: m.update(format="mpdit-shards/1"), "'mpdit-shards/1'.*build the data set again"),
        (lambda m: m.pop("format"), "format is None"),
        (lambda m: m.update(splits=[]), "splits is .* should be an object"),
        (lambda m: m["splits"]["train"].pop("shards"), "splits.train: shards is None"),
        (lambda m: m["splits"]["train"].update(samples=8), "samples is 8, .* add up to 9"),
        (lambda m: m["splits"]["train"].update(samples=0, shards=[]), "more than 0"),
        (lambda m: m["splits"].update(train=3), "shards is None"),
        (lambda m: shard_entry(m).update(samples=0) or m["splits"]["train"].update(samples=4), "has 0 samples"),
        (lambda m: shard_entry(m).update(table="../t.npy"), "table is '../t.npy', .* plain name"),
        (lambda m: shard_entry(m).update(table="a" * 300), "plain name"),
        (lambda m: shard_entry(m).update(samples=True), "samples is True, .*whole number"),
        (lambda m: shard_entry(m).update(tar="../train-00000.tar"), "plain name"),
        (lambda m: shard_entry(m).update(tar="/etc/passwd"), "plain name"),
        (lambda m: shard_entry(m).update(index=".."), "plain name"),
        (lambda m: m["tokenizer"].update(file="a/../../b"), "plain name"),
        (lambda m: m.update(classes={"a": 1}), "manifest.json: classes is {'a': 1}, .* list of distinct names"),
        (lambda m: m.update(classes=[]), "classes is \\[\\], .* list of distinct names"),
        (lambda m: m.update(classes=["a", 2]), "list of distinct names"),
        (lambda m: m.update(classes=["a", "b", "a"]), "list of distinct names"),
        (lambda m: m.update(classes=["a", ""]), "list of distinct names"),
        (lambda m: m.update(classes=["a\n", "b"]), "list of distinct names"),
        (lambda m: m.update(classes=["a"] * 9999), "…, but should be a list"),
    ],
)
def test_bad_manifest(folder: Path, change, message: str) -> None:
    edit_manifest(folder, change)
    assert re.search(message, refusal(folder))


@pytest.mark.parametrize(("given", "classes"), [(["b", "a", "é"], ("b", "a", "é")), (None, None)])
def test_classes_are_those_of_the_manifest_in_its_order(folder: Path, given, classes) -> None:
    """Sorting them, or making some up where there are none, would give the captions other numbers."""
    assert Shards.open(folder, "train").classes is None
    edit_manifest(folder, lambda m: m.update(classes=given))
    assert Shards.open(folder, "train").classes == classes


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    assert "build the data set again" in refusal(folder)


@pytest.mark.parametrize("name", ["train-00001.tar", "train-00001.idx", "train-00001.npy"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert re.search(f"{name}: .* not in the folder", refusal(folder))


def test_truncated_tar(folder: Path) -> None:
    tar = folder / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert re.search("train-00001.tar: .* cut short", refusal(folder))


def test_changed_index(folder: Path) -> None:
    index = folder / "train-00000.idx"
    index.write_text(index.read_text().replace("png 512 ", "png 513 "))
    assert re.search("train-00000.idx: .* another SHA-256", refusal(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("v1.2 5", "v1.1 5"), "not an index"),
        (lambda text: text.replace("v1.2 5", "v1.2 6"), "not an index"),
        (lambda text: "", "not an index"),
        (lambda text: text.replace("00000003.txt", "00000003.txt extra"), "not an index"),
        (lambda text: "v1.2 4\n" + "\n".join(text.splitlines()[1:5]), "lists 4 samples, .* says 5"),
        (lambda text: text.replace("png 512 ", "png 1024 "), "00000000.png .* not"),
        (lambda text: text.replace("png 512 ", "png 0 "), "00000000.png .* not"),
        (lambda text: text.replace("png 512 ", "png 512000000 "), "00000000.png .* not"),
        (lambda text: re.sub(r"png 512 \d+", "png 512 7", text), "00000000.png is 7 bytes .* not"),
        (lambda text: text.replace("00000002.", "00000009."), "00000009.png .* not"),
        (lambda text: text.replace("00000003.txt", "00000004.txt"), "00000004.png|00000003.png"),
        (lambda text: re.sub(r"(png 512 \S+ \S+)", r"\1 \1", text), "not an index"),
        (lambda text: text.replace("txt ", "tex ").replace(".txt", ".tex"), "one txt"),
    ],
)
def test_index_of_another_tar(folder: Path, change, message: str) -> None:
    rewrite_index(folder, change)
    assert re.search(f"train-00000.idx: .*({message})", refusal(folder))


def test_header_changed_under_the_index(folder: Path) -> None:
    """Only the header of the last sample's json is wrong: every header is looked at, not a few."""
    tar = folder / "train-00001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"00000008.json", b"00000008.jsom"))
    assert "00000008.json" in refusal(folder)


def test_verify_finds_a_flipped_bit(folder: Path) -> None:
    tar = folder / "train-00001.tar"
    data = bytearray(tar.read_bytes())
    Shards.open(folder, "train").verify()
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(InputError, match=r"train-00001.tar: .*SHA-256"):
        Shards.open(folder, "train").verify()


def test_tar_cut_short_while_in_use(folder: Path) -> None:
    shards = Shards.open(folder, "train")
    with (folder / "train-00000.tar").open("r+b") as tar:
        tar.truncate(600)
    with pytest.raises(BadSample, match=r"train-00000.tar: 00000000.png: sample 0: tar cut short"):
        shards.read(0)
    with pytest.raises(BadSample, match=r"train-00000.tar: sample 3: tar cut short"):  # its header is gone as well
        shards.caption(3)
    assert shards.read(5) == (png(pixels(5)), caption(5))


@pytest.mark.parametrize(("what", "reason"), [(0, "image damaged"), (1, "caption damaged")])
def test_a_flipped_bit_is_found_when_the_sample_is_read(folder: Path, what: int, reason: str) -> None:
    """Whenever it flipped: before the set was opened, or in between. The other samples can be read."""
    shards = Shards.open(folder, "train")
    offset, size = shards._spans[2].tolist()[2 * what :][:2]
    for place in (offset, offset + size - 1):
        with (folder / "train-00000.tar").open("r+b") as tar:
            tar.seek(place)
            (byte,) = tar.read(1)
            tar.seek(place)
            tar.write(bytes([byte ^ 1]))
        for opened in (shards, Shards.open(folder, "train")):
            with pytest.raises(BadSample) as caught:
                opened.read(2)
            assert (caught.value.sample, caught.value.reason) == (2, reason)
            assert caught.value.where == f"{folder / 'train-00000.tar'}: 00000002.png"
            assert [opened.read(sample)[1] for sample in (1, 3)] == [caption(1), caption(3)]
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_caption_that_is_no_text(folder: Path) -> None:
    """As an older builder may have let through: its checksum fits."""
    tar = folder / "train-00000.tar"
    tar.write_bytes(tar.read_bytes().replace("café number 3".encode(), b"caf\xff\xff number 3"))
    reseal(folder)
    with pytest.raises(BadSample, match=r"00000003.png: sample 3: caption not UTF-8"):
        Shards.open(folder, "train").read(3)


# ---- tables and the manifest's own hash ------------------------------------------------------------------------------


def test_sizes_are_those_of_the_stored_images(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "set", image=lambda n: png(np.zeros((8 + n, 30 - n, 3), np.uint8)))
    sizes = Shards.open(folder, "train").sizes
    assert sizes.dtype == np.int64
    assert sizes.tolist() == [[8 + n, 30 - n] for n in range(9)]


def test_a_changed_table_is_refused(folder: Path) -> None:
    table = folder / "train-00001.npy"
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    assert re.search("train-00001.npy: .* another SHA-256", refusal(folder))


def rows(*changes: tuple[int, int, int]) -> np.ndarray:
    """A table of five rows with (row, column, value) changed."""
    table = np.full((5, 4), 16, np.int64)
    for row, column, value in changes:
        table[row, column] = value
    return table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "not an array in NumPy's format"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8',", "not an array in NumPy's format"),
        (rows()[:4], r"holds int64 \(4, 4\), but should hold int64 \(5, 4\)"),
        (rows()[:, :3], r"holds int64 \(5, 3\)"),
        (rows().astype(np.float64), "holds float64"),
        (rows().astype(">i8"), "holds >i8"),
        (np.array([[object()] * 4] * 5), "not an array in NumPy's format"),  # pickled
        (rows((4, 0, 0)), "height or width that is not from 1 to 65536"),
        (rows((0, 1, 65537)), "height or width that is not from 1 to 65536"),
        (rows((2, 2, -1)), "checksum that is not from 0"),
        (rows((2, 3, 2**32)), "checksum that is not from 0"),
    ],
)
def test_a_table_that_is_none(folder: Path, given: bytes | np.ndarray, message: str) -> None:
    """Even where the manifest has its hash."""
    table = folder / "train-00000.npy"
    if isinstance(given, bytes):
        table.write_bytes(given)
    else:
        np.save(table, given)
    edit_manifest(folder, lambda m: shard_entry(m).update(entry(folder / "train-00000.tar", 5)))
    assert re.search(f"train-00000.npy: .*{message}", refusal(folder))


def test_a_changed_manifest_is_refused(folder: Path) -> None:
    """A class with another name, say, would be drawn for another prompt and nothing else would notice."""
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text), indent=4, ensure_ascii=False))  # the same, written otherwise
    assert len(Shards.open(folder, "train")) == 9
    manifest.write_text(text.replace("tiny", "tinz"))
    assert re.search("manifest.json: .* another SHA-256", refusal(folder))
    manifest.write_text(text.replace("manifest_sha256", "manifest_sha257"))
    assert re.search("manifest.json: manifest_sha256 is None", refusal(folder))


def test_image_types_other_than_png(folder: Path) -> None:
    tar = folder / "train-00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b".png", b".jpg"))
    rewrite_index(folder, lambda text: text.replace("png", "jpg"))
    assert Shards.open(folder, "train").read(2)[0] == png(pixels(2))


def test_unknown_manifest_keys_are_fine(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(build_hash="x", styles={"a": 1}))
    assert Shards.open(folder, "train").manifest["styles"] == json.loads('{"a": 1}')
