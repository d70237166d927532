"""Images to PNG: single ones, and a labelled grid that a person looks at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_CELL = 128  # pixels a picture is enlarged to at least
_LABEL = 30  # pixels under it for two lines of caption
_GAP = 6


def to_image(image_CHW: Tensor) -> Image.Image:
    """One image in [-1, 1] as 8-bit RGB or gray."""
    pixels = ((image_CHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels if pixels.shape[2] == 3 else np.ascontiguousarray(pixels[..., 0]))


def grid(images_NCHW: Tensor, captions: Sequence[str], columns: int = 0) -> Image.Image:
    """Images in [-1, 1] side by side, captions under them; about as wide as high unless `columns` says otherwise."""
    count, (height, width) = len(images_NCHW), images_NCHW.shape[2:]
    scale = max(1, _CELL // width)
    cell_w, cell_h = width * scale, height * scale
    columns = columns or max(1, round((count * (cell_h + _LABEL) / cell_w) ** 0.5))
    rows = -(-count // columns)
    sheet = Image.new(
        "RGB", (columns * (cell_w + _GAP) + _GAP, rows * (cell_h + _LABEL + _GAP) + _GAP), (255, 255, 255)
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, (image, caption) in enumerate(zip(images_NCHW, captions, strict=True)):
        x = _GAP + number % columns * (cell_w + _GAP)
        y = _GAP + number // columns * (cell_h + _LABEL + _GAP)
        sheet.paste(to_image(image).convert("RGB").resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        for line, text in enumerate(_wrap(pen, font, caption, cell_w)):
            pen.text((x, y + cell_h + 2 + line * 13), text, fill=(40, 40, 40), font=font)
    return sheet


def _wrap(
    pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str, width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if pen.textlength(joined, font=font) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    return [_cut(pen, font, line, width) for line in lines[:2]]


def _cut(pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, line: str, width: int) -> str:
    """As much of a line as fits."""
    while line and pen.textlength(line, font=font) > width:
        line = line[:-1]
    return line


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")
    return path
