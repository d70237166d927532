"""Pixels: decoding what cannot be trusted, alpha onto white, a square or the picture's own shape, PNG out."""

import dataclasses
import io
import math
import warnings

from PIL import Image, ImageOps

from mpdit_tools.data.samples import LONGEST, Aspect

PIXELS = 64_000_000  # more is refused by the header alone, before anything is decoded
FILE_BYTES = 256 * 2**20
BAND = 2**20  # pixels flattened at a time
# Formats that Pillow decodes itself: none of them runs another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class Unusable(Exception):
    """A picture or caption that has to be dropped. ``reason`` is a short phrase to count by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What every picture of a set is brought to.

    ``square``: cut to a square about the centre, of ``size`` pixels a side. ``keep``: in its own ratio of width to
    height, cut to `LONGEST` about the centre where it is more extreme, made smaller to an area of about ``size`` x
    ``size``, never larger. A picture with a side shorter than ``min_side`` is not used.
    """

    size: int
    min_side: int = 1
    aspect: Aspect = "square"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture as it is stored, with the measures in pixels of what it was made from."""

    png: bytes
    height: int
    width: int
    original_height: int
    original_width: int
    cut: bool  # more extreme than `LONGEST`

    @classmethod
    def of(cls, image: Image.Image, original: tuple[int, int], *, cut: bool = False) -> "Picture":
        """``image`` encoded; ``original``: width and height."""
        width, height = original
        return cls(
            png=encode_png(image),
            height=image.height,
            width=image.width,
            original_height=height,
            original_width=width,
            cut=cut,
        )


def flatten(image: Image.Image) -> Image.Image:
    """The picture in RGB, with what is transparent made white. Decoders drop alpha and show what lies beneath."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    flat = Image.new("RGB", image.size)
    rows = max(1, BAND // image.width)  # in bands: three copies of a large picture would fill the memory
    for top in range(0, image.height, rows):
        layered = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        white.alpha_composite(layered)
        flat.paste(white.convert("RGB"), (0, top))
    return flat


def encode_png(image: Image.Image) -> bytes:
    """The picture as PNG, without any metadata."""
    bare = Image.new(image.mode, image.size)
    bare.paste(image)
    data = io.BytesIO()
    bare.save(data, "PNG")
    return data.getvalue()


def render(data: bytes, shape: Shape) -> Picture:
    """A picture file of any format in the shape that is wanted.

    Turned as EXIF says, cut, flattened on white, resized. Of an animation the first frame is taken; colour profiles
    are left out of account. Raises Unusable for whatever is not a picture, is damaged, has more than `PIXELS` pixels,
    or is too small.
    """
    if not data:
        raise Unusable("empty file")
    with warnings.catch_warnings():
        # What Pillow warns of (odd metadata, many pixels) is either harmless or refused here with a reason.
        warnings.simplefilter("ignore")
        return _render(data, shape)


def _render(data: bytes, shape: Shape) -> Picture:
    image = _open(data)
    if image.width * image.height > PIXELS:
        raise Unusable("too many pixels", f"{image.width} x {image.height}")
    if min(image.size) < shape.min_side:
        raise Unusable("too small", f"{image.width} x {image.height}")
    try:
        ImageOps.exif_transpose(image, in_place=True)
        original, (width, height) = image.size, _cut(image.size, shape)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = _eight_bits(image.crop((left, top, left + width, top + height)))
        image = flatten(image)
    except Unusable:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise Unusable("truncated or damaged", f"{type(error).__name__}: {error}") from error
    target = _stored(image.size, shape)
    small = image if target == image.size else image.resize(target, Image.Resampling.LANCZOS)
    return Picture.of(small, original, cut=shape.aspect == "keep" and (width, height) != original)


def _cut(size: tuple[int, int], shape: Shape) -> tuple[int, int]:
    """Width and height of what is used of a picture."""
    most = min(size) * (LONGEST if shape.aspect == "keep" else 1)
    return min(size[0], most), min(size[1], most)


def _stored(size: tuple[int, int], shape: Shape) -> tuple[int, int]:
    if shape.aspect == "square":
        return shape.size, shape.size
    scale = min(1.0, shape.size / math.sqrt(size[0] * size[1]))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Unusable("too many pixels", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise Unusable("not an image", f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # a header may be damaged in as many ways as the rest
        raise Unusable("truncated or damaged", f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip. Raises Unusable for wider pixels."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode in ("I", "F"):
        raise Unusable("pixels wider than 16 bits", f"mode {image.mode}")
    return image
