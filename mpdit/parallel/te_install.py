"""Whether Transformer Engine is installed, and whole, told without importing it.

It comes in three parts: Python files, a CUDA library, and bindings to one torch. Megatron-core takes whatever imports
as `transformer_engine` for all of them, and expects nothing but an ImportError where it is absent: half of TE breaks
every import of megatron.core with an error about something else.
"""

import dataclasses
import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

from mpdit.errors import InputError

VERSION = "2.20.2"  # what pyproject's extra installs
MINIMUM = (2, 14)  # the oldest whose calls are those used here
_DISTRIBUTIONS = (
    "transformer-engine",
    "transformer-engine-torch",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """`state`: absent; whole; useless: Megatron-core passes it by; harmful: Megatron-core fails on it. `why` and
    `remedy` are of the last two."""

    state: Literal["absent", "whole", "useless", "harmful"]
    version: str = ""
    why: str = ""
    remedy: str = ""


def find_te() -> Found:
    """What an import of `transformer_engine` would find."""
    if "transformer_engine.pytorch" in sys.modules:
        return Found(state="whole", version=_version("transformer-engine") or "of no version")
    if sys.modules.get("transformer_engine", ...) is None:  # mpdit.parallel.accel keeps it out
        return Found(state="absent")
    spec, parts = _spec("transformer_engine"), {name: _version(name) for name in _DISTRIBUTIONS}
    there = {name: version for name, version in parts.items() if version}
    version = there.get("transformer-engine", "")
    remove = f"run pip uninstall {' '.join(there)}" if there else "take its folder off PYTHONPATH"
    if spec is None and not there:
        return Found(state="absent")
    if spec is None:
        why = f"pip knows of {', '.join(there)}, but the Python files are gone"
        return Found(state="useless", version=version, why=why, remedy=f"{remove}, then {install()}")
    why = _files(spec) or _versions(there) or _torch(there)
    if why:
        repair = f"make it whole on a machine with CUDA: {install()}"
        return Found(state="harmful", version=version, why=why, remedy=f"{remove}, or {repair}")
    return Found(state="whole", version=version)


def install() -> str:
    """What installs it whole."""
    cuda = (_cuda_of_torch() or "").partition(".")[0] or "13"
    return f"pip install --no-build-isolation 'transformer-engine[pytorch,core_cu{cuda}]=={VERSION}'"


def refuse_half_te() -> None:
    """Raise InputError for a Transformer Engine on which megatron.core's imports would fail."""
    found = find_te()
    if found.state == "harmful":
        raise InputError(f"Transformer Engine: {found.why}, and Megatron-core fails on that: {found.remedy}.")


def check_te() -> None:
    """Raise InputError unless Transformer Engine is there, whole, and new enough for ``parallel.backend: te``."""
    found = find_te()
    other = "or set parallel.backend=local"
    if found.state == "absent":
        raise InputError(f"parallel.backend te needs Transformer Engine, which is not installed: {install()}, {other}.")
    if found.state != "whole":
        raise InputError(f"parallel.backend te needs Transformer Engine, but {found.why}: {found.remedy}, {other}.")
    numbers = re.match(r"(\d+)\.(\d+)", found.version)
    if numbers and (int(numbers[1]), int(numbers[2])) < MINIMUM:
        least = ".".join(map(str, MINIMUM))
        raise InputError(
            f"parallel.backend te needs Transformer Engine {least} or newer, but {found.version} is installed: "
            f"{install()}, {other}."
        )


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def _files(spec: ModuleSpec) -> str:
    """Of the package's own and of its two libraries."""
    if spec.origin is None:
        folder = next(iter(spec.submodule_search_locations or ["?"]))
        return f"{folder} is what another version left of it, without Python files"
    where = Path(spec.origin).parent
    roots = {where.parent, Path(sysconfig.get_paths()["purelib"])}
    folders = [root / inner for root in roots for inner in ("", "transformer_engine", "transformer_engine/wheel_lib")]
    if not any(_library(folder, "libtransformer_engine") for folder in folders):
        return f"the package at {where} is without its CUDA library (the meta package alone does nothing)"
    if not any(_library(folder, "transformer_engine_torch") for folder in folders):
        return f"the package at {where} is without its half for torch (transformer-engine-torch)"
    return ""


def _library(folder: Path, prefix: str) -> bool:
    return folder.is_dir() and any(folder.glob(f"{prefix}*.so"))


def _versions(there: dict[str, str]) -> str:
    """Wheels of one release belong together; a build from source has one distribution for all."""
    public = {version.partition("+")[0] for version in there.values()}
    if len(public) > 1:
        return "its parts are of different releases (" + ", ".join(f"{n} {v}" for n, v in there.items()) + ")"
    return ""


def _torch(there: dict[str, str]) -> str:
    """Whether it is built for the torch that is here."""
    version, cuda = _version("torch"), _cuda_of_torch()
    if version is None:
        return ""
    if cuda == "":
        return f"it is built for CUDA, but torch {version} is built without"
    core = next((name[-2:] for name in there if re.fullmatch(r"transformer-engine-cu\d\d", name)), "")
    if core and cuda and cuda.partition(".")[0] != core:
        return f"it is built for CUDA {core} (transformer-engine-cu{core}), but torch {version} for CUDA {cuda}"
    for asked in _requirements("transformer-engine-torch"):
        if not _fits(asked, version):
            return f"its half for torch is built for {asked}, but torch {version} is installed"
    return ""


def _cuda_of_torch() -> str | None:
    """As torch.version says, read from its file; "": built without; None: unknown."""
    spec = _spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda[^=\n]*= *(?:'([^']*)'|None)", text, re.MULTILINE)
    return None if found is None else found[1] or ""


def _requirements(distribution: str) -> list[str]:
    """Of torch, as ``torch==2.13.0``."""
    try:
        asked = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [one.partition(";")[0].strip() for one in asked if re.match(r"torch\s*(?:[=<>!~(]|$)", one)]


def _fits(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # megatron-core's; where it is missing other things are, too
        return True
    try:
        return Requirement(requirement).specifier.contains(version, prereleases=True)
    except InvalidRequirement:
        return True


def _spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # a module object without a spec stands in sys.modules
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
