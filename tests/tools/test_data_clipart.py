"""Clip art out of Debian packages made by hand: fetching, reading without dpkg, captions, shapes, what is left out."""

import io
import tarfile

import pytest
from data_sets import ar, build, dropped, manifest, pack_deb, picture, samples, tree
from PIL import Image

from mpdit.errors import InputError
from mpdit_tools.data import clipart, deb, packages
from mpdit_tools.data.clipart import Words, clip_caption, file_title, words_of
from mpdit_tools.data.deb import Package, fetch, read_members
from mpdit_tools.data.samples import Drop

PNG, SVG, STAMPS = (clipart.FOLDERS[part] for part in ("pictures", "words", "stamps"))


def rdf(title="", description="", creator="", keywords=()):
    """An SVG without a picture, whose metadata say this."""
    bag = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        f"<svg><metadata><dc:title>{title}</dc:title><dc:description>{description}</dc:description>"
        f"<dc:subject><rdf:Bag>{bag}</rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>{creator}</dc:title>"
        "</cc:Agent></dc:creator></metadata></svg>"
    ).encode()


def member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def debs(tmp_path, monkeypatch):
    """A folder with three small packages, which are the pinned ones; apt-get is not asked."""
    folder = tmp_path / "debs"
    pictures = [
        (f"{PNG}animals/frog_jane_d_01.png", picture(1, size=(20, 60))),
        (f"{PNG}animals/cat.png", picture(2, size=(60, 20))),
        (f"{PNG}tools/hammer_01.png", picture(3)),
        (f"{PNG}tools/saw.png", picture(3)),  # the same picture
        (f"{PNG}tools/bad.png", b"not a picture"),
        (f"{PNG}../../evil.png", picture(9)),
        ("usr/share/doc/openclipart-png/logo.png", picture(4)),
        member(f"./{PNG}animals/toad.png", tarfile.SYMTYPE, "frog_jane_d_01.png"),
        member(f"./{PNG}animals/hard.png", tarfile.LNKTYPE, f"./{PNG}animals/cat.png"),
        member(f"./{PNG}animals/null.png", tarfile.CHRTYPE),
        *((f"{PNG}shapes/star_{number}.png", picture(100 + number)) for number in range(6)),
    ]
    words = [
        (f"{SVG}animals/frog_jane_d_01.svg", rdf("Frog &amp;amp; friends", "A green frog.", "Jane Doe", ["swamp", ""])),
        (f"{SVG}animals/cat.svg", rdf("Lemon SVG theme", creator="Jane Doe")),
        (f"{SVG}tools/hammer_01.svg", rdf("caf\xe9", keywords=["theme", "tools", "jane doe"], creator="Jane Doe")),
        *((f"{SVG}shapes/star_{number}.svg", rdf("gramastar")) for number in range(6)),
    ]
    blue = b"<svg xmlns='http://www.w3.org/2000/svg' width='30pt' height='15pt'><rect width='99' height='99'/></svg>"
    stamps = [
        (f"{STAMPS}birds/owl.png", picture(5)),
        (f"{STAMPS}birds/owl.txt", b"An owl.\nde.utf8=Eine Eule."),
        (f"{STAMPS}birds/blue.svg", blue),
        (f"{STAMPS}birds/blue.txt", b"Nothing but blue."),
        (f"{STAMPS}birds/owl.ogg", b"hoo"),
        (f"{STAMPS}birds/mute.png", picture(6)),
    ]
    given = {"pictures": pictures, "words": words, "stamps": stamps}
    names = {part: package.name for part, package in clipart.PACKAGES.items()}
    packed = {part: pack_deb(folder, names[part], members) for part, members in given.items()}
    monkeypatch.setattr(clipart, "PACKAGES", packed)
    monkeypatch.setattr(clipart, "SPIRALS", 4)
    monkeypatch.setattr(packages.shutil, "which", lambda name: pytest.fail("apt-get was asked for"))
    return folder


def test_every_picture_comes_out_in_its_shape_with_its_words(tmp_path, debs):
    out = tmp_path / "out"
    assert build("clipart", "--out", out, "--debs", debs, "--val", 0.3) == 0
    found = {sample["json"]["file"]: sample for sample in samples(out, "train") + samples(out, "val")}
    stars = {name: found.pop(name) for name in list(found) if name.startswith("shapes/")}
    assert len(stars) == 4
    hammer = {"tools/hammer_01.png", "tools/saw.png"} & set(found)  # whichever came first after the shuffle
    assert len(hammer) == 1
    assert {name: sample["txt"] for name, sample in found.items() if name not in hammer} == {
        "animals/frog_jane_d_01.png": "clip art of frog & friends, a green frog, swamp, animals",
        "animals/cat.png": "clip art of cat, animals",
        "birds/owl.png": "an owl, birds",
        "birds/blue.svg": "nothing but blue, birds",
    }
    sizes = {name: Image.open(io.BytesIO(sample["png"])).size for name, sample in found.items()}
    assert (sizes["animals/frog_jane_d_01.png"], sizes["animals/cat.png"]) == ((9, 28), (28, 9))
    assert sizes["birds/blue.svg"] == (23, 11)
    told = manifest(out)
    assert (told["name"], told["aspect"], told["size"]) == ("clipart", "keep", 16)
    assert told["licences"] == {"GPL-2": 2, "public domain": 7}
    assert told["dropped"] == {
        "duplicate": 1,
        "link to another picture": 2,
        "no caption": 1,
        "not a plain file in a tar": 1,
        "not an image": 1,
        "one more gramastar": 2,
        "unsafe path in a tar": 1,
    }
    assert {name.rpartition(":")[2] for name, reason in dropped(out).items() if "unsafe" in reason} == {
        f"{PNG}../../evil.png"
    }
    assert not list(tmp_path.rglob("evil*"))


def test_the_same_packages_give_the_same_bytes(tmp_path, debs):
    for name, extra in {"a": [], "b": ["--workers", 2], "c": ["--seed", 1], "d": ["--aspect", "square"]}.items():
        assert build("clipart", "--out", tmp_path / name, "--debs", debs, "--val", 0.3, *extra) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")
    for sample in samples(tmp_path / "d", "train"):
        assert Image.open(io.BytesIO(sample["png"])).size == (16, 16)
    assert build("clipart", "--out", tmp_path / "e", "--debs", debs, "--limit", 0) == 2


def test_the_packages_are_pinned():
    """By version and the whole hash: another .deb is refused."""
    starts = {"pictures": "f07f1545a2970c2c", "words": "989712d90d57dfa3", "stamps": "6db6c1bfc870a47f"}
    for part, package in clipart.PACKAGES.items():
        assert package.sha256.startswith(starts[part])
        assert len(package.sha256) == 64
    assert clipart.PACKAGES["pictures"].deb == "openclipart-png_1%3a0.18+dfsg-19_all.deb"


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_of_an_svg():
    svg = rdf("  Two\n_frogs <b>", "x &amp;eacute; y", "Jane &lt;3", ["a  b", " ", "c"])
    assert words_of(svg) == Words(title="Two frogs", description="x \xe9 y", keywords=("a b", "c"), creator="Jane <3")
    assert words_of(b"\xff\xfe<svg/>") == Words()
    assert words_of(b"<metadata><dc:title>lost") == Words()


@pytest.mark.parametrize(
    ("stem", "creator", "title"),
    [
        ("2_dead_frogs_lumen_desig_01", "Lumen Design Studio", "2 dead frogs"),
        ("cd_architetto_francesco__01", "Architetto Francesco Rollandin", "cd"),
        ("pattern-triangle-squares-3", "Alan Horkan", "pattern triangle squares"),
        ("jane", "Jane Doe", "jane"),
        ("01", "", "01"),
        ("frog_02", "", "frog"),
    ],
)
def test_titles_out_of_file_names(stem, creator, title):
    assert file_title(stem, creator) == title


def test_captions_say_nothing_twice_and_name_no_people():
    said = Words(description="A frog.", keywords=("frogs", "Jane", "lemon_theme", "pond"), creator="jane")
    assert clip_caption("A Frog", said, ("animals", "unsorted")) == "clip art of a frog, pond, animals"
    many = Words(description="d" * 121, keywords=tuple("bcefghjk"))
    assert clip_caption("X", many, ()) == "clip art of x, b, c, e, f, g, h"


# ---- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Puts an ``apt-get`` in the path that runs the given shell lines."""

    def install(script):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "apt-get").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return install


def test_a_package_is_fetched_once_and_checked(tmp_path, apt):
    package = pack_deb(tmp_path / "pool", "frogs", [("a", b"b")])
    apt(f'test "$1 $2" = "download frogs=1:2.0-1" && cp {tmp_path}/pool/*.deb . && echo called >> {tmp_path}/calls')
    for _ in range(2):
        path = fetch(package, tmp_path / "cache", None)
        assert path.read_bytes() == (tmp_path / "pool" / package.deb).read_bytes()
    assert (tmp_path / "calls").read_text() == "called\n"
    apt(f"cp {tmp_path}/calls .")
    with pytest.raises(InputError, match=r"frogs=1:2.0-1: apt-get brought a file with sha256 .*pinned"):
        fetch(package, tmp_path / "other", None)
    apt("echo 'E: no such version' >&2; exit 100")
    with pytest.raises(InputError, match=r"apt-get download frogs=1:2.0-1 failed with exit code 100 \(E: no such vers"):
        fetch(package, tmp_path / "other", None)


def test_without_apt_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    package = Package(name="frogs", version="1:2.0-1", sha256="0" * 64)
    with pytest.raises(InputError, match=r"apt-get is not installed, .*put frogs_1%3a2.0-1_all.deb into .*yourself"):
        fetch(package, tmp_path / "cache", None)


def test_a_folder_of_packages_has_to_have_the_pinned_ones(tmp_path):
    package = pack_deb(tmp_path / "debs", "frogs", [("a", b"b")])
    (tmp_path / "debs" / "frogs_0_all.deb").write_bytes(b"another")
    assert fetch(package, tmp_path / "cache", tmp_path / "debs").name == package.deb
    (tmp_path / "debs" / package.deb).rename(tmp_path / "debs" / "frogs_2.deb")  # as browsers call it
    assert fetch(package, tmp_path / "cache", tmp_path / "debs").name == "frogs_2.deb"
    (tmp_path / "debs" / "frogs_2.deb").unlink()
    with pytest.raises(InputError, match=r"only frogs_0_all.deb, another one; it should hold frogs_1%3a2.0-1_all.deb"):
        fetch(package, tmp_path / "cache", tmp_path / "debs")
    with pytest.raises(InputError, match="there is no such file"):
        fetch(package, tmp_path / "cache", tmp_path / "nowhere")


def test_reading_a_package_gives_the_plain_files_of_one_folder(tmp_path):
    evil = [
        member("./a/link.png", tarfile.SYMTYPE, "/etc/passwd"),
        member("./a/pipe.png", tarfile.FIFOTYPE),
        member("/a/abs.png", tarfile.REGTYPE),
    ]
    package = pack_deb(tmp_path, "frogs", [("a/b/x.png", b"1"), *evil, ("c/y.png", b"2"), ("a/z.txt", b"3")])
    read = list(read_members(tmp_path / package.deb, "a/", (".png",)))
    assert [item for item in read if not isinstance(item, Drop)] == [("b/x.png", b"1")]
    assert [item.reason for item in read if isinstance(item, Drop)] == [
        "link to another picture",
        "not a plain file in a tar",
        "unsafe path in a tar",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"!<arch>\n",
        b"PK\x03\x04 a zip",
        ar([("debian-binary", b"2.0\n"), ("data.tar.xz", b"not xz")]),
        ar([("debian-binary", b"2.0\n")]) + b"cut header",
        ar([("debian-binary", b"2.0\n")]).replace(b"4         `", b"-60       `"),  # back to where it was, for ever
    ],
)
def test_what_is_no_package_gets_a_sentence(tmp_path, content):
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(InputError, match=r"x.deb: is no Debian package or damaged"):
        list(read_members(tmp_path / "x.deb", "", (".png",)))


def test_a_package_that_unpacks_to_more_than_there_is_room_for(tmp_path, monkeypatch):
    package = pack_deb(tmp_path, "frogs", [("a/big.png", bytes(10_000)), ("a/b.png", bytes(10_000))])
    monkeypatch.setattr(deb, "FILE_BYTES", 9_999)
    read = list(read_members(tmp_path / package.deb, "a/", (".png",)))
    assert [item.reason for item in read] == ["file too large"] * 2
    monkeypatch.setattr(deb, "UNPACKED", 15_000)
    with pytest.raises(InputError, match="unpacks to more than 15000 bytes"):
        list(read_members(tmp_path / package.deb, "a/", (".png",)))


@pytest.mark.slow
def test_real_clip_art(tmp_path):
    """The real packages, by the machine's apt-get: counts, shapes, and what is left out."""
    assert build("clipart", "--out", tmp_path / "real", "--size", 64, "--workers", 2) == 0
    told = manifest(tmp_path / "real")
    assert told["dropped"]["one more gramastar"] == 1335
    assert told["dropped"]["link to another picture"] == 1221
    assert sum(split["samples"] for split in told["splits"].values()) > 6400
    assert min(told["aspects"].values()) > 30
