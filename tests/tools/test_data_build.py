"""Building a user's folder: what comes out, what is dropped, and that nothing is ever half there."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from data_sets import build, dropped, manifest, picture, samples, tree, write_folder, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mpdit.data.shards import Shards
from mpdit_tools.data.images import Shape, render
from mpdit_tools.data.tokenizer import train_tokenizer


def test_every_picture_comes_out_with_its_caption(tmp_path):
    source, out = write_folder(tmp_path / "mine", 12), tmp_path / "out"
    assert build("folder", source, "--out", out) == 0
    train, val = samples(out, "train"), samples(out, "val")
    assert len(val) >= 1
    assert len(train) + len(val) == 12
    for sample in train + val:
        number = int(sample["txt"].split()[-1])
        assert sample["json"] == {"file": f"{number:03d}.png", "width": 20, "height": 20}
        wanted = render(picture(number), Shape(size=16)).png
        assert sample["png"] == wanted
        assert Image.open(io.BytesIO(sample["png"])).size == (16, 16)


def test_the_manifest_has_the_documented_keys(tmp_path):
    source, out = write_folder(tmp_path / "mine", 12), tmp_path / "out"
    assert build("folder", source, "--out", out, "--per-shard", 5) == 0
    told = manifest(out)
    assert list(told) == [
        *("format", "name", "size", "aspect", "splits", "tokenizer", "sources"),
        *("licences", "styles", "dropped", "build", "build_hash", "manifest_sha256"),
    ]
    assert told["format"] == "mpdit-shards/2"
    assert told["size"] == 16
    assert told["aspect"] == "square"
    files = tree(out)
    for split in told["splits"].values():
        assert split["samples"] == sum(shard["samples"] for shard in split["shards"])
        assert all(shard["samples"] == 5 for shard in split["shards"][:-1])
        for shard in split["shards"]:
            assert files.pop(shard["tar"]) == shard["sha256"]
            assert files.pop(shard["index"]) == shard["index_sha256"]
            assert files.pop(shard["table"]) == shard["table_sha256"]
    assert files.pop("tokenizer.model") == told["tokenizer"]["sha256"]
    assert set(files) == {"manifest.json"}
    (entry,) = told["sources"]
    assert entry | {"sha256": ""} == {"name": "mine", "version": "", "sha256": "", "licence": "unknown", "images": 12}
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_pictures_in_their_own_shapes(tmp_path, capsys):
    """What is stored, what the table says of it and what is counted are the same."""
    source, out = tmp_path / "mine", tmp_path / "out"
    source.mkdir()
    shapes = {"tall": (20, 60), "wide": (64, 30), "square": (48, 48), "small": (9, 12), "banner": (200, 20)}
    for number, (name, size) in enumerate(shapes.items()):
        (source / f"{name}.png").write_bytes(picture(number, size=size))
        (source / f"{name}.txt").write_text(f"a {name} picture")
    (source / "thread.png").write_bytes(picture(9, size=(30, 3)))
    (source / "thread.txt").write_text("shorter on one side than a quarter of 16")
    assert build("folder", source, "--out", out, "--aspect", "keep", "--val", 0.3) == 0
    assert dropped(out) == {"thread.png": "too small"}
    stored = {}
    for split in ("train", "val"):
        read = Shards.open(out, split)
        for number in range(len(read)):
            image, caption = read.read(number)
            assert read.sizes[number].tolist() == [*Image.open(io.BytesIO(image)).size[::-1]]
            stored[caption.split()[1]] = tuple(read.sizes[number].tolist())
    assert stored == {"tall": (28, 9), "wide": (11, 23), "square": (16, 16), "small": (12, 9), "banner": (8, 32)}
    told = manifest(out)
    assert (told["aspect"], told["cut"]) == ("keep", 1)
    assert {name: count for name, count in told["aspects"].items() if count} == {
        "below 0.35": 1,
        "0.7 to 0.9": 1,
        "0.9 to 1.1": 1,
        "2 to 2.9": 1,
        "2.9 and more": 1,
    }
    shown = capsys.readouterr().out
    assert re.search(r"width / height\W+below 0.35\W+1", shown)
    assert re.search(r"cut\W+to 4:1\W+1", shown)
    assert build("folder", source, "--out", out) == 2  # squares would be another set


def test_the_tokenizer_has_seen_training_captions_only(tmp_path):
    source, out = write_folder(tmp_path / "mine", 30), tmp_path / "out"
    assert build("folder", source, "--out", out, "--val", 0.3) == 0
    captions = [sample["txt"] for sample in samples(out, "train")]
    model, size = train_tokenizer(captions, vocab_size=2048)
    assert (out / "tokenizer.model").read_bytes() == model
    assert manifest(out)["tokenizer"]["vocab_size"] == size


def test_rebuilding_gives_the_same_bytes(tmp_path):
    first, second = tmp_path / "a", tmp_path / "elsewhere" / "b"
    source = write_folder(tmp_path / "mine", 40)
    (source / "bad.png").write_bytes(b"no picture")
    (source / "bad.txt").write_text("bad")
    assert build("folder", source, "--out", first) == 0
    assert build("folder", source, "--out", second, "--workers", 2) == 0
    assert tree(first) == tree(second)


def test_a_second_build_of_the_same_does_nothing_and_says_so(tmp_path, capsys):
    source, out = write_folder(tmp_path / "mine", 6), tmp_path / "out"
    assert build("folder", source, "--out", out) == 0
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    capsys.readouterr()
    assert build("folder", source, "--out", out) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == before
    assert build("folder", source, "--out", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["built"] is False
    assert sum(told["samples"].values()) == 6


@pytest.mark.parametrize("name", ["train-00000.tar", "train-00000.idx", "val-00000.npy", "tokenizer.model"])
def test_a_damaged_build_is_built_again(tmp_path, name):
    source, out = write_folder(tmp_path / "mine", 6), tmp_path / "out"
    assert build("folder", source, "--out", out) == 0
    good = tree(out)
    (out / name).write_bytes((out / name).read_bytes()[:-1])
    assert build("folder", source, "--out", out) == 0
    assert tree(out) == good


def test_another_build_is_not_replaced_unless_told(tmp_path, capsys):
    source, out = write_folder(tmp_path / "mine", 6), tmp_path / "out"
    assert build("folder", source, "--out", out) == 0
    good = tree(out)
    write_folder(source, 1, first=6)
    assert build("folder", source, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert tree(out) == good
    assert build("folder", source, "--out", out, "--overwrite") == 0
    assert len(samples(out, "train") + samples(out, "val")) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path, capsys):
    source, out = write_folder(tmp_path / "mine", 6), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert build("folder", source, "--out", out, "--overwrite") == 2
    assert "other files" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("out", ["mine", "mine/shards", "."])
def test_out_within_or_around_the_input_is_refused(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "mine", 6)
    assert build("folder", "mine", "--out", out) == 2
    assert "outside" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def nasty_folder(folder: Path) -> dict[str, str]:
    """Files that cannot be used, with the reason to expect."""
    png = picture(1000, size=(40, 40))
    jpeg = picture(1001, size=(64, 64), format="JPEG")
    bomb, large = io.BytesIO(), io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    Image.new("1", (8_001, 8_000)).save(large, "PNG")
    bad = {
        "empty.png": (b"", "empty file"),
        "text.png": (b"<html>404</html>", "not an image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated or damaged"),
        "cut.png": (png[: len(png) // 2], "truncated or damaged"),
        "header.png": (png[:20], "truncated or damaged"),
        "bomb.png": (bomb.getvalue(), "too many pixels"),
        "large.png": (large.getvalue(), "too many pixels"),
        "small.png": (picture(1002, size=(40, 7)), "too small"),
        "wide.tiff": (picture(1003, format="TIFF", mode="F"), "pixels wider than 16 bits"),
        "vector.svg": (b"<svg/>", "not an image"),
    }
    reasons = {}
    for number, (name, (data, reason)) in enumerate(bad.items()):
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"caption of bad picture {number}")
        reasons[name] = reason
    for name, caption, reason in (
        ("latin.png", "caf\xe9".encode("latin-1"), "caption not UTF-8"),
        ("blank.png", b" \n\t\x00 ", "empty caption"),
        ("novel.png", b"word " * 20_000, "caption too long"),
        ("alone.png", None, "no caption"),
    ):
        (folder / name).write_bytes(png)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)
        reasons[name] = reason
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "gone.txt").write_text("a picture that was moved")
    (folder / "lonely.txt").write_text("a caption without its picture")
    (folder / "old.tar.gz").write_bytes(b"\x1f\x8b")
    # The name on the disk is not UTF-8.
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(png)
    return reasons | {
        "gone.png": "cannot be read",
        "lonely.txt": "caption without a picture",
        "old.tar.gz": "compressed tar",
        "caf\\xe9.png": "no caption",
    }


def test_what_cannot_be_used_is_dropped_counted_and_listed(tmp_path):
    source, out = write_folder(tmp_path / "mine", 30), tmp_path / "out"
    reasons = nasty_folder(source)
    os.mkfifo(source / "pipe.png")
    (source / ".hidden.png").write_bytes(b"")
    (source / "copy.png").write_bytes(picture(3))
    (source / "copy.txt").write_text("picture number 3")
    (source / "twin.png").write_bytes(picture(4))
    (source / "twin.txt").write_text("the same picture in other words")
    assert build("folder", source, "--out", out) == 0
    found = dropped(out)
    duplicates = [name for name, reason in found.items() if reason == "duplicate"]
    assert duplicates in (["copy.png"], ["003.png"])
    assert {name: reason for name, reason in found.items() if reason != "duplicate"} == reasons
    told = manifest(out)
    assert sum(told["dropped"].values()) == len(reasons) + 1
    assert sum(split["samples"] for split in told["splits"].values()) == 31
    # One picture under two captions is not torn apart.
    halves = [{sample["txt"] for sample in samples(out, split)} for split in ("train", "val")]
    pair = {"picture number 4", "the same picture in other words"}
    assert any(pair <= half for half in halves)


def test_too_many_dropped_is_an_error_that_tells_the_reasons(tmp_path, capsys):
    source, out = write_folder(tmp_path / "mine", 2), tmp_path / "out"
    for number in range(3):
        (source / f"bad{number}.png").write_bytes(b"")
        (source / f"bad{number}.txt").write_text(f"bad {number}")
    assert build("folder", source, "--out", out) == 2
    error = capsys.readouterr().err
    assert "3 of 5" in error
    assert "3 empty file" in error
    assert not out.exists()
    assert build("folder", source, "--out", out, "--max-dropped", 0.7) == 0
    for name in ("000", "001"):
        (source / f"{name}.png").write_bytes(b"")
    assert build("folder", source, "--out", tmp_path / "none", "--max-dropped", 1) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing"], "no such folder"),
        (["empty"], "no files"),
        (["notes"], "no pictures"),
        (["mine", "--size", "4"], "--size"),
        (["mine", "--val", "0"], "--val"),
        (["mine", "--vocab-size", "100"], "--vocab-size"),
        (["same"], "two different captions"),
        (["mine", "--out", "mine/000.png/x"], "--out"),
        (["mine", "--out", "file"], "in the way"),
    ],
)
def test_bad_input_gets_a_sentence(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "mine", 3)
    write_folder(tmp_path / "same", 2)
    for number in range(2):
        (tmp_path / "same" / f"00{number}.txt").write_text("one caption")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "data.json").write_text("{}")
    (tmp_path / "file").write_text("")
    before = tree(tmp_path)
    extra = [] if "--out" in arguments else ["--out", "out"]
    assert build("folder", *arguments, *extra) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mpdit: ")
    assert told in error
    assert tree(tmp_path) == before
    assert not list(tmp_path.glob("*.partial-*"))


def test_captions_out_of_a_list(tmp_path):
    source, out = tmp_path / "mine", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    for number in range(6):
        (source / "sub" / f"{number}.jpg").write_bytes(picture(number, format="JPEG"))
    (source / "beside.png").write_bytes(picture(10))
    (source / "beside.txt").write_text("from beside")
    (source / "none.png").write_bytes(picture(11))
    lines = [json.dumps({"file": f"sub/{number}.jpg", "text": f"listed {number}"}).encode() for number in range(6)]
    lines += [
        json.dumps({"file": "sub/0.jpg", "text": "listed 0 again"}).encode(),
        b"{broken",
        b'{"file": "sub/1.jpg"}',
        b'["sub/1.jpg", "text"]',
        b'{"file": "../secret.png", "text": "out"}',
        b'{"file": "/etc/secret.png", "text": "out"}',
        b'{"file": "missing.png", "text": "gone"}',
        b'{"file": "sub/1.jpg", "text": "\\ud800"}',
        b'{"file": "sub/1.jpg", "text": "\xff"}',
        b"",
    ]
    (source / "captions.jsonl").write_bytes(b"\n".join(lines))
    assert build("folder", source, "--out", out, "--max-dropped", 0.6) == 0
    found = {sample["txt"] for sample in samples(out, "train") + samples(out, "val")}
    assert found == {*(f"listed {number}" for number in range(6)), "listed 0 again", "from beside"}
    assert manifest(out)["dropped"] == {
        "bad line in captions.jsonl": 3,
        "caption not UTF-8": 2,
        "no caption": 1,
        "no such file": 1,
        "path outside the folder": 2,
    }


def test_captions_and_pictures_out_of_tars(tmp_path):
    source, out = tmp_path / "mine", tmp_path / "out"
    source.mkdir()
    members = []
    for number in range(8):
        members += [
            (f"d/{number:04d}.jpg", picture(number, format="JPEG")),
            (f"d/{number:04d}.txt", f"from a tar {number}".encode()),
            (f"d/{number:04d}.json", json.dumps({"author": number}).encode()),
        ]
    members += [
        ("../evil.png", picture(20)),
        ("../evil.txt", b"evil"),
        ("/abs/evil.png", picture(21)),
        ("nocap.png", picture(22)),
        ("two.png", picture(23)),
        ("two.jpg", picture(24, format="JPEG")),
        ("two.txt", b"two pictures"),
        ("words.txt", b"only words"),
        ("badjson.png", picture(25)),
        ("badjson.txt", b"bad json"),
        ("badjson.json", b"{"),
    ]
    path = write_tar(source / "a.tar", members)
    # A damaged header in the middle of an archive: tarfile alone would take it for the end.
    pairs = [
        (f"{number}.{kind}", data) for number in "45" for kind, data in (("png", picture(int(number))), ("txt", b"b"))
    ]
    data = bytearray(write_tar(source / "b.tar", pairs).read_bytes())
    size = data.index(b"5.png") + 124
    data[size : size + 6] = b"zzzzzz"
    (source / "b.tar").write_bytes(data)
    (source / "c.tar").write_bytes(path.read_bytes()[: 512 + 100])
    assert build("folder", source, "--out", out, "--max-dropped", 0.6) == 0
    found = {sample["txt"]: sample["json"] for sample in samples(out, "train") + samples(out, "val")}
    assert set(found) == {*(f"from a tar {number}" for number in range(8)), "two pictures", "b"}
    assert found["from a tar 3"] == {"file": "a.tar:d/0003", "width": 20, "height": 20, "json": {"author": 3}}
    assert dropped(out) == {
        "a.tar:../evil.png": "unsafe path in a tar",
        "a.tar:../evil.txt": "unsafe path in a tar",
        "a.tar:/abs/evil.png": "unsafe path in a tar",
        "a.tar:nocap": "no caption",
        "a.tar:two.jpg": "second picture of a sample",
        "a.tar:words": "no picture",
        "a.tar:badjson": "bad JSON",
        "b.tar": "damaged tar",
        "c.tar": "damaged tar",
        "c.tar:d/0000": "no caption",
    }
    assert not list(tmp_path.rglob("evil*"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=25), val=st.floats(0.01, 0.9))
def test_no_caption_is_in_both_splits(tmp_path_factory, captions, val):
    folder = tmp_path_factory.mktemp("set")
    for number, caption in enumerate(captions):
        (folder / f"{number}.png").write_bytes(picture(number % 9))
        (folder / f"{number}.txt").write_text(caption)
    out = folder.with_name(f"{folder.name}-out")
    code = build("folder", folder, "--out", out, "--val", val)
    if code != 0:
        assert code == 2
        return
    train, val_samples = samples(out, "train"), samples(out, "val")
    assert train
    assert val_samples
    for key in ("txt", "png"):
        assert not {sample[key] for sample in train} & {sample[key] for sample in val_samples}
