"""From a source of pictures to a finished folder of shards: render, drop, split, write, train the tokenizer."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mpdit.data.shards import manifest_sha256
from mpdit.errors import InputError
from mpdit_tools.data.output import check_replaceable, damage, partial_folder, read_manifest
from mpdit_tools.data.pool import render_all
from mpdit_tools.data.samples import Drop, Provenance, Sample, Source
from mpdit_tools.data.shards import FORMAT, ShardWriter, build_hash, manifest_bytes, write_durably
from mpdit_tools.data.split import split_classes, split_concepts
from mpdit_tools.data.tokenizer import train_tokenizer

DUPLICATE = "duplicate"
RATIOS = (0.35, 0.5, 0.7, 0.9, 1.1, 1.45, 2.0, 2.9)  # width / height; where the counted classes of pictures meet


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every build can be told, whatever its source."""

    out: Path
    val: float  # the part that is held out: of the concepts, or of the pictures where there are classes
    vocab_size: int
    per_shard: int  # samples in a shard
    max_dropped: float  # stop when a larger part of the pictures than this cannot be used
    workers: int  # processes; no influence on the result
    overwrite: bool

    def arguments(self) -> dict[str, Any]:
        """Those that change what is built."""
        return {"val": self.val, "vocab_size": self.vocab_size, "per_shard": self.per_shard}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A finished build. ``built`` is False when everything was there already."""

    manifest: dict[str, Any]
    built: bool
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A rendered sample whose picture waits in the spool file."""

    offset: int
    length: int
    pixels: str  # hash of the picture
    sample: Sample  # its ``png`` is empty


# told(what is being done, pictures done, pictures in all)
Progress = Callable[[str, int, int], None]


def build(source: Source, options: Options, told: Progress) -> Result:
    """Builds ``source`` into ``options.out``, or finds that it is there already.

    Raises InputError when nothing or too little can be used, or when ``out`` may not be replaced; ``out`` is then as it
    was. The folder appears in one step, when it is complete.
    """
    start = time.monotonic()
    told("reading the inputs", 0, 0)
    provenance = source.provenance()
    arguments = {
        "name": source.name,
        "size": source.size,
        "aspect": source.aspect,
        **source.arguments(),
        **options.arguments(),
    }
    identity = build_hash(arguments, [f"{entry.name}@{entry.version} {entry.sha256}" for entry in provenance])
    there = read_manifest(options.out)
    if there is not None and there.get("build_hash") == identity:
        wrong = damage(options.out, there)
        if not wrong:
            return Result(manifest=there, built=False, seconds=time.monotonic() - start)
        told(f"{wrong}: building again", 0, 0)
    else:
        check_replaceable(options.out, overwrite=options.overwrite)
    with partial_folder(options.out) as folder:
        manifest = _build_in(folder, source, provenance, options, told)
        manifest |= {"build": arguments | {"versions": _versions()}, "build_hash": identity}
        manifest["manifest_sha256"] = manifest_sha256(manifest)
        write_durably(folder / "manifest.json", manifest_bytes(manifest))
    return Result(manifest=manifest, built=True, seconds=time.monotonic() - start)


def _versions() -> dict[str, str]:
    # Not part of the build's identity, but another renderer may draw other pixels.
    return {name: version(name) for name in ("mpdit", "pillow", "resvg-py", "sentencepiece")}


def _build_in(
    folder: Path, source: Source, provenance: Sequence[Provenance], options: Options, told: Progress
) -> dict[str, Any]:
    spool = folder / "spool.bin"
    rows, drops = _render(source, spool, options, told)
    _check_enough(source, rows, drops, options)
    classes = source.classes([row.sample.caption for row in rows])
    val = _held_out(rows, options.val, by_class=classes is not None)
    splits, training = {}, list[str]()
    with spool.open("rb") as pictures:
        for split in ("train", "val"):
            chosen = [row for row, held in zip(rows, val, strict=True) if held == (split == "val")]
            told(f"writing {split}", 0, 0)
            splits[split] = _write_split(folder, split, chosen, pictures.fileno(), options.per_shard)
            if split == "train":
                training = [row.sample.caption for row in chosen]
    spool.unlink()
    told("training the tokenizer", 0, 0)
    model, pieces = train_tokenizer(training, vocab_size=options.vocab_size)
    write_durably(folder / "tokenizer.model", model)
    if drops:
        listed = ({"file": drop.origin, "reason": drop.reason, "detail": drop.detail} for drop in drops)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in listed]
        write_durably(folder / "dropped.jsonl", "".join(lines).encode())
    return {
        "format": FORMAT,
        "name": source.name,
        "size": source.size,
        "aspect": source.aspect,
        "splits": splits,
        **({} if classes is None else {"classes": list(classes)}),
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": hashlib.sha256(model).hexdigest(),
            "vocab_size": pieces,
        },
        **_counts([row.sample for row in rows], drops, provenance),
        **(_aspects([row.sample for row in rows]) if source.aspect == "keep" else {}),
    }


def _render(source: Source, spool: Path, options: Options, told: Progress) -> tuple[list[_Row], list[Drop]]:
    """Renders all jobs; the pictures go to the spool file, so that memory holds captions only."""
    told("reading the inputs", 0, 0)
    jobs = source.jobs()
    rows, drops, seen = list[_Row](), list[Drop](), set[str]()
    with spool.open("wb") as file, contextlib.closing(render_all(jobs, workers=options.workers)) as results:
        for done, result in enumerate(results, 1):
            told("rendering", done, len(jobs))
            if isinstance(result, Drop):
                drops.append(result)
                continue
            pixels = hashlib.sha256(result.png).hexdigest()
            key = f"{pixels} {result.caption}" if source.repeats else pixels
            if key in seen:
                drops.append(Drop(origin=result.origin, reason=DUPLICATE, harmless=True))
                continue
            seen.add(key)
            row = dataclasses.replace(result, png=b"")
            rows.append(_Row(offset=file.tell(), length=len(result.png), pixels=pixels, sample=row))
            file.write(result.png)
    return rows, drops


def _check_enough(source: Source, rows: Sequence[_Row], drops: Sequence[Drop], options: Options) -> None:
    """Raises InputError when more than the allowed part of the pictures cannot be used."""
    lost = collections.Counter(drop.reason for drop in drops if not drop.harmless)
    total = len(rows) + sum(lost.values())
    if rows and sum(lost.values()) <= options.max_dropped * total:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in lost.most_common())
    example = next((drop for drop in drops if not drop.harmless), None)
    raise InputError(
        f"{source.name}: {sum(lost.values())} of {total} pictures cannot be used ({reasons}; the first is "
        f"{example.origin if example else 'unknown'}); mend them, or allow a larger part with --max-dropped "
        f"(now {options.max_dropped:g})."
    )


def _held_out(rows: Sequence[_Row], fraction: float, *, by_class: bool) -> list[bool]:
    if by_class:
        labelled = [(row.sample.caption, row.sample.origin, row.pixels) for row in rows]
        return split_classes(labelled, fraction=fraction)
    return split_concepts([(row.sample.concept, row.pixels) for row in rows], fraction=fraction)


def _write_split(folder: Path, split: str, rows: Sequence[_Row], pictures: int, per_shard: int) -> dict[str, Any]:
    with ShardWriter(folder, split, per_shard=per_shard) as writer:
        for row in rows:
            png = os.pread(pictures, row.length, row.offset)
            sample = row.sample
            writer.add(png=png, height=sample.height, width=sample.width, caption=sample.caption, meta=sample.meta)
    return {"samples": len(rows), "shards": [dataclasses.asdict(shard) for shard in writer.shards]}


def _counts(samples: Sequence[Sample], drops: Sequence[Drop], provenance: Sequence[Provenance]) -> dict[str, Any]:
    def count(values: Iterator[str]) -> dict[str, int]:
        return dict(sorted(collections.Counter(values).items()))

    images = count(sample.source for sample in samples)
    return {
        "sources": [dataclasses.asdict(entry) | {"images": images.get(entry.name, 0)} for entry in provenance],
        "licences": count(sample.licence for sample in samples),
        "styles": count(sample.style for sample in samples if sample.style),
        "dropped": count(drop.reason for drop in drops),
    }


def _aspects(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many pictures there are of each ratio of width to height, and how many had to be cut."""
    ratios = [sample.width / sample.height for sample in samples]
    counts, _ = np.histogram(ratios, bins=[0, *RATIOS, math.inf])
    edges = [f"{ratio:g}" for ratio in RATIOS]
    names = [f"below {edges[0]}", *map(" to ".join, itertools.pairwise(edges)), f"{edges[-1]} and more"]
    return {
        "aspects": dict(zip(names, counts.tolist(), strict=True)),
        "cut": sum(sample.cut for sample in samples),
    }
