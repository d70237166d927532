"""Damaged pictures, tars, captions, data sets, caches, tokenizers, configs: refused with a reason, or the same content.

No crash, no hang, no bomb, and nothing that a checksum covers is taken in silence. The long version is 10,000 mutants:
``python -m pytest tests/reliability/test_mutations_build.py -m slow -s`` prints them by kind and outcome.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data import test_cache
from data.make_shards import edit_manifest, make_shards, pixels, png, write_shard
from mpdit import config
from mpdit.data.cache import Cache
from mpdit.data.shards import BadSample, Shards
from mpdit.data.text import SentencePiece
from mpdit.errors import InputError
from mpdit_tools.data.captions import clean_caption, read_list
from mpdit_tools.data.images import Shape, Unusable, render
from mpdit_tools.data.samples import Drop
from mpdit_tools.data.tars import tar_jobs
from mpdit_tools.data.tokenizer import train_tokenizer
from reliability.mutations import OTHER, REFUSED, Kind, attack

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPE = Shape(size=16, aspect="keep")


# ---- what a builder is given: no checksum covers it ------------------------------------------------------------------


def picture(kind: str) -> Kind:
    def good(_: Path) -> bytes:
        data = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        extra = {} if kind in ("GIF", "PPM", "BMP") else {"exif": exif}
        Image.fromarray(pixels(1, 40)).resize((60, 40)).save(data, kind, **extra)
        return data.getvalue()

    return Kind(good=good, read=lambda _, data: render(data, SHAPE), refusals=(Unusable,), covered=False)


def _in_file(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    def written(folder: Path, data: bytes) -> Any:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return written


def good_tar(folder: Path) -> bytes:
    write_shard(folder / "good.tar", 0, 4, lambda sample: png(pixels(sample)))
    return (folder / "good.tar").read_bytes()


class Told(Exception):
    """A Drop is among the results: what is lost is told, and the rest is used."""


def told(results: list[Any]) -> list[Any]:
    if any(isinstance(result, Drop) for result in results):
        raise Told
    return results


def read_tar(path: Path) -> list[Any]:
    return told([job.render() for job in tar_jobs(path, "x.tar", source="", shape=SHAPE)])


LISTED = [{"file": f"é{number}.png", "text": f"a café\u2028 {number}"} for number in range(3)]
CAPTIONS = "\n".join(json.dumps(entry, ensure_ascii=number == 1) for number, entry in enumerate(LISTED))


# ---- a data set that is built: everything is covered -----------------------------------------------------------------


def good_set(folder: Path, name: str) -> bytes:
    return (make_shards(folder, counts=(3, 2)) / name).read_bytes()


def read_set(path: Path) -> list[object]:
    shards = Shards.open(path.parent, "train")
    return [shards.fingerprint, shards.classes, shards.sizes.tolist(), *(shards.read(n) for n in range(len(shards)))]


def of_set(name: str) -> Kind:
    return Kind(
        good=functools.partial(good_set, name=name), read=_in_file(name, read_set), refusals=(InputError, BadSample)
    )


def resealed(name: str, key: str) -> Kind:
    """As a builder with a mistake, or somebody who means harm, would leave it: the manifest has the mutant's hash."""

    def read(path: Path) -> list[object]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edit_manifest(path.parent, lambda m: m["splits"]["train"]["shards"][0].update({key: digest}))
        return read_set(path)

    return dataclasses.replace(of_set(name), read=_in_file(name, read), covered=False)


def manifest_resealed(folder: Path, data: bytes) -> list[object]:
    """The manifest's own hash fits whatever is left of it."""
    (folder / "manifest.json").write_bytes(data)
    with contextlib.suppress(ValueError, AttributeError, TypeError):  # no JSON object: it can't be made to look whole
        edit_manifest(folder, lambda manifest: None)
    return read_set(folder / "manifest.json")


# ---- what is opened beside it ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def tokenizer() -> bytes:
    return train_tokenizer([f"a {colour} square {n}" for colour in ("red", "blue") for n in range(9)], vocab_size=300)[
        0
    ]


def read_tokenizer(path: Path) -> list[list[int]]:
    opened = SentencePiece.open(path, hashlib.sha256(tokenizer()).hexdigest())
    return opened.encode(["a red square", "Überraschung"], 12).tolist()


def example(name: str) -> Kind:
    return Kind(
        good=lambda _: (EXAMPLES / name).read_bytes(),
        read=_in_file("config.yaml", config.load),
        refusals=(InputError,),
        covered=False,
    )


# ---- a cache of what models make of it: everything is covered --------------------------------------------------------


def of_cache(name: str) -> Kind:
    def good(folder: Path) -> bytes:
        return (test_cache.write(folder, test_cache.ROWS, 2) / name).read_bytes()

    def read(folder: Path, data: bytes) -> object:
        (test_cache.WANTED.folder(folder) / name).write_bytes(data)
        opened = Cache.open(folder, test_cache.WANTED)
        rows = [opened.row(number) for number in range(len(test_cache.ROWS))]
        return [(numbers.tolist(), dimensions) for numbers, dimensions in rows], opened.facts

    return Kind(good=good, read=read, refusals=(InputError,))


KINDS: dict[str, Kind] = {
    **{f"{kind} picture": picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")},
    "tar given to the builder": Kind(good=good_tar, read=_in_file("x.tar", read_tar), refusals=(Told,), covered=False),
    "caption": Kind(
        good=lambda _: "a café\r\n\0with 牛乳 🥛 ".encode() * 3,
        read=lambda _, data: clean_caption(data),
        refusals=(Unusable,),
        covered=False,
    ),
    "captions.jsonl": Kind(
        good=lambda _: CAPTIONS.encode(),
        read=_in_file("captions.jsonl", lambda path: told([*read_list(path)])),
        refusals=(Told,),
        covered=False,
    ),
    "tar of a set": of_set("train-00000.tar"),
    "index": of_set("train-00000.idx"),
    "table": of_set("train-00001.npy"),
    "manifest": of_set("manifest.json"),
    "index, hashed anew": resealed("train-00000.idx", "index_sha256"),
    "table, hashed anew": resealed("train-00000.npy", "table_sha256"),
    "manifest, hashed anew": dataclasses.replace(of_set("manifest.json"), read=manifest_resealed, covered=False),
    "tokenizer": Kind(
        good=lambda _: tokenizer(), read=_in_file("tokenizer.model", read_tokenizer), refusals=(InputError,)
    ),
    "cache, numbers": of_cache("000000.npy"),
    "cache, rows": of_cache("000001.rows.npy"),
    "cache, manifest": of_cache("manifest.json"),
    "config, chain": example("chain/target.yaml"),
    "config, 18B": example("chain/target-18b.yaml"),
}


def check(counts: dict[str, Any], each: int) -> None:
    for name, row in counts.items():
        assert row.total() == each
        if KINDS[name].covered:
            assert row[OTHER] == 0
            assert row[REFUSED] > 0
    # A mutation of what nothing covers is often seen all the same, or the refusals above say nothing.
    assert counts["PNG picture"][REFUSED] > each / 4
    assert counts["index, hashed anew"][REFUSED] > each / 2


def test_some_hundreds_of_mutants(tmp_path: Path) -> None:
    check(attack(KINDS, tmp_path, range(50)), 50)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy multiplies a mutant's shape
def test_ten_thousand_mutants(tmp_path: Path) -> None:
    each = -(-10_000 // len(KINDS))
    check(attack(KINDS, tmp_path, range(50, 50 + each)), each)
