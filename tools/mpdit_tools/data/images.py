"""Pixels: decoding what cannot be trusted, alpha onto white, a square out of any picture, PNG out."""

import io
import warnings

from PIL import Image, ImageOps

PIXELS = 64_000_000  # more is refused by the header alone, before anything is decoded
FILE_BYTES = 256 * 2**20
# Formats that Pillow decodes itself: none of them runs another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class Unusable(Exception):
    """A picture or caption that has to be dropped. ``reason`` is a short phrase to count by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def flatten(image: Image.Image) -> Image.Image:
    """The picture in RGB, with what is transparent made white. Decoders drop alpha and show what lies beneath."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    layered = image.convert("RGBA")
    white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
    white.alpha_composite(layered)
    return white.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """The picture as PNG, without any metadata."""
    bare = Image.new(image.mode, image.size)
    bare.paste(image)
    data = io.BytesIO()
    bare.save(data, "PNG")
    return data.getvalue()


def square(data: bytes, *, size: int, min_side: int) -> tuple[bytes, int, int]:
    """A picture file of any format as a square PNG of ``size`` pixels, and the original's width and height.

    Turned as EXIF says, cut to a square about the centre, flattened on white, resized. Of an animation the first frame
    is taken; colour profiles are left out of account. Raises Unusable for whatever is not a picture, is damaged, has
    more than `PIXELS` pixels, or is shorter than ``min_side`` on one side.
    """
    if not data:
        raise Unusable("empty file")
    with warnings.catch_warnings():
        # What Pillow warns of (odd metadata, many pixels) is either harmless or refused here with a reason.
        warnings.simplefilter("ignore")
        return _square(data, size=size, min_side=min_side)


def _square(data: bytes, *, size: int, min_side: int) -> tuple[bytes, int, int]:
    image = _open(data)
    if image.width * image.height > PIXELS:
        raise Unusable("too many pixels", f"{image.width} x {image.height}")
    if min(image.size) < min_side:
        raise Unusable("too small", f"{image.width} x {image.height}")
    try:
        upright = ImageOps.exif_transpose(image)
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        cut = flatten(_eight_bits(upright.crop((left, top, left + side, top + side))))
    except Unusable:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise Unusable("truncated or damaged", f"{type(error).__name__}: {error}") from error
    small = cut if side == size else cut.resize((size, size), Image.Resampling.LANCZOS)
    return encode_png(small), upright.width, upright.height


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
