"""A folder whose captions are names of classes: the manifest's list of them, and a split that knows them all."""

import json
from pathlib import Path

import pytest
from data_sets import build, dropped, manifest, picture, samples, write_tar

from mpdit.data import text
from mpdit.data.shards import Shards
from mpdit_tools.data import folder as folder_module


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """So many pictures of each class, with the class's name in a .txt beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(name for name, count in counts.items() for _ in range(count)):
        (folder / f"{number:03d}.png").write_bytes(picture(number))
        (folder / f"{number:03d}.txt").write_text(f" {name}\n")
    return folder


def names(out: Path, split: str) -> list[str]:
    return [sample["txt"] for sample in samples(out, split)]


def test_the_different_captions_are_the_classes_sorted(tmp_path):
    """The order is that of the ids, so it must not depend on the order of files or samples."""
    source, out = write_classes(tmp_path / "mine", {"dog": 5, "cat": 4, "Überbär": 3, "cat 2": 2}), tmp_path / "out"
    assert build("folder", source, "--out", out, "--classes") == 0
    assert manifest(out)["classes"] == ["cat", "cat 2", "dog", "Überbär"]
    read = Shards.open(out, "train")
    labels = text.of_data_set("labels", read)
    ids = labels.encode([read.caption(sample) for sample in range(len(read))], 1)
    assert [read.classes[number] for number in ids[:, 0]] == names(out, "train")
    assert text.of_data_set("sentencepiece", read).vocab_size > 4


def test_without_the_flag_captions_are_free_text(tmp_path):
    """And the flag makes another build: a folder built without it is not taken for one with classes."""
    source, out = write_classes(tmp_path / "mine", {"dog": 5, "cat": 5}), tmp_path / "out"
    assert build("folder", source, "--out", out) == 0
    assert "classes" not in manifest(out)
    assert set(names(out, "train")).isdisjoint(names(out, "val"))
    assert build("folder", source, "--out", out, "--classes") == 2
    assert build("folder", source, "--out", out, "--classes", "--overwrite") == 0
    assert manifest(out)["classes"] == ["cat", "dog"]


@pytest.mark.parametrize("val", [0.001, 0.3, 0.999])
def test_every_class_is_in_both_splits(tmp_path, val):
    """Holding out whole captions, as for free text, would leave classes that are never trained or validated."""
    source, out = write_classes(tmp_path / "mine", {"dog": 20, "cat": 2, "owl": 40, "alone": 1}), tmp_path / "out"
    assert build("folder", source, "--out", out, "--classes", "--val", val) == 0
    assert set(names(out, "train")) == {"dog", "cat", "owl", "alone"}
    assert set(names(out, "val")) == {"dog", "cat", "owl"}
    assert not {sample["png"] for sample in samples(out, "train")} & {sample["png"] for sample in samples(out, "val")}


def test_a_class_whose_pictures_are_all_dropped_is_none(tmp_path):
    """It would have a number that nothing is trained for."""
    source, out = write_classes(tmp_path / "mine", {"dog": 5, "cat": 5}), tmp_path / "out"
    (source / "bad.png").write_bytes(b"")
    (source / "bad.txt").write_text("fish")
    assert build("folder", source, "--out", out, "--classes") == 0
    assert dropped(out) == {"bad.png": "empty file"}
    assert manifest(out)["classes"] == ["cat", "dog"]


def test_classes_out_of_tars_and_lists(tmp_path):
    """The other two ways to give captions."""
    source = tmp_path / "mine"
    source.mkdir()
    members = [
        (f"{number}.{kind}", data)
        for number in range(12)
        for kind, data in (("png", picture(number)), ("txt", b"ab"[number % 2 : number % 2 + 1]))
    ]
    write_tar(source / "a.tar", members)
    (source / "one.png").write_bytes(picture(20))
    (source / "two.png").write_bytes(picture(21))
    lines = [json.dumps({"file": f"{name}.png", "text": "c"}) for name in ("one", "two")]
    (source / "captions.jsonl").write_text("\n".join(lines))
    assert build("folder", source, "--out", tmp_path / "out", "--classes") == 0
    assert manifest(tmp_path / "out")["classes"] == ["a", "b", "c"]
    for split in ("train", "val"):
        assert set(names(tmp_path / "out", split)) == {"a", "b", "c"}


def test_the_table_tells_the_number_of_classes(tmp_path, capsys):
    """So that a folder of free text built with --classes is seen for what it is."""
    source = write_classes(tmp_path / "mine", {"dog": 5, "cat": 5})
    assert build("folder", source, "--out", tmp_path / "out", "--classes") == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "classes" in line)
    assert row.split()[-2] == "2"
    assert build("folder", source, "--out", tmp_path / "out", "--classes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        (
            {"dog": 2, "cat": 2, "owl": 2, "eel": 2},
            "--classes: mine has 4 different captions, but 3 classes are the most",
        ),
        ({"dog": 1, "cat": 1}, "none of the 2 classes has two pictures"),
    ],
)
def test_captions_that_are_no_classes_get_a_sentence(tmp_path, monkeypatch, capsys, counts, told):
    """Free text under --classes, and classes of one picture each: nothing is left behind."""
    assert folder_module.CLASSES == 10_000
    monkeypatch.setattr(folder_module, "CLASSES", 3)
    source = write_classes(tmp_path / "mine", counts)
    assert build("folder", source, "--out", tmp_path / "out", "--classes") == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
