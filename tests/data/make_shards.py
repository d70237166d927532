"""A small data set in the builder's format, for tests: seeded noise pictures with captions."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


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
    """`path` and, with another suffix, its index."""
    lines, offset = [f"v1.2 {samples}"], 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in range(first, first + samples):
            members = {"png": image(sample), "txt": f"{caption(sample)}\n".encode(), "json": b'{"a": 1}'}
            words = []
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{sample:08d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                words.append(f"{ext} {offset + 512} {len(data)} {info.name}")
                offset += 512 + -(-len(data) // 512) * 512
            lines.append(" ".join(words))
    path.with_suffix(".idx").write_text("\n".join(lines) + "\n")


def entry(tar: Path, samples: int) -> dict:
    """A shard as the manifest has it."""
    index = tar.with_suffix(".idx")
    return {
        "tar": tar.name,
        "index": index.name,
        "samples": samples,
        "bytes": tar.stat().st_size,
        "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
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
        "format": "mpdit-shards/1",
        "name": "tiny",
        "size": 16,
        "splits": {"train": {"samples": first, "shards": shards}},
        "tokenizer": {"file": "tokenizer.model", "sha256": "0" * 64, "vocab_size": 300},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
