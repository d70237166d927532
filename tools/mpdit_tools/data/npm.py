"""Tarballs of npm packages, pinned by hash, kept in a cache and read without unpacking."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from mpdit.errors import InputError

TIMEOUT = 600  # seconds for one package


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One version of one npm package."""

    name: str
    version: str
    sha256: str  # of the tarball

    @property
    def tarball(self) -> str:
        """The file name that ``npm pack`` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/mpdit/npm``, by default ``~/.cache/mpdit/npm``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mpdit" / "npm"


def fetch(package: Package, cache: Path) -> Path:
    """The package's tarball, out of the cache or from npm. No script of the package is run.

    Raises InputError when npm is missing or fails, or when the tarball is not the pinned one.
    """
    path = cache / package.tarball
    if path.is_file() and _sha256(path) == package.sha256:
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            packed = _pack(package, Path(folder), path)
            found = _sha256(packed)
            if found != package.sha256:
                raise InputError(
                    f"{package.name}@{package.version}: npm sent a tarball with sha256 {found}, the pinned one has "
                    f"{package.sha256}; nothing of it was used. Check the registry npm is set up with."
                )
            packed.replace(path)
    except OSError as error:
        raise InputError(f"--cache {cache}: cannot be written to ({error.strerror}); name another folder.") from error
    return path


def _pack(package: Package, folder: Path, wanted: Path) -> Path:
    """Runs ``npm pack`` in ``folder``; the tarball it left there."""
    spec = f"{package.name}@{package.version}"
    by_hand = f"or put {package.tarball} into {wanted.parent} yourself"
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"npm is not installed, and {spec} is fetched with it: install Node.js (with npm), {by_hand}.")
    command = [npm, "pack", "--silent", "--ignore-scripts", spec]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"npm pack {spec} took more than {TIMEOUT} s: check the network, {by_hand}.") from error
    packed = sorted(folder.glob("*.tgz"))
    if done.returncode != 0 or len(packed) != 1:
        told = " ".join((done.stderr or done.stdout).split())[-300:] or "it said nothing"
        raise InputError(
            f"npm pack {spec} failed with exit code {done.returncode} ({told}): check the network, {by_hand}."
        )
    return packed[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The regular files whose name below ``package/`` is ``wanted``, by that name. Nothing is unpacked to the disk."""
    with tarfile.open(tarball, "r:gz") as archive:
        found = {}
        for member in archive:
            name = member.name.removeprefix("package/")
            if member.isfile() and wanted(name) and (file := archive.extractfile(member)) is not None:
                found[name] = file.read()
    return found
