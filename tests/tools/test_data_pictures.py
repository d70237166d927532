"""Single pictures and captions: what is made of them, and that no damage gets through as an error."""

import io

import pytest
from data_sets import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mpdit_tools.data.captions import clean_caption, is_outside
from mpdit_tools.data.images import Unusable, square


def test_alpha_is_flattened_and_exif_applied():
    red_under_alpha = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    data = io.BytesIO()
    red_under_alpha.save(data, "PNG")
    png, _, _ = square(data.getvalue(), size=16, min_side=1)
    assert Image.open(io.BytesIO(png)).getextrema() == ((255, 255),) * 3
    lying = Image.new("RGB", (60, 40), "white")
    lying.paste((0, 0, 255), (0, 0, 60, 20))  # blue above, white below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: blue comes to the right
    data = io.BytesIO()
    lying.save(data, "PNG", exif=exif, icc_profile=b"of a camera")
    png, width, height = square(data.getvalue(), size=16, min_side=1)
    assert (width, height) == (40, 60)
    image = Image.open(io.BytesIO(png))
    assert image.getpixel((15, 8)) == (0, 0, 255)
    assert image.getpixel((0, 8)) == (255, 255, 255)
    assert not image.info


def test_sixteen_bit_grey_is_scaled_not_clipped():
    data = io.BytesIO()
    Image.new("I;16", (20, 20), 32_896).save(data, "PNG")
    png, _, _ = square(data.getvalue(), size=16, min_side=1)
    assert Image.open(io.BytesIO(png)).getextrema() == ((128, 128),) * 3


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@settings(max_examples=40, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8), cut=st.integers(0, 5000))
def test_damaged_pictures_are_unusable_or_used_never_an_error(format, edits, cut):
    data = bytearray(picture(7, format=format))
    for where, value in edits:
        data[where % len(data)] = value
    try:
        png, _, _ = square(bytes(data[: max(cut, 1)]), size=16, min_side=1)
    except Unusable:
        return
    assert Image.open(io.BytesIO(png)).size == (16, 16)


@given(st.text())
def test_clean_captions_are_one_printable_line(text):
    try:
        caption = clean_caption(text.encode(errors="surrogatepass"))
    except Unusable:
        return
    assert caption == " ".join(caption.split()) != ""
    assert clean_caption(caption.encode()) == caption


@pytest.mark.parametrize("name", ["/a", "../a", "a/../../b", "a/..", "C:/a", "..\\a", "", "//a"])
def test_names_that_point_outside(name):
    assert is_outside(name)


@pytest.mark.parametrize("name", ["a", "a/b.c", "./a", "a..b", "..a/b"])
def test_names_that_stay_inside(name):
    assert not is_outside(name)
