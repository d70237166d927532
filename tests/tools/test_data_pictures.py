"""Single pictures and captions: what is made of them, and that no damage gets through as an error."""

import io
import random

import pytest
from data_sets import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mpdit_tools.data import images
from mpdit_tools.data.captions import clean_caption, is_outside
from mpdit_tools.data.images import Shape, Unusable, render


def test_alpha_is_flattened_and_exif_applied():
    red_under_alpha = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    data = io.BytesIO()
    red_under_alpha.save(data, "PNG")
    png = render(data.getvalue(), Shape(size=16)).png
    assert Image.open(io.BytesIO(png)).getextrema() == ((255, 255),) * 3
    lying = Image.new("RGB", (60, 40), "white")
    lying.paste((0, 0, 255), (0, 0, 60, 20))  # blue above, white below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: blue comes to the right
    data = io.BytesIO()
    lying.save(data, "PNG", exif=exif, icc_profile=b"of a camera")
    found = render(data.getvalue(), Shape(size=16))
    assert (found.original_width, found.original_height) == (40, 60)
    image = Image.open(io.BytesIO(found.png))
    assert image.getpixel((15, 8)) == (0, 0, 255)
    assert image.getpixel((0, 8)) == (255, 255, 255)
    assert not image.info


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(8, 64))
def test_kept_shapes_have_the_area_and_are_never_enlarged(width, height, size):
    shape = Shape(size=size, aspect="keep")
    found = render(picture(1, size=(width, height)), shape)
    assert Image.open(io.BytesIO(found.png)).size == (found.width, found.height)
    used_width, used_height = min(width, 4 * height), min(height, 4 * width)
    assert found.cut == ((used_width, used_height) != (width, height))
    assert found.width <= used_width
    assert found.height <= used_height
    assert max(found.width, found.height) <= 4 * size
    scale = min(1, size / (used_width * used_height) ** 0.5)
    assert abs(found.width - used_width * scale) <= 0.5
    assert abs(found.height - used_height * scale) <= 0.5


@pytest.mark.parametrize("lying", [True, False])
def test_what_is_too_long_is_cut_about_the_centre(lying):
    image = Image.new("RGB", (100, 10), "white")
    image.paste((255, 0, 0), (0, 0, 30, 10))
    image.paste((0, 0, 255), (70, 0, 100, 10))
    data = io.BytesIO()
    (image if lying else image.transpose(Image.Transpose.ROTATE_90)).save(data, "PNG")
    found = render(data.getvalue(), Shape(size=64, aspect="keep"))
    assert (found.width, found.height) == ((40, 10) if lying else (10, 40))
    assert found.cut
    assert Image.open(io.BytesIO(found.png)).getextrema() == ((255, 255),) * 3


def test_large_pictures_are_flattened_as_small_ones_are(monkeypatch):
    """In bands, whose borders no pixel may show."""
    image = Image.frombytes("RGBA", (31, 37), random.Random(0).randbytes(31 * 37 * 4))
    whole = images.flatten(image)
    monkeypatch.setattr(images, "BAND", 100)
    assert images.flatten(image).tobytes() == whole.tobytes()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    data = io.BytesIO()
    Image.new("I;16", (20, 20), 32_896).save(data, "PNG")
    png = render(data.getvalue(), Shape(size=16)).png
    assert Image.open(io.BytesIO(png)).getextrema() == ((128, 128),) * 3


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@settings(max_examples=40, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8), cut=st.integers(0, 5000))
def test_damaged_pictures_are_unusable_or_used_never_an_error(format, edits, cut):
    data = bytearray(picture(7, format=format))
    for where, value in edits:
        data[where % len(data)] = value
    try:
        png = render(bytes(data[: max(cut, 1)]), Shape(size=16)).png
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
