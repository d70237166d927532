"""Rows that ``mpdit data cache`` computes once, read by memory map: latents' moments, text states, teachers' features.

A cache is a folder ``KIND-SPLIT-KEY``, and the key is a hash of all that its rows depend on: the model's files, the
sizes, the data. Rows are ragged and stored flat: part N, a fixed number of rows, is ``N.npy`` with the numbers of its
rows one after another, and ``N.rows.npy``, int64, with (offset, size, CRC-32, dimensions) of each. ``manifest.json``
spells the key out and has the size and SHA-256 of every file.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdit import files
from mpdit.errors import InputError

FORMAT = "mpdit-cache/1"
DTYPE = np.dtype("<f2")
_FIXED = 3  # offset, size, CRC-32: the columns before the dimensions
_OPEN_PARTS = 64  # each is two open files
_HINT = "run `mpdit data cache CONFIG`"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A cache that a run can read: what its rows depend on, and how many samples they are of.

    ``depends["model"]`` is None where the model's folder is not there: then a cache of any model will do, if it agrees
    in everything else and is the only one.
    """

    kind: str  # latents, text, features
    split: str
    samples: int
    depends: dict[str, Any]

    @property
    def key(self) -> str:
        inputs = [FORMAT, self.kind, self.split, self.samples, self.depends]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def folder(self, root: Path) -> Path:
        return root / f"{self.kind}-{self.split}-{self.key[:16]}"


class Cache:
    """A cache that is complete. Reading is thread-safe and fork-safe."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Use :meth:`open`."""
        self.folder, self.manifest = folder, manifest
        self.depends: dict[str, Any] = manifest["depends"]
        self.facts: dict[str, Any] = manifest["facts"]  # what else a run has to know of the model
        self._part = functools.lru_cache(maxsize=_OPEN_PARTS)(self._open_part)

    @classmethod
    def open(cls, root: str | Path, wanted: Wanted) -> "Cache":
        """The cache in the folder ``data.cache`` = `root` that `wanted` describes.

        Checks the size of every file and the hash of all but the rows' numbers, which :meth:`verify` reads and whose
        checksum is compared row by row as they are read. Raises InputError where there is none, saying how the
        nearest differs, and where a file is missing or damaged.
        """
        manifests = {path: read_manifest(path) for path in _folders(Path(root), wanted)}
        fitting = [path for path, manifest in manifests.items() if not _differences(manifest, wanted)]
        if len(fitting) != 1:
            raise InputError(_missing(Path(root), wanted, manifests, fitting))
        cache = cls(fitting[0], manifests[fitting[0]])
        cache._check()
        return cache

    def row(self, number: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """The numbers of a row, float16 and flat, and its dimensions. Raises InputError if they are damaged."""
        if not 0 <= number < self.manifest["rows"]:
            raise IndexError(f"row {number} of {self.manifest['rows']}")
        part, within = divmod(number, self.manifest["per_part"])
        numbers, rows = self._part(part)
        offset, size, crc, *dimensions = rows[within].tolist()
        found = np.array(numbers[offset : offset + size])
        if len(found) != size or zlib.crc32(found.tobytes()) != crc:
            raise InputError(
                f"{self.folder / data_name(part)}: row {number} is damaged (its CRC-32 is not that which was written); "
                f"remove the folder and {_HINT}."
            )
        return found, tuple(dimensions)

    def strings(self, name: str) -> np.ndarray:
        """The array of byte strings that lies beside the rows under `name`."""
        found: np.ndarray = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        return found

    def verify(self) -> int:
        """Read every file and compare its SHA-256; how many bytes. Raises InputError for the first that differs."""
        for name in self.manifest["files"]:
            self._check_hash(name)
        return sum(file["bytes"] for file in self.manifest["files"].values())

    def _check(self) -> None:
        for name, file in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise InputError(f"{path}: is missing; copy it there, or remove the folder and {_HINT}.")
            if (found := path.stat().st_size) != file["bytes"]:
                raise InputError(
                    f"{path}: is {found} bytes long, but the manifest says {file['bytes']}; copy it again, or remove "
                    f"the folder and {_HINT}."
                )
        for name in self.manifest["files"]:
            if not _is_data(name):
                self._check_hash(name)

    def _check_hash(self, name: str) -> None:
        if sha256_of(self.folder / name) != self.manifest["files"][name]["sha256"]:
            raise InputError(
                f"{self.folder / name}: is damaged (its SHA-256 is not the manifest's); remove the folder and {_HINT}."
            )

    def _open_part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            numbers, rows = (
                np.load(self.folder / name, mmap_mode="r", allow_pickle=False) for name in part_names(part)
            )
        except (
            Exception
        ) as error:  # NumPy reads a damaged header with Python's own parser, which raises nearly anything
            raise InputError(
                f"{self.folder / data_name(part)}: can't be read ({error}); remove the folder and {_HINT}."
            ) from error
        per_part = self.manifest["per_part"]
        wanted = min(per_part, self.manifest["rows"] - part * per_part)
        if numbers.dtype != DTYPE or numbers.ndim != 1 or rows.dtype != np.int64 or len(rows) != wanted:
            raise InputError(
                f"{self.folder / data_name(part)}: is damaged, or is of another cache; remove the folder and {_HINT}."
            )
        return numbers, rows


# ---- finding ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises InputError if it is damaged, of another format, or not the folder's."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        claimed = manifest.pop("manifest_sha256")
        whole = claimed == manifest_sha256(manifest)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: can't be read ({error}); remove the folder and {_HINT}.") from error
    if not whole:
        raise InputError(f"{path}: has another SHA-256 than it says itself; remove the folder and {_HINT}.")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path}: format is {manifest.get('format')!r}, but this version reads {FORMAT!r}; remove the folder and "
            f"{_HINT}."
        )
    _check_sound(manifest, path)
    return dict(manifest)


def _check_sound(manifest: dict[str, Any], path: Path) -> None:
    """Raises InputError where a manifest that somebody wrote by hand is not what the builder writes."""
    for key, kind in (("samples", int), ("rows", int), ("per_part", int), ("depends", dict), ("facts", dict)):
        if type(manifest.get(key)) is not kind or (kind is int and manifest[key] < 1):
            raise InputError(f"{path}: {key} is {_short(manifest.get(key))}; remove the folder and {_HINT}.")
    files = manifest.get("files")
    parts = range(-(-manifest["rows"] // manifest["per_part"]))
    if not isinstance(files, dict) or not {name for part in parts for name in part_names(part)} <= files.keys():
        raise InputError(f"{path}: does not list the files of all its rows; remove the folder and {_HINT}.")
    for name, file in files.items():
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise InputError(f"{path}: lists {_short(name)}, but it should be the plain name of a file in the folder.")
        if not isinstance(file, dict) or type(file.get("bytes")) is not int or type(file.get("sha256")) is not str:
            raise InputError(f"{path}: has no size and hash of {name}; remove the folder and {_HINT}.")


def manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _folders(root: Path, wanted: Wanted) -> list[Path]:
    found = root.glob(f"{wanted.kind}-{wanted.split}-*") if root.is_dir() else []
    return sorted(path for path in found if (path / "manifest.json").is_file() and not path.name.endswith(".partial"))


def _differences(manifest: dict[str, Any], wanted: Wanted) -> list[str]:
    """In what a cache is of something else, as phrases."""
    theirs, mine = (
        {**manifest["depends"], "samples": manifest["samples"]},
        {**wanted.depends, "samples": wanted.samples},
    )
    return [
        f"{name} is {_short(theirs.get(name))}, but the config's is {_short(mine.get(name))}"
        for name in sorted(theirs.keys() | mine.keys())
        if theirs.get(name) != mine.get(name) and not (name == "model" and mine.get(name) is None)
    ]


def _missing(root: Path, wanted: Wanted, manifests: dict[Path, dict[str, Any]], fitting: list[Path]) -> str:
    what = f"data.cache {root}: "
    if fitting:
        names = ", ".join(path.name for path in fitting)
        return (
            f"{what}{names} are of different models, and the model's folder is not there to say which is right; put "
            "it there, or remove the others."
        )
    if not manifests:
        return f"{what}holds no {wanted.kind} of the {wanted.split} split; {_HINT}."
    path = min(manifests, key=lambda path: len(_differences(manifests[path], wanted)))
    told = "; ".join(_differences(manifests[path], wanted))
    return f"{what}{path.name} is of something else: {told}; {_HINT}, or give another folder."


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:17]}…{text[-6:]}"


# ---- parts -----------------------------------------------------------------------------------------------------------


def data_name(part: int) -> str:
    return f"{part:06d}.npy"


def part_names(part: int) -> tuple[str, str]:
    return data_name(part), f"{part:06d}.rows.npy"


def _is_data(name: str) -> bool:
    return name.endswith(".npy") and name[:-4].isdecimal()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_part(folder: Path, part: int, rows: Sequence[np.ndarray], dimensions: Sequence[tuple[int, ...]]) -> None:
    """Write float16 `rows`, any shape each, as part `part`; its files appear one by one, each whole and synced."""
    table = np.empty((len(rows), _FIXED + len(dimensions[0])), np.int64)
    numbers = np.empty(sum(row.size for row in rows), DTYPE)
    offset = 0
    for number, (row, dims) in enumerate(zip(rows, dimensions, strict=True)):
        flat = np.ascontiguousarray(row, DTYPE).reshape(-1)
        numbers[offset : offset + flat.size] = flat
        table[number] = offset, flat.size, zlib.crc32(flat.tobytes()), *dims
        offset += flat.size
    data, of_rows = part_names(part)
    write_array(folder / data, numbers)
    write_array(folder / of_rows, table)


def write_array(path: Path, array: np.ndarray) -> None:
    """Written beside, synced and renamed: `path` is there whole or not at all."""
    with files.replaced(path) as file:
        np.save(file, array, allow_pickle=False)
