"""A small data set in the builder's format, for tests: seeded noise pictures with captions."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mpdit.data.shards import FORMAT, manifest_sha256


def pixels(sample: int, size: int = 16) -> np.ndarray:
    """uint8 (H, W, 3): the picture of a sample, told apart from any other's."""
    return np.random.default_rng(sample).integers(0, 256, (size, size, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def caption(sample: int) -> str:
    return f"café number {sample}"


def write_shard(path: Path, first: int, samples: int, image: Callable[[int], bytes]) -> None:
    """`path` and, with other suffixes, its index and its table."""
    lines, offset, table = [f"v1.2 {samples}"], 0, []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in range(first, first + samples):
            members = {"png": image(sample), "txt": f"{caption(sample)}\n".encode(), "json": b'{"a": 1}'}
            words = []
            table.append([*height_width(members["png"]), zlib.crc32(members["png"]), zlib.crc32(members["txt"])])
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{sample:08d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                words.append(f"{ext} {offset + 512} {len(data)} {info.name}")
                offset += 512 + -(-len(data) // 512) * 512
            lines.append(" ".join(words))
    path.with_suffix(".idx").write_text("\n".join(lines) + "\n")
    np.save(path.with_suffix(".npy"), np.array(table, np.int64))


def height_width(image: bytes) -> tuple[int, int]:
    """Of the picture, or of the others where it is none."""
    try:
        return Image.open(io.BytesIO(image)).size[::-1]
    except OSError:
        return 16, 16


def entry(tar: Path, samples: int) -> dict:
    """A shard as the manifest has it."""
    index, table = tar.with_suffix(".idx"), tar.with_suffix(".npy")
    return {
        "tar": tar.name,
        "index": index.name,
        "table": table.name,
        "samples": samples,
        "bytes": tar.stat().st_size,
        "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
        "table_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
    }


def make_shards(
    folder: Path, counts: tuple[int, ...] = (5, 4), image: Callable[[int], bytes] = lambda sample: png(pixels(sample))
) -> Path:
    """A data set with a train split of `counts` samples a shard, numbered on from shard to shard."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for number, count in enumerate(counts):
        tar = folder / f"train-{number:05d}.tar"
        write_shard(tar, first, count, image)
        shards.append(entry(tar, count))
        first += count
    manifest = {
        "format": FORMAT,
        "name": "tiny",
        "size": 16,
        "splits": {"train": {"samples": first, "shards": shards}},
        "tokenizer": {"file": "tokenizer.model", "sha256": "0" * 64, "vocab_size": 300},
    }
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: dict) -> None:
    """With the hash of what is in it, as a builder with a mistake would."""
    (folder / "manifest.json").write_text(json.dumps({**manifest, "manifest_sha256": manifest_sha256(manifest)}))


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder, manifest)


def reseal(folder: Path) -> None:
    """Make the checksums of tables and manifest fit tars that a test has changed, as if they had been built so."""

    def change(manifest: dict) -> None:
        for split in manifest["splits"].values():
            for number, shard in enumerate(split["shards"]):
                tar, table = folder / shard["tar"], np.load(folder / shard["table"])
                data = tar.read_bytes()
                for row, line in enumerate((folder / shard["index"]).read_text().splitlines()[1:]):
                    words = line.split()
                    for column, at in ((2, 0), (3, words.index("txt"))):
                        offset, size = map(int, words[at + 1 : at + 3])
                        table[row, column] = zlib.crc32(data[offset : offset + size])
                np.save(folder / shard["table"], table)
                split["shards"][number] = entry(tar, shard["samples"])

    edit_manifest(folder, change)
