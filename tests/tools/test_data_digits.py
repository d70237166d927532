"""Digits out of an npm package made by hand: pixels at every size, classes, and a split that knows all of them."""

import collections
import io
import random
from pathlib import Path

import pytest
from data_sets import build, manifest, pack, samples, tree
from PIL import Image

from mpdit.data import text
from mpdit.data.shards import Shards
from mpdit_tools.data import digits, packages

EACH = 12  # pictures of a digit in the hand-made package


def values(digit: int, index: int) -> list[int]:
    """28 x 28 gray values, different for every picture, none of them black."""
    return [byte | 1 for byte in random.Random(100 * digit + index).randbytes(28 * 28)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Builds the hand-made digits through the command line; npm is not asked."""
    # Three decimals, as in the real package: the gray values are only near whole numbers.
    files = {
        f"src/digits/{digit}.json": {
            "data": [round(value / 255, 3) for index in range(EACH) for value in values(digit, index)]
        }
        for digit in range(10)
    }
    package = pack(tmp_path / "cache", "mnist", files | {"dist/mnist.js": "no JSON"})
    monkeypatch.setattr(digits, "PACKAGE", package)
    monkeypatch.setattr(packages.shutil, "which", lambda name: pytest.fail("npm was asked for"))
    return lambda out, *arguments: build("digits", "--out", out, "--cache", tmp_path / "cache", *arguments)


def all_samples(out: Path) -> list[dict]:
    return samples(out, "train") + samples(out, "val")


def pictures(out: Path) -> dict[tuple[int, int], Image.Image]:
    """By (digit, index)."""
    found = {(s["json"]["digit"], s["json"]["index"]): Image.open(io.BytesIO(s["png"])) for s in all_samples(out)}
    assert len(found) == len(all_samples(out))
    return found


def held_out(out: Path) -> set[tuple[int, int]]:
    return {(sample["json"]["digit"], sample["json"]["index"]) for sample in samples(out, "val")}


def test_the_package_is_pinned():
    """By version and the whole hash: another tarball is refused."""
    assert (digits.PACKAGE.name, digits.PACKAGE.version) == ("mnist", "1.1.0")
    assert digits.PACKAGE.sha256.startswith("3fb5bb119c556ae7")
    assert len(digits.PACKAGE.sha256) == 64


def test_every_digit_gets_the_name_of_its_class(tmp_path, run):
    """Captions, numbers and pixels belong together, and the manifest has the classes in the digits' order."""
    out = tmp_path / "out"
    assert run(out, "--size", 32) == 0
    assert manifest(out)["classes"] == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert manifest(out)["licences"] == {"MIT": 10 * EACH}
    assert manifest(out)["dropped"] == {}
    for sample in all_samples(out):
        digit, index = sample["json"]["digit"], sample["json"]["index"]
        assert sample["json"] == {"digit": digit, "index": index, "license": "MIT"}
        assert sample["txt"] == manifest(out)["classes"][digit]
    assert set(pictures(out)) == {(digit, index) for digit in range(10) for index in range(EACH)}
    read = Shards.open(out, "train")
    labels = text.of_data_set("labels", read)
    assert labels.vocab_size == 11
    ids = labels.encode([read.caption(sample) for sample in range(len(read))], 1)
    assert ids[:, 0].tolist() == [sample["json"]["digit"] for sample in samples(out, "train")]


def test_at_32_the_pixels_are_the_package_s_with_a_black_edge(tmp_path, run):
    """Gray, one channel, nothing resampled: every value is the one that was written."""
    assert run(tmp_path / "out", "--size", 32) == 0
    for (digit, index), image in pictures(tmp_path / "out").items():
        assert (image.mode, image.size) == ("L", (32, 32))
        assert list(image.crop((2, 2, 30, 30)).tobytes()) == values(digit, index)
        image.paste(0, (2, 2, 30, 30))
        assert image.getextrema() == (0, 0)


def test_at_24_the_pixels_are_the_package_s_without_the_edge(tmp_path, run):
    """The middle, not a corner, and still nothing resampled."""
    assert run(tmp_path / "out", "--size", 24) == 0
    for (digit, index), image in pictures(tmp_path / "out").items():
        assert (image.mode, image.size) == ("L", (24, 24))
        rows = [values(digit, index)[28 * row + 2 : 28 * row + 26] for row in range(2, 26)]
        assert list(image.tobytes()) == [value for row in rows for value in row]


@pytest.mark.parametrize(("size", "edge"), [(8, 2), (16, 2), (23, 2), (25, -2), (28, -2), (33, -2), (64, -2)])
def test_other_sizes_are_resampled_from_the_one_or_the_other(size, edge):
    """Small pictures from the middle, so that a digit fills them; large ones from the whole."""
    image = Image.frombytes("L", (28, 28), bytes(values(3, 1)))
    wanted = image.crop((edge, edge, 28 - edge, 28 - edge)).resize((size, size), Image.Resampling.LANCZOS)
    assert digits.resample(image, size).tobytes() == wanted.tobytes()


def test_a_share_of_the_pictures_is_held_out_of_every_class(tmp_path, run):
    """Whatever the share, training and validation know all ten classes, and no picture is in both."""
    for val in (0.01, 0.3, 0.99):
        out = tmp_path / f"out{val}"
        assert run(out, "--val", val) == 0
        for split in ("train", "val"):
            assert len({sample["txt"] for sample in samples(out, split)}) == 10
        assert not {s["png"] for s in samples(out, "train")} & {s["png"] for s in samples(out, "val")}
    assert len(held_out(tmp_path / "out0.01")) == 10
    assert 20 < len(held_out(tmp_path / "out0.3")) < 60


def test_the_pictures_held_out_are_the_same_at_any_size_and_seed(tmp_path, run):
    """Or a model would be validated on pictures that a smaller one was trained on; a larger share adds to them."""
    given = {"a": ("--val", 0.2), "b": ("--val", 0.2, "--size", 12), "c": ("--val", 0.2, "--seed", 5)}
    for name, arguments in (given | {"d": ("--val", 0.5)}).items():
        assert run(tmp_path / name, *arguments) == 0
    sets = {name: held_out(tmp_path / name) for name in "abcd"}
    assert sets["a"] == sets["b"] == sets["c"] < sets["d"]


def test_the_seed_orders_and_the_rest_is_the_same_bytes(tmp_path, run):
    """Digits come mixed, not class after class, and the same arguments give the same files."""
    assert run(tmp_path / "a") == 0
    assert run(tmp_path / "b", "--workers", 2) == 0
    assert run(tmp_path / "c", "--seed", 1) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    a, c = ([sample["txt"] for sample in samples(tmp_path / name, "train")] for name in "ac")
    assert a != c
    assert collections.Counter(a) == collections.Counter(c)
    assert len(set(a[:20])) > 5


@pytest.mark.slow
def test_real_digits(tmp_path):
    """The real package: ten thousand pictures, none of them twice, a twentieth of every class held out."""
    assert build("digits", "--out", tmp_path / "real", "--workers", 2) == 0
    told = manifest(tmp_path / "real")
    assert {name: split["samples"] for name, split in told["splits"].items()} == {"train": 9482, "val": 518}
    assert told["dropped"] == {}
    assert min(collections.Counter(sample["txt"] for sample in samples(tmp_path / "real", "val")).values()) > 30
