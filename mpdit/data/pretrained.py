"""Local folders of pretrained models: what they say of themselves, the hash they are known by, and how they are loaded.

Nothing that lies in them is run, and no other place is looked at: config.json, tokenizer files and safetensors only.
"""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mpdit.errors import InputError

_READ = {".json", ".safetensors", ".model", ".txt"}  # what a model and its tokenizer are read from


def config_of(key: str, folder: Path, library: str, extra: str) -> dict[str, Any]:
    """What config.json in the folder that the config key `key` names says.

    Raises InputError if that can't be read, if there are no safetensors, or if `library`, which `extra` installs, is
    not there to run it.
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "there is no config.json in it" if folder.is_dir() else "there is no such folder"
        raise InputError(f"{key} {folder}: {what}; it should be the local folder of a model saved by save_pretrained.")
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read ({error}), but should be a model's config; save it again.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: is a {type(found).__name__}, but should be a model's config; save it again.")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{key} {folder}: holds no *.safetensors, and other weights are not read; save the model again with "
            "save_pretrained."
        )
    if importlib.util.find_spec(library) is None:
        raise InputError(f"{key} {folder}: is run by {library}, which is not installed; pip install 'mpdit[{extra}]'.")
    return found


def whole_number(config: dict[str, Any], name: str, folder: Path) -> int:
    """A size in a model's config. Raises InputError if it is none."""
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"{folder / 'config.json'}: {name} is {value!r}, but should be a whole number above 0.")
    return value


def sha256_of(folder: Path) -> str:
    """Of the names and contents of the files that a model is read from; remembered while they are as they were."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _READ)
    stats = [path.stat() for path in files]
    return _hash(tuple((path, s.st_size, s.st_mtime_ns) for path, s in zip(files, stats, strict=True)))


@functools.lru_cache(maxsize=16)
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    def sha256(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing lets other threads run
        hashes = list(pool.map(sha256, (path for path, *_ in files)))
    lines = [f"{path.name} {found}\n" for (path, *_), found in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load(key: str, folder: Path, load: Callable[..., tuple[Any, dict[str, Any]]], **options: Any) -> Any:
    """What `load`, a class's from_pretrained, makes of the folder, in evaluation mode and without gradients.

    Raises InputError if it fails, or if weights are missing, which the libraries would draw at random.
    """
    try:
        model, told = load(folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # whatever the libraries say of damaged files
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{key} {folder}: can't be loaded ({said}); save the model again.") from error
    lost = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in told[kind])
    if lost:
        raise InputError(
            f"{key} {folder}: {len(lost)} weights are missing or of another shape, the first is {lost[0]}; save the "
            "model again."
        )
    return model.eval().requires_grad_(False)
