"""Input that is made to do harm: bombs, archives that lie about themselves, captions without end, files that are none.

Each is dropped with a reason, what is good beside it is kept, and memory and time stay bounded.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import bombs
import pytest
from data_sets import build, dropped, picture, samples, write_folder, write_tar

from mpdit_tools.data.captions import LINE_BYTES, clean_caption
from mpdit_tools.data.images import Shape, Unusable
from mpdit_tools.data.samples import Drop
from mpdit_tools.data.tars import HEADER_BYTES, tar_jobs
from reliability.mutations import in_time

MIB_OF_A_WORKER = 700  # 64 Mpixel in four channels are 244 MiB, and there are two copies at most


def test_bombs_are_refused_and_take_no_memory():
    """In a process of their own, whose memory can be measured."""
    done = subprocess.run([sys.executable, bombs.__file__], capture_output=True, text=True, check=True, timeout=120)
    told, peak = json.loads(done.stdout)
    assert told == {name: reason for name, (_, reason) in bombs.BOMBS.items()}
    assert peak < MIB_OF_A_WORKER


# ---- archives --------------------------------------------------------------------------------------------------------


def block(name: str, *, size: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"") -> bytes:
    """A member: header and data; `size` is what the header says, when it is not the length of the data."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size:
        header[124:136] = size.ljust(12, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def pax(**attributes: str) -> bytes:
    """A header that adds to the next."""
    records = b""
    for key, value in attributes.items():
        text = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(text) + 1
        while len(str(length)) + len(text) != length:
            length = len(str(length)) + len(text)
        records += b"%d" % length + text
    return block("pax", kind=tarfile.XHDTYPE, data=records)


GOOD = block("a.png", data=picture(1)) + block("a.txt", data=b"the first")
LAST = block("z.png", data=picture(2)) + block("z.txt", data=b"the last")
END = bytes(1024)
NEGATIVE = (-512 % 2**96).to_bytes(12)  # base 256, as GNU writes what octal digits have no room for
HUGE = b"\x80" + (2**62).to_bytes(11)
# name: (what is between two good samples, reasons by member, whether the sample after it is still found)
TARS = {
    "path out of the folder": (block("../../e.png", data=b"1"), {"../../e.png": "unsafe path in a tar"}, True),
    "absolute path": (block("/etc/e.png", data=b"1"), {"/etc/e.png": "unsafe path in a tar"}, True),
    "path of another system": (block("C:\\e.png", data=b"1"), {"C:\\\\e.png": "unsafe path in a tar"}, True),
    "path in a long name": (
        block("x", kind=tarfile.GNUTYPE_LONGNAME, data=b"../" * 50 + b"e.png\0") + block("e.png", data=b"1"),
        {"../" * 50 + "e.png": "unsafe path in a tar"},
        True,
    ),
    "path in a pax header": (pax(path="../e.png") + block("e", data=b"1"), {"../e.png": "unsafe path in a tar"}, True),
    "link": (block("e.png", kind=tarfile.SYMTYPE, link="/etc/passwd"), {"e.png": "not a plain file in a tar"}, True),
    "hard link": (block("e.png", kind=tarfile.LNKTYPE, link="a.png"), {"e.png": "not a plain file in a tar"}, True),
    "device": (block("e.png", kind=tarfile.CHRTYPE), {"e.png": "not a plain file in a tar"}, True),
    "pipe": (block("e.png", kind=tarfile.FIFOTYPE), {"e.png": "not a plain file in a tar"}, True),
    "second picture, caption, JSON": (
        block("e.png", data=picture(3)) + block("e.txt", data=b"e") + block("e.txt", data=b"f") +
        block("e.jpg", data=picture(4)) + block("e.json", data=b"1") + block("e.json", data=b"2"),
        {"e.jpg": "second picture of a sample", **dict.fromkeys(("e.txt", "e.json"), "second text of a sample")},
        True,
    ),
    "negative size": (block("e.png", size=NEGATIVE), {"": "damaged tar"}, False),
    "negative size in a pax header": (pax(size="-512") + block("e.png"), {"": "damaged tar"}, False),
    "negative size of a pax header": (block("e", kind=tarfile.XHDTYPE, size=NEGATIVE), {"": "damaged tar"}, False),
    "huge size": (block("e.png", size=HUGE), {"e": "no caption", "": "damaged tar"}, False),
    "huge size in a pax header": (pax(size="9" * 30) + block("e.png"), {"e": "no caption", "": "damaged tar"}, False),
    "huge long name": (block("e", kind=tarfile.GNUTYPE_LONGNAME, size=HUGE), {"": "damaged tar"}, False),
    "long name": (
        block("e", kind=tarfile.GNUTYPE_LONGNAME, data=b"e" * (HEADER_BYTES + 1)) + block("e"),
        {"": "damaged tar"},
        False,
    ),
    "name of 5000 letters": (
        pax(path="e" * 5000) + block("e"),
        {"e" * 1000: "unsafe path in a tar"},
        True,
    ),
    "thousands of headers for one member": (pax(a="b") * 5000 + block("e.png"), {"": "damaged tar"}, False),
    "digits that tarfile chews for hours": (
        block("e", kind=tarfile.XHDTYPE, data=b"1" * HEADER_BYTES) * 200 + block("e"),
        {"": "damaged tar"},
        False,
    ),
    "file with holes": (block("e.png", kind=tarfile.GNUTYPE_SPARSE), {"": "damaged tar"}, False),
    "file with holes, newest": (
        pax(GNU__sparse__major="1", GNU__sparse__minor="0") + block("e.png", data=b"99999999\n" + b"1\n" * 200_000),
        {"": "damaged tar"},
        False,
    ),
    "file with holes, older": (
        pax(GNU__sparse__map="0,512") + block("e.png", data=bytes(512)),
        {"e.png": "not a plain file in a tar"},
        True,
    ),
    "header with a wrong checksum": (block("e.png")[:-1] + b"\1", {"": "damaged tar"}, False),
    "end in the middle": (END, {"": "damaged tar"}, False),
    "no ASCII": (pax(path="e\udcff.png".encode(errors="surrogateescape").decode("latin-1")) + block("e"), None, True),
}  # fmt: skip


@pytest.mark.parametrize("what", TARS)
def test_archives_that_lie(tmp_path, what):
    """Python's own tarfile would hang on some of these, take the file into memory, or lose what follows in silence."""
    middle, wanted, goes_on = TARS[what]
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + middle + LAST + END)
    with in_time(what):
        results = [job.render() for job in tar_jobs(path, "x", source="s", shape=Shape(size=8))]
    drops = [result for result in results if isinstance(result, Drop)]
    captions = [result.caption for result in results if not isinstance(result, Drop)]
    assert captions[0] == "the first"
    assert ("the last" in captions) == goes_on
    if wanted is not None:
        assert {drop.origin.removeprefix("x").removeprefix(":"): drop.reason for drop in drops} == wanted


def test_json_that_is_nested_deeper_than_what_can_be_written(tmp_path):
    source, out = tmp_path / "mine", tmp_path / "out"
    source.mkdir()
    odd = {
        "deep": b"[" * 900 + b"]" * 900,
        "deeper": b"[" * 10**5,
        "nan": b"[NaN]",
        "big": b"9" * 9999,
        "fine": b"[[1]]",
    }
    rows = [(name, kind, data) for name, extra in odd.items()
            for kind, data in (("png", picture(len(name))), ("txt", name.encode()), ("json", extra))]  # fmt: skip
    write_tar(source / "a.tar", [(f"{name}.{kind}", data) for name, kind, data in rows])
    write_folder(source, 4)
    write_tar(source / "b.tar", [("b.png", picture(77)), ("b.txt", b"b")])
    assert build("folder", source, "--out", out, "--max-dropped", 0.9) == 0
    assert dropped(out) == {f"a.tar:{name}": "bad JSON" for name in ("deep", "deeper", "nan", "big")}


# ---- captions and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        (b"\x00a\x00\x01 b\x7f\x1b[31m\r\n", "a b [31m"),
        ("a\u2028b\u0085c\u00a0d".encode(), "a b c d"),
        (b"\xef\xbb\xbfa", "a"),
    ],
)
def test_control_characters_become_spaces(given, clean):
    assert clean_caption(given) == clean


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (b"\xff\xfea\0", "caption not UTF-8"),
        (b"\xed\xa0\x80", "caption not UTF-8"),
        (b"\xc0\x80", "caption not UTF-8"),
        (b"\0\0\0", "empty caption"),
        (b"a" * 5_000_000, "caption too long"),
    ],
)
def test_captions_that_cannot_be_used(given, reason):
    with pytest.raises(Unusable) as caught:
        clean_caption(given)
    assert caught.value.reason == reason


def test_a_list_with_lines_of_megabytes(tmp_path):
    """Two lines are too long, one by far: neither is taken into memory whole, and the next one is read."""
    source, out = write_folder(tmp_path / "mine", 4), tmp_path / "out"
    lines = [{"file": "000.png", "text": "a" * size} for size in (LINE_BYTES, 3 * LINE_BYTES)]
    lines += [{"file": f"00{number}.png", "text": f"listed {number}"} for number in range(4)]
    lines += [{"file": "000.png", "text": "b" * 70_000}]
    (source / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert build("folder", source, "--out", out) == 0
    found = {sample["txt"] for sample in samples(out, "train") + samples(out, "val")}
    assert found == {f"listed {number}" for number in range(4)}
    assert dropped(out) == {f"captions.jsonl:{number}": "caption too long" for number in (1, 2, 7)}


def test_pictures_are_told_by_their_content_not_by_their_name(tmp_path):
    source, out = write_folder(tmp_path / "mine", 4), tmp_path / "out"
    for name, data in {
        "really_a_png.jpg": picture(10),
        "really_a_jpeg.png": picture(11, format="JPEG"),
        "really_a_webp.gif": picture(12, format="WEBP"),
        "really_a_script.png": b"#!/bin/sh\nexit 1\n",
        "really_postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # which a program would draw
        "nothing.jpg": b"",
        "zeros.png": bytes(4096),
    }.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(name)
    assert build("folder", source, "--out", out) == 0
    assert dropped(out) == {
        "really_a_script.png": "not an image",
        "really_postscript.png": "not an image",
        "nothing.jpg": "empty file",
        "zeros.png": "not an image",
    }


def test_files_that_never_end_are_not_opened(tmp_path):
    """Pipes and devices, by a link as well: whoever opens them waits, or reads for ever."""
    source, out = write_folder(tmp_path / "mine", 4), tmp_path / "out"
    os.mkfifo(tmp_path / "pipe")
    for name, target in {
        "pipe.png": tmp_path / "pipe",
        "zero.png": Path("/dev/zero"),
        "round.png": "round.png",
    }.items():
        (source / name).symlink_to(target)
        (source / name).with_suffix(".txt").write_text(name)
    with in_time("a folder of pipes"):
        assert build("folder", source, "--out", out) == 0
    assert dropped(out) == {
        "pipe.txt": "caption without a picture",
        "zero.txt": "caption without a picture",
        "round.png": "cannot be read",
    }
