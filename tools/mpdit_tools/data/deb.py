"""Debian packages, pinned by hash and read without dpkg: nothing of them is unpacked to the disk or run.

A .deb is an ``ar`` archive (deb(5)), one member of which, ``data.tar.xz``, has the files.
"""

import dataclasses
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mpdit.errors import InputError
from mpdit_tools.data.captions import is_outside
from mpdit_tools.data.images import FILE_BYTES
from mpdit_tools.data.packages import fetched, sha256_of
from mpdit_tools.data.samples import Drop
from mpdit_tools.data.tars import NOT_PLAIN, UNSAFE, members

UNPACKED = 4 * 2**30  # bytes of all files; a package that claims more is damaged, or a bomb


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One version of one Debian package, of architecture "all"."""

    name: str
    version: str
    sha256: str  # of the .deb

    @property
    def deb(self) -> str:
        """The file name that ``apt-get download`` gives it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


def fetch(package: Package, cache: Path, debs: Path | None) -> Path:
    """The package's .deb: out of the folder `debs` when there is one, else out of the cache, or by the machine's apt.

    Raises InputError when it is not in `debs`, and as `fetched` does.
    """
    if debs is None:
        spec = f"{package.name}={package.version}"
        return fetched(cache / package.deb, package.sha256, spec, ["apt-get", "download", spec], "take Debian's")
    there = sorted(debs.glob(f"{package.name}_*.deb"))
    for path in there:
        if sha256_of(path) == package.sha256:
            return path
    found = f"only {', '.join(path.name for path in there)}, another one" if there else "no such file"
    raise InputError(
        f"--debs {debs}: there is {found}; it should hold {package.deb} with sha256 {package.sha256}, which "
        f"`apt-get download {package.name}={package.version}` brings on Debian 12."
    )


def read_members(deb: Path, under: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes] | Drop]:
    """The plain files below the folder `under` whose names end so, by their name in it, in the package's order.

    What cannot be used is told: links, devices, names that lead outside, files of more than `FILE_BYTES`. Raises
    InputError for a package that is damaged or unpacks to more than `UNPACKED`.
    """
    try:
        with deb.open("rb") as file:
            _seek_data(file)
            with tarfile.open(fileobj=file, mode="r|xz") as archive:
                yield from _members(archive, deb.name, under, suffixes)
    except InputError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        raise InputError(f"{deb}: is no Debian package or damaged ({error}); get it anew.") from error


def _seek_data(file: IO[bytes]) -> None:
    """To where ``data.tar.xz`` begins."""
    if file.read(8) != b"!<arch>\n":
        raise ValueError("no ar archive")
    while header := file.read(60):
        name, size = header[:16].rstrip(b" /"), int(header[48:58])
        if name == b"data.tar.xz":
            return
        if header[58:] != b"`\n" or size < 0:
            raise ValueError("a header of ar is damaged")
        file.seek(size + size % 2, 1)
    raise ValueError("it has no data.tar.xz")


def _members(
    archive: tarfile.TarFile, deb: str, under: str, suffixes: tuple[str, ...]
) -> Iterator[tuple[str, bytes] | Drop]:
    total = 0
    for member in members(archive):
        total += member.size
        if total > UNPACKED:
            raise ValueError(f"it unpacks to more than {UNPACKED} bytes")
        name = member.name.removeprefix("./")
        origin = f"{deb}:{ascii(name)[1:-1]}"
        if is_outside(name) and not member.isdir():
            yield Drop(origin=origin, reason=UNSAFE)
        elif name.startswith(under) and name.endswith(suffixes):
            if member.issym() or member.islnk():
                yield Drop(origin=origin, reason="link to another picture", harmless=True)
            elif not member.isreg() or member.issparse():
                yield Drop(origin=origin, reason=NOT_PLAIN)
            elif member.size > FILE_BYTES:
                yield Drop(origin=origin, reason="file too large", detail=f"{member.size} bytes")
            else:
                content = archive.extractfile(member)
                assert content is not None
                yield name.removeprefix(under), content.read()
