"""Small sets of pictures for the tests of the data builder."""

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from mpdit.cli import main
from mpdit_tools.data import deb
from mpdit_tools.data.npm import Package


def build(*arguments: object) -> int:
    """Runs ``mpdit data build`` in this process; its exit code. One worker and small pictures unless told otherwise."""
    given = [str(argument) for argument in arguments]
    defaults = {"--size": "16", "--workers": "1"}
    extra = [word for key, value in defaults.items() if key not in given for word in (key, value)]
    return main(["data", "build", *given, *extra])


def picture(
    seed: int, *, size: tuple[int, int] = (20, 20), format: str = "PNG", mode: str = "RGB", **options: Any
) -> bytes:
    """A picture of coloured blocks, different for every seed."""
    image = Image.frombytes("RGB", (4, 4), random.Random(seed).randbytes(48)).resize(size, Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.convert(mode).save(data, format, **options)
    return data.getvalue()


def write_folder(folder: Path, number: int, *, first: int = 0) -> Path:
    """``number`` good pictures with a caption each in a .txt beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + number):
        (folder / f"{seed:03d}.png").write_bytes(picture(seed))
        (folder / f"{seed:03d}.txt").write_text(f"picture number {seed}")
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """An archive with these members, names as they are."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pack(folder: Path, name: str, files: dict[str, object]) -> Package:
    """Writes a tarball as ``npm pack`` would, into ``folder``."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for path, value in files.items():
            content = (value if isinstance(value, str) else json.dumps(value)).encode()
            info = tarfile.TarInfo(f"package/{path}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    package = Package(name=name, version="1.0.0", sha256=hashlib.sha256(data.getvalue()).hexdigest())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / package.tarball).write_bytes(data.getvalue())
    return package


def ar(members: list[tuple[str, bytes]]) -> bytes:
    """An archive as ``ar`` writes it."""
    heads = [f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() for name, data in members]
    pads = [b"\n" * (len(data) % 2) for _, data in members]
    return b"!<arch>\n" + b"".join(h + data + pad for h, (_, data), pad in zip(heads, members, pads, strict=True))


def pack_deb(folder: Path, name: str, members: list[tarfile.TarInfo | tuple[str, bytes]]) -> deb.Package:
    """Writes a Debian package into ``folder``; what is not a pair of name and data goes in as it is."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", preset=0) as archive:
        for member in members:
            info = tarfile.TarInfo(f"./{member[0]}") if isinstance(member, tuple) else member
            content = member[1] if isinstance(member, tuple) else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    whole = ar([("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())])
    package = deb.Package(name=name, version="1:2.0-1", sha256=hashlib.sha256(whole).hexdigest())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / package.deb).write_bytes(whole)
    return package


def manifest(out: Path) -> dict[str, Any]:
    """The manifest of a build."""
    return json.loads((out / "manifest.json").read_bytes())


def samples(out: Path, split: str) -> list[dict[str, Any]]:
    """All samples of a split, read with nothing but tarfile: key, png, txt, json."""
    found = []
    for shard in manifest(out)["splits"][split]["shards"]:
        with tarfile.open(out / shard["tar"]) as archive:
            members = [(member.name, archive.extractfile(member).read()) for member in archive]
        for (png, image), (txt, caption), (extra, meta) in zip(members[::3], members[1::3], members[2::3], strict=True):
            key = png.removesuffix(".png")
            assert (txt, extra) == (f"{key}.txt", f"{key}.json")
            found.append({"key": key, "png": image, "txt": caption.decode(), "json": json.loads(meta)})
    return found


def dropped(out: Path) -> dict[str, str]:
    """Reason by file, from dropped.jsonl."""
    lines = (out / "dropped.jsonl").read_text().splitlines()
    return {entry["file"]: entry["reason"] for entry in map(json.loads, lines)}


def tree(out: Path) -> dict[str, str]:
    """Hash by name of everything in a folder."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
