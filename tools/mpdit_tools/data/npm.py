"""Tarballs of npm packages, pinned by hash and read without unpacking."""

import dataclasses
import tarfile
from collections.abc import Callable
from pathlib import Path

from mpdit_tools.data.packages import fetched


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


def fetch(package: Package, cache: Path) -> Path:
    """The package's tarball, out of the cache or from npm. Raises InputError as `fetched` does."""
    spec = f"{package.name}@{package.version}"
    command = ["npm", "pack", "--silent", "--ignore-scripts", spec]
    return fetched(cache / package.tarball, package.sha256, spec, command, "install Node.js (with npm)")


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The regular files whose name below ``package/`` is ``wanted``, by that name. Nothing is unpacked to the disk."""
    with tarfile.open(tarball, "r:gz") as archive:
        found = {}
        for member in archive:
            name = member.name.removeprefix("package/")
            if member.isfile() and wanted(name) and (file := archive.extractfile(member)) is not None:
                found[name] = file.read()
    return found
