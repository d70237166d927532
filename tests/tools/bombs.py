"""Small files that would take gigabytes if they were believed."""

import io
import json
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    """One of a PNG's."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 6, compressed: bytes = b"") -> bytes:
    """With these chunks before its pixels, which are `compressed`."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(
        b"IDAT", compressed or zlib.compress(bytes(1 + 4 * width) * height if width * height < 10**6 else b"")
    )
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + pixels + chunk(b"IEND", b"")


def zeros(number: int) -> bytes:
    """`number` zero bytes, compressed a megabyte at a time."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(bytes(2**20)) for _ in range(number >> 20)]
    return b"".join([*parts, packer.compress(bytes(number % 2**20)), packer.flush()])


def gif(width: int, height: int) -> bytes:
    """A screen of this size with a frame of one pixel."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00\x3b"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def webp(width: int, height: int) -> bytes:
    """A lossless one, all but the header cut off."""
    bits = (width - 1) | (height - 1) << 14
    data = b"\x2f" + struct.pack("<I", bits) + bytes(60)
    body = b"WEBPVP8L" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(width: int, height: int, *more: tuple[int, int, int, int]) -> bytes:
    """One strip; entries of (tag, type, count, value)."""
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1)}
    tags |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, 2**31)}
    tags |= {tag: (kind, count, value) for tag, kind, count, value in more}
    entries = [struct.pack("<HHII", tag, *rest) for tag, rest in sorted(tags.items())]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def jpeg(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, "JPEG")
    return data.getvalue().replace(struct.pack(">HH", 16, 16), struct.pack(">HH", height, width))


# name: (how to make it, the reason for which it is refused, "" for a picture that is fine)
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "header of 4 Gpixel squared": (lambda: png(2**31 - 1, 2**31 - 1), "too many pixels"),
    "100 Mpixel in a 60 kB PNG": (
        lambda: png(10_000, 10_000, depth=1, colour=0, compressed=zeros(10_000 * 1251)),
        "too many pixels",
    ),
    "as much as is allowed, with alpha": (
        lambda: png(8_000, 8_000, compressed=zeros(8_000 * 32_001)),
        "",
    ),
    "more pixels than the header says": (lambda: png(8, 8, compressed=zeros(2**27)), ""),
    "zTXt of 128 MiB": (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(2**27))), "truncated or damaged"),
    "iTXt of 128 MiB": (lambda: png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(2**27))), "truncated or damaged"),
    "a hundred texts of 1 MiB": (
        lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(2**20)) * 100),
        "truncated or damaged",
    ),
    "iCCP of 128 MiB": (lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros(2**27))), "truncated or damaged"),
    "GIF screen": (lambda: gif(65_535, 65_535), "too many pixels"),
    "BMP": (lambda: bmp(2**31 - 1, -(2**31)), "too many pixels"),
    "WebP": (lambda: webp(16_383, 16_383), "too many pixels"),
    "WebP that Pillow would open": (lambda: webp(13_000, 13_000), "truncated or damaged"),
    "TIFF": (lambda: tiff(2**32 - 1, 2**32 - 1), "too many pixels"),
    "TIFF with a tag of 16 GiB": (lambda: tiff(8, 8, (270, 2, 2**32 - 1, 8)), "truncated or damaged"),
    "TIFF with 4 G samples a pixel": (lambda: tiff(8, 8, (277, 4, 1, 2**32 - 1)), "not an image"),
    "JPEG": (lambda: jpeg(65_535, 65_535), "too many pixels"),
    "PPM": (lambda: b"P6 99999999 99999999 255\n", "too many pixels"),
    "PPM that goes on": (lambda: b"P6 " + b"9" * 10_000_000, "truncated or damaged"),
}


def measure() -> None:
    """Print as JSON why each is refused, and the most MiB of memory that any of them took."""
    from mpdit_tools.data.images import Shape, Unusable, render

    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # for the sake of the machine, where a bomb does go off
    told = {}
    for name, (make, _) in BOMBS.items():
        try:
            told[name] = str(render(make(), Shape(size=16)).width - 16 or "")
        except Unusable as error:
            told[name] = error.reason
    print(json.dumps([told, peak_mib()]))


def peak_mib() -> float:
    """Of this program: getrusage would count what the process was before it became this program."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    measure()
