"""Encoded images to tensors: as Pillow decodes them, resized and cut as documented; the damaged ones are named."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.make_shards import pixels, png
from mpdit.data.decode import MAX_PIXELS, damaged, decode, header_fault
from mpdit.errors import InputError


def as_bytes(images_BCHW: torch.Tensor) -> np.ndarray:
    """uint8 (B, H, W, C); off by a rounding error at most, or the test fails."""
    scaled = images_BCHW.double() * 127.5 + 127.5
    assert (scaled - scaled.round()).abs().max() < 1e-3
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def encode(image: np.ndarray, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "settings"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"lossless": True})])
def test_decodes_as_pillow_does(kind: str, settings: dict) -> None:
    smooth = np.add.outer(np.arange(24) * 5, np.arange(24) * 3)[..., None] + np.array([0, 30, 60])
    data = encode(smooth.astype(np.uint8), kind, **settings)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    found = as_bytes(decode([data], 24, 24))[0]
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_values_span_minus_one_to_one() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, 2:] = 255
    images = decode([png(image)], 4, 4)
    assert images.min() == -1
    assert images.max() == 1


def test_other_aspect_ratios_lose_their_edges_evenly() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = pixels(0, 8)
    tall = wide.transpose(1, 0, 2)
    images = as_bytes(decode([png(wide), png(np.ascontiguousarray(tall))], 8, 8))
    assert np.array_equal(images[0], pixels(0, 8))
    assert np.array_equal(images[1], pixels(0, 8).transpose(1, 0, 2))


def test_shrinking_is_smoothed() -> None:
    """A checkerboard must become grey, not keep every other square."""
    board = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)
    images = decode([png(np.stack([board] * 3, -1))], 16, 16)
    assert images.abs().max() < 0.05


def test_gray() -> None:
    gray = pixels(0)[..., 0]
    images = decode([png(gray), png(np.stack([gray] * 3, -1)), encode(gray, "JPEG")], 16, 16, channels=1)
    assert images.shape == (3, 1, 16, 16)
    assert np.array_equal(as_bytes(images[:2])[..., 0], [gray, gray])
    assert np.array_equal(as_bytes(decode([png(gray)], 16, 16))[0], np.stack([gray] * 3, -1))


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(InputError, match=r"model.channels is 4"):
        decode([png(pixels(0))], 16, 16, channels=4)


def test_decode_in_several_chunks() -> None:
    samples = range(70)
    images = decode([png(pixels(sample)) for sample in samples], 16, 16, mirrored=np.arange(70) % 2 == 1)
    wanted = [pixels(sample)[:, ::-1] if sample % 2 else pixels(sample) for sample in samples]
    assert np.array_equal(as_bytes(images), wanted)
    assert decode([], 16, 16).shape == (0, 3, 16, 16)


DAMAGE = {
    "junk": b"no image at all",
    "empty": b"",
    "cut": png(pixels(5))[:300],
    "flipped": png(pixels(5)).replace(b"IDAT", b"IDAT\xff"),
}


def test_decode_names_the_damaged_image() -> None:
    images = [png(pixels(0)), b"junk", png(pixels(1))]
    with pytest.raises(InputError, match="image 1 of 3: is damaged"):
        decode(images, 16, 16)
    with pytest.raises(InputError, match="b: is damaged"):
        decode(images, 16, 16, names=["a", "b", "c"])


def test_the_damaged_ones_are_found_among_many() -> None:
    images = [png(pixels(number)) for number in range(13)]
    assert damaged(images, 3) == []
    assert damaged([], 3) == []
    for number, junk in zip((0, 6, 12), DAMAGE.values(), strict=False):
        images[number] = junk
    assert damaged(images, 3) == [0, 6, 12]


def bomb(height: int, width: int) -> bytes:
    """A PNG whose header says so; its pixels are not there."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    whole = png(pixels(0))
    return whole[:12] + head + zlib.crc32(head).to_bytes(4, "big") + whole[33:]


def test_a_header_tells_junk_bombs_and_other_sizes() -> None:
    good = encode(np.zeros((20, 30, 3), np.uint8), "JPEG")
    assert header_fault(good, (20, 30)) is None
    assert header_fault(good, (30, 20)) is None  # an EXIF note may lay it on its side
    assert header_fault(good, (20, 20)) == "image of another size"
    assert header_fault(b"", (20, 20)) == header_fault(b"junk", (20, 20)) == "no image"
    side = int(MAX_PIXELS**0.5)
    assert header_fault(bomb(side, side), (side, side)) is None
    assert header_fault(bomb(side, side + 1), (side, side + 1)) == "image too large"
    assert header_fault(bomb(60000, 60000), (60000, 60000)) == "image too large"
