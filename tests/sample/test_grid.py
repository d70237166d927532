"""What a person looks at: every picture whole and in its place, with its words under it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpdit.sample.grid import grid, save, to_image

WHITE, GAP, LABEL = 255, 6, 30


def pictures(count: int, side: int = 16, channels: int = 3) -> torch.Tensor:
    """Images in [-1, 1] whose 8-bit values are known: those of :func:`pixels`."""
    return torch.from_numpy(pixels(count, side, channels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pixels(count: int, side: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)


def cell(sheet: Image.Image, number: int, columns: int, size: int) -> np.ndarray:
    """The picture with this number, cut out of a grid."""
    row, column = divmod(number, columns)
    x, y = GAP + column * (size + GAP), GAP + row * (size + LABEL + GAP)
    return np.asarray(sheet)[y : y + size, x : x + size]


def label(sheet: Image.Image, number: int, columns: int, size: int) -> np.ndarray:
    row, column = divmod(number, columns)
    x, y = GAP + column * (size + GAP), GAP + row * (size + LABEL + GAP) + size
    return np.asarray(sheet)[y : y + LABEL, x : x + size]


# ---- one image -------------------------------------------------------------------------------------------------------


def test_minus_one_to_one_is_black_to_white() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0, -7.0, 9.0]).expand(3, 1, 5)
    assert np.asarray(to_image(image))[0, :, 0].tolist() == [0, 128, 255, 0, 255]


def test_every_8_bit_value_comes_back_in_its_channel() -> None:
    made = to_image(pictures(1)[0])
    assert made.mode == "RGB"
    assert np.array_equal(np.asarray(made), pixels(1, 16, 3)[0])


def test_one_channel_is_a_gray_image() -> None:
    made = to_image(pictures(1, channels=1)[0])
    assert made.mode == "L"
    assert np.array_equal(np.asarray(made), pixels(1, 16, 1)[0, :, :, 0])


def test_bf16_and_oblong_images() -> None:
    image = torch.zeros(3, 2, 5, dtype=torch.bfloat16)
    assert to_image(image).size == (5, 2)


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "columns", "rows", "shown"),
    [(1, 0, 1, 1), (4, 0, 2, 2), (12, 0, 3, 4), (16, 0, 4, 4), (5, 5, 1, 5), (5, 2, 3, 2), (7, 3, 3, 3)],
)
def test_size(count: int, columns: int, rows: int, shown: int) -> None:
    sheet = grid(pictures(count), ["a"] * count, columns)
    assert sheet.mode == "RGB"
    assert sheet.size == (shown * (128 + GAP) + GAP, rows * (128 + LABEL + GAP) + GAP)


@pytest.mark.parametrize(("side", "size"), [(16, 128), (32, 128), (12, 120), (100, 100), (128, 128), (200, 200)])
def test_every_picture_is_found_unchanged_in_its_place(side: int, size: int) -> None:
    """Enlarged by whole numbers, nearest neighbour: each pixel becomes a block."""
    sheet = grid(pictures(5, side), ["a"] * 5, columns=2)
    for number, picture in enumerate(pixels(5, side, 3)):
        found = cell(sheet, number, 2, size)
        assert np.array_equal(found, picture.repeat(size // side, 0).repeat(size // side, 1))


def test_tall_pictures_stand_in_more_columns_than_rows() -> None:
    """Whole, and the sheet about as wide as high: 4 times 3 cells of 128 x (384 + label), and not 3 times 4."""
    tall = torch.cat([pictures(8)] * 3, 2)
    sheet = grid(tall, ["a"] * 8)
    assert sheet.size == (5 * (128 + GAP) + GAP, 2 * (384 + LABEL + GAP) + GAP)
    found = np.asarray(sheet)[GAP : GAP + 384, GAP : GAP + 128]
    assert np.array_equal(found, np.tile(pixels(8, 16, 3)[0], (3, 1, 1)).repeat(8, 0).repeat(8, 1))


def test_gray_pictures_are_gray_in_the_grid() -> None:
    sheet = grid(pictures(2, channels=1), ["a", "b"], columns=2)
    for number, picture in enumerate(pixels(2, 16, 1)):
        assert np.array_equal(cell(sheet, number, 2, 128), picture.repeat(8, 0).repeat(8, 1).repeat(3, 2))


def test_places_without_a_picture_stay_white() -> None:
    sheet = grid(pictures(3), ["a"] * 3, columns=2)
    assert (cell(sheet, 3, 2, 128) == WHITE).all()
    assert (label(sheet, 3, 2, 128) == WHITE).all()


def test_each_label_is_drawn_under_its_own_picture() -> None:
    words = ["red heart", "", "a cat with a wry smile", "日本"]
    sheet = grid(pictures(4), words, columns=2)
    inked = [int((label(sheet, number, 2, 128) < 128).sum()) for number in range(4)]
    assert inked[1] == 0
    assert 0 < inked[0] < inked[2]
    alone = grid(pictures(1), ["red heart"])
    assert np.array_equal(label(alone, 0, 1, 128), label(sheet, 0, 2, 128))


def test_a_long_label_is_wrapped_and_cut_and_stays_under_its_picture() -> None:
    """Two lines of whole words; nothing runs into the neighbour or the row below."""
    sheet = grid(pictures(4), ["many words " * 30, "", "", ""], columns=2)
    own = label(sheet, 0, 2, 128)
    assert (own[:15] < 128).any()
    assert (own[15:] < 128).any(), "a second line"
    between = np.asarray(sheet)[GAP + 128 : GAP + 128 + LABEL, GAP + 128 : 2 * GAP + 128]
    assert (between == WHITE).all()
    below = np.asarray(sheet)[GAP + 128 + LABEL : 2 * GAP + 128 + LABEL]
    assert (below == WHITE).all()


def test_one_endless_word_does_not_cover_its_neighbour() -> None:
    """Captions in Chinese or Japanese have no spaces at all."""
    sheet = grid(pictures(2), ["x" * 200, ""], columns=2)
    assert (label(sheet, 1, 2, 128) == WHITE).all()


def test_captions_have_to_be_as_many_as_pictures() -> None:
    with pytest.raises(ValueError, match="zip"):
        grid(pictures(2), ["a"])


def test_save_makes_the_folder_and_a_lossless_png(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "picture.png"
    assert save(to_image(pictures(1)[0]), path) == path
    with Image.open(path) as found:
        assert found.format == "PNG"
        assert np.array_equal(np.asarray(found), pixels(1, 16, 3)[0])
