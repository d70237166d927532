"""Icons out of npm packages made by hand: fetching, words, selection, and the split by concept."""

import dataclasses
import hashlib
import io
import stat
from pathlib import Path

import pytest
from data_sets import build, manifest, pack, samples, tree
from PIL import Image

from mpdit.errors import InputError
from mpdit_tools.data import icons as icons_module
from mpdit_tools.data import packages
from mpdit_tools.data.build import Options
from mpdit_tools.data.build import build as build_source
from mpdit_tools.data.icons import CATALOGUE, Catalogue, Icons, Style
from mpdit_tools.data.npm import Package, fetch
from mpdit_tools.data.packages import default_cache

COLOURS = {"red": "#f00", "green": "#0f0", "blue": "#00f"}
TONES = ("light", "dark")


def words() -> dict[str, object]:
    """emojibase-like data: nine coloured shapes, and a hand in two skin tones."""
    entries = [
        {
            "hexcode": f"1F{row}0{column}-FE0F",
            "label": f"{colour} {shape}",
            "group": 1,
            "subgroup": row,
            "tags": [shape],
        }
        for row, shape in enumerate(("heart", "circle", "square"))
        for column, colour in enumerate(COLOURS)
    ]
    skins = [{"hexcode": f"1F44B-1F3F{tone}", "label": f"hand: {name} skin tone"} for tone, name in enumerate(TONES)]
    entries.append({"hexcode": "1F44B", "label": "hand", "group": 0, "subgroup": 3, "skins": skins})
    names = ["hearts", "round / circles", "squares", "hands"]
    return {
        "en/data.json": entries,
        "en/messages.json": {
            "groups": [{"order": 0, "message": "people"}, {"order": 1, "message": "shapes & colors"}],
            "subgroups": [{"order": order, "message": name} for order, name in enumerate(names)],
        },
    }


def drawing(number: int, *, background: str = "none") -> str:
    shade = list(COLOURS.values())[number % 3]
    return (
        f'<rect width="64" height="64" fill="{background}"/><circle cx="32" cy="32" r="{6 + number}" fill="{shade}"/>'
    )


def iconify() -> dict[str, object]:
    """An icon set that spells two names in its own way, has an unknown icon, a hidden, a broken and a doubled one."""
    labels = [entry["label"] for entry in words()["en/data.json"]]
    icons = {label.replace(" ", "-"): {"body": drawing(number)} for number, label in enumerate(labels)}
    icons |= {f"hand-{tone}": {"body": drawing(20 + number)} for number, tone in enumerate(TONES)}
    icons["love"] = icons.pop("red-heart")
    icons["teapot"] = {"body": drawing(15)}
    icons["tall-teapot"] = {"body": drawing(18), "width": 64, "height": 96}
    icons["hidden"] = {"body": drawing(16), "hidden": True}
    icons["broken"] = {"body": "<g"}
    icons["zz-double"] = icons["teapot"]
    chars = {"1f000": "love", "1f44b-1f3f0": "hand-light", "1f44b-1f3f1": "hand-dark"}
    return {"icons.json": {"icons": icons, "width": 64, "height": 64}, "chars.json": chars}


def openmoji() -> dict[str, object]:
    """OpenMoji-like: the same emoji as files, and one of its own."""
    entries, files = [], {}
    for number, entry in enumerate([*words()["en/data.json"], {"hexcode": "E000", "label": "a lab flask"}]):
        code = entry["hexcode"].replace("-FE0F", "")
        entries.append(
            {"hexcode": code, "annotation": entry["label"], "tags": "x, y", "openmoji_tags": "", "group": "extras-lab"}
            | {"subgroups": "flasks"}
        )
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{drawing(number, background="#eee")}</svg>'
        files[f"color/svg/{code}.svg"] = svg
    return {"data/openmoji.json": entries, **files}


@pytest.fixture
def catalogue(tmp_path) -> Catalogue:
    """Three styles; the second has no code points of its own, as ``fluent`` has none."""
    cache = tmp_path / "cache"
    first = pack(cache, "@sets/first", iconify())
    blank = pack(cache, "@sets/blank", iconify() | {"chars.json": {}})
    return Catalogue(
        words=pack(cache, "words", words()),
        styles=(
            Style(name="first", licence="MIT", package=first, layout="iconify"),
            Style(name="blank flat", licence="MIT", package=blank, layout="iconify", names=first),
            Style(
                name="openmoji", licence="CC-BY-SA-4.0", package=pack(cache, "openmoji", openmoji()), layout="openmoji"
            ),
        ),
    )


@pytest.fixture
def run(tmp_path, catalogue, monkeypatch):
    """Builds the hand-made icons through the command line."""
    monkeypatch.setattr(icons_module, "CATALOGUE", catalogue)
    monkeypatch.setattr(packages.shutil, "which", lambda name: pytest.fail("npm was asked for"))
    return lambda out, *arguments: build("icons", "--out", out, "--cache", tmp_path / "cache", *arguments)


def all_samples(out: Path) -> list[dict]:
    return samples(out, "train") + samples(out, "val")


def test_the_pinned_packages_are_those_of_the_notes():
    hashes = {style.package.name: style.package.sha256 for style in CATALOGUE.styles}
    assert [style.name for style in CATALOGUE.styles] == ["noto", "twemoji", "fluent", "fluent flat", "openmoji"]
    assert all(len(value) == 64 for value in hashes.values())
    assert CATALOGUE.words.tarball == "emojibase-data-17.0.0.tgz"
    assert CATALOGUE.styles[0].package.tarball == "iconify-json-noto-1.2.9.tgz"


def test_icons_get_words_and_origin(tmp_path, run):
    out = tmp_path / "out"
    assert run(out) == 0
    found = {sample["txt"]: sample["json"] for sample in all_samples(out)}
    assert found["red heart, first style"] == {
        "label": "red heart",
        "style": "first",
        "tags": ["heart"],
        "group": "shapes & colors",
        "subgroup": "hearts",
        "code": "1f000",
        "license": "MIT",
    }
    assert found["hand, light skin tone, first style"]["group"] == "people"
    assert found["teapot, first style"]["code"] == ""
    assert found["a lab flask, openmoji style"]["group"] == "extras lab"
    assert found["green circle, openmoji style"]["license"] == "CC-BY-SA-4.0"
    told = manifest(out)
    # The two iconify sets hold the same pictures; which of a pair is used is up to the shuffle.
    assert told["styles"]["openmoji"] == 11
    assert sum(told["styles"].values()) == 25
    assert told["dropped"] == {"cannot be drawn": 2, "duplicate": 16}
    assert sum(told["licences"].values()) == 25
    assert [entry["name"] for entry in told["sources"]] == ["@sets/first", "@sets/blank", "openmoji", "words"]
    assert sum(entry["images"] for entry in told["sources"]) == 25


def test_a_style_without_code_points_borrows_them(tmp_path, run):
    out = tmp_path / "out"
    assert run(out, "--styles", "blank-flat") == 0
    assert "hand, dark skin tone, blank flat style" in {sample["txt"] for sample in all_samples(out)}
    assert [entry["name"] for entry in manifest(out)["sources"]] == ["@sets/blank", "@sets/first", "words"]


def test_icons_are_drawn_on_white_and_centred(tmp_path, run):
    out = tmp_path / "out"
    assert run(out, "--styles", "first", "--size", 32) == 0
    pictures = {sample["json"]["label"]: Image.open(io.BytesIO(sample["png"])) for sample in all_samples(out)}
    assert {(image.size, image.mode) for image in pictures.values()} == {((32, 32), "RGB")}
    assert all(image.getpixel((0, 0)) == (255, 255, 255) for image in pictures.values())
    assert pictures["blue heart"].getpixel((16, 16)) == (0, 0, 255)
    tall = pictures["tall teapot"]  # 64 x 96: a third of the size, with white on both sides
    assert tall.getpixel((16, 32 // 3)) != (255, 255, 255)
    assert {tall.getpixel((x, 10)) for x in (*range(5), *range(27, 32))} == {(255, 255, 255)}


def test_a_concept_is_in_one_split_in_all_styles_and_skin_tones(tmp_path, run):
    for val in (0.1, 0.3, 0.5, 0.7):
        out = tmp_path / f"out{val}"
        assert run(out, "--val", val) == 0
        labels = [
            {sample["json"]["label"].split(",")[0] for sample in samples(out, split)} for split in ("train", "val")
        ]
        assert all(labels)
        assert not labels[0] & labels[1]


def test_the_same_build_has_the_same_bytes_and_needs_no_packages_again(tmp_path, run):
    assert run(tmp_path / "a") == 0
    assert run(tmp_path / "b", "--workers", 2) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    assert run(tmp_path / "a") == 0


@pytest.mark.parametrize(
    ("match", "labels"),
    [
        ("red", {"red circle", "red square", "red heart"}),
        ("HEART, teapot", {"red heart", "green heart", "blue heart", "teapot", "tall teapot"}),
        ("ed", None),
        ("red heart", {"red heart"}),
        ("group:people", {"hand", "hand, light skin tone", "hand, dark skin tone"}),
        ("subgroup:round-circles", {"red circle", "green circle", "blue circle"}),
        ("subgroup:Round / Circles,lab", {"red circle", "green circle", "blue circle", "a lab flask"}),
        ("group:peopel", None),
        ("red,haert", None),
    ],
)
def test_match_selects_whole_words_and_groups(tmp_path, run, capsys, match, labels):
    out = tmp_path / "out"
    code = run(out, "--match", match)
    if labels is None:
        assert code == 2
        wrong = match.split(",")[-1]
        assert f"--match: {wrong!r} selects no icon; " in capsys.readouterr().err
        assert not out.exists()
    elif len(labels) == 1 or match == "group:people":
        assert code == 2
        assert "two different captions" in capsys.readouterr().err
    else:
        assert code == 0
        assert {sample["json"]["label"] for sample in all_samples(out)} == labels


def test_limit_takes_the_first_of_the_shuffle(tmp_path, run):
    assert run(tmp_path / "ten", "--styles", "openmoji", "--limit", 10) == 0
    assert run(tmp_path / "six", "--styles", "openmoji", "--limit", 6) == 0
    assert run(tmp_path / "other", "--styles", "openmoji", "--limit", 6, "--seed", 1) == 0
    ten, six, other = ({sample["txt"] for sample in all_samples(tmp_path / name)} for name in ("ten", "six", "other"))
    assert len(six) == 6
    assert six < ten
    assert other != six


def test_a_limit_of_nothing_is_refused(tmp_path, run, capsys):
    assert run(tmp_path / "out", "--limit", 0) == 2
    assert "--limit 0" in capsys.readouterr().err


def test_an_unknown_style_gets_a_suggestion(tmp_path, run, capsys):
    assert run(tmp_path / "out", "--styles", "first,opnmoji") == 2
    error = capsys.readouterr().err
    assert "'opnmoji'" in error
    assert "did you mean 'openmoji'?" in error


# -- fetching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """Puts an ``npm`` in the path that runs the given shell lines."""

    def install(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "npm").chmod(0o755 | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return install


def test_a_package_is_fetched_once_and_checked(tmp_path, fake_npm):
    package = pack(tmp_path / "registry", "@sets/first", iconify())
    fake_npm(f'test "$4" = "@sets/first@1.0.0" && cp {tmp_path}/registry/*.tgz . && echo called >> {tmp_path}/calls')
    cache = tmp_path / "new" / "cache"
    path = fetch(package, cache)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    assert fetch(package, cache) == path
    assert (tmp_path / "calls").read_text() == "called\n"
    path.write_bytes(path.read_bytes()[:-1])  # a damaged file in the cache is fetched again
    assert hashlib.sha256(fetch(package, cache).read_bytes()).hexdigest() == package.sha256
    assert [entry.name for entry in cache.iterdir()] == [package.tarball]


def test_another_tarball_than_the_pinned_one_is_refused(tmp_path, fake_npm):
    package = pack(tmp_path / "registry", "@sets/first", iconify())
    fake_npm(f"cp {tmp_path}/registry/*.tgz .")
    wrong = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(InputError, match=r"@sets/first@1\.0\.0: npm brought a file with sha256"):
        fetch(wrong, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_npm_failing_or_missing_gets_a_sentence(tmp_path, fake_npm, monkeypatch):
    package = Package(name="words", version="1.0.0", sha256="0" * 64)
    fake_npm("echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(InputError, match=r"npm pack words@1\.0\.0 failed with exit code 1 \(npm error code E404\)"):
        fetch(package, tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"npm is not installed.*put words-1\.0\.0\.tgz into"):
        fetch(package, tmp_path / "cache")


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache("npm") == Path("/somewhere/mpdit/npm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache("npm") == Path("/home/someone/.cache/mpdit/npm")


@pytest.mark.slow
def test_real_icons(tmp_path):
    assert build("icons", "--out", tmp_path / "real", "--size", 32, "--limit", 60, "--workers", 2) == 0
    told = manifest(tmp_path / "real")
    assert sum(split["samples"] for split in told["splits"].values()) + sum(told["dropped"].values()) == 60
    assert set(told["styles"]) == {style.name for style in CATALOGUE.styles}
    source = Icons(size=32, styles=[], match="", limit=None, seed=0, cache=default_cache("npm"), catalogue=CATALOGUE)
    assert len(source.jobs()) == 18_471


def test_builders_can_be_called_without_the_command_line(tmp_path, catalogue):
    source = Icons(
        size=16, styles=["first"], match="", limit=None, seed=0, cache=tmp_path / "cache", catalogue=catalogue
    )
    options = Options(
        out=tmp_path / "out", val=0.2, vocab_size=400, per_shard=4, max_dropped=0.5, workers=1, overwrite=False
    )
    steps = []
    result = build_source(source, options, lambda what, done, total: steps.append((what, done, total)))
    assert result.built
    assert result.manifest == manifest(tmp_path / "out")
    assert ("rendering", 16, 16) in steps
