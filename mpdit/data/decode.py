"""Encoded images to tensors: NVIDIA DALI decodes them, and resizes them where a GPU is given; torch does on the CPU.

Shapes: B images of a micro-batch, C channels, H x W pixels. Tensors are float32 in [-1, 1].
"""

import functools
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image
from torch.nn import functional as F

from mpdit.errors import InputError

MAX_PIXELS = 2**26  # of one image, 192 MiB decoded: more is a decompression bomb, not a picture to train on
Inputs = tuple[list[np.ndarray], np.ndarray, np.ndarray]  # see inputs()


def decode(
    encoded: Sequence[bytes],
    height: int,
    width: int,
    *,
    channels: int = 3,
    mirrored: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    workers: int = 1,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Decode a list of images as :class:`Loader` does: float32 (B, C, H, W) in [-1, 1], on `device`.

    `mirrored`: bool (B,), images to flip; `names`: what to call them in messages. Raises InputError for an image that
    can't be decoded, and the decoder's RuntimeError where no image is to blame.
    """
    if not encoded:
        return torch.empty((0, channels, height, width), device=device)
    mirrored_B = np.zeros(len(encoded), bool) if mirrored is None else mirrored
    starts = range(0, len(encoded), most := min(len(encoded), 64))
    chunks = ((encoded[i : i + most], (height, width), mirrored_B[i : i + most]) for i in starts)
    decoder = Decoder(lambda: inputs(*next(chunks)), most, channels, workers, device, 1)
    try:
        return torch.cat([decoder.run() for _ in starts])
    except RuntimeError as error:
        for number in damaged(encoded, channels, device):
            name = f"image {number} of {len(encoded)}" if names is None else names[number]
            raise InputError(f"{name}: is damaged or no image; it should be PNG, JPEG or WebP.") from error
        raise
    finally:
        decoder.close()


def header_fault(encoded: bytes, height_width: tuple[int, int]) -> str | None:
    """What the header alone says is wrong with an image that should be so large, in a few words; None if nothing.

    Never decodes, so that a decompression bomb costs nothing.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        return "image too large"
    except Exception:  # Pillow's readers raise nearly anything on damaged headers
        return "no image"
    if height * width > MAX_PIXELS:
        return "image too large"
    # A camera's image may lie on its side, with a note that says so.
    return None if sorted((height, width)) == sorted(height_width) else "image of another size"


def damaged(encoded: Sequence[bytes], channels: int, device: torch.device | str | None = None) -> list[int]:
    """The numbers of the images that can't be decoded, found by halving; none where the decoder decodes nothing."""
    if not encoded or _decodes(encoded, channels, device) or not _decodes(_sound(), channels, device):
        return []
    if len(encoded) == 1:
        return [0]
    half = len(encoded) // 2
    second = damaged(encoded[half:], channels, device)
    return damaged(encoded[:half], channels, device) + [half + number for number in second]


def _decodes(encoded: Sequence[bytes], channels: int, device: torch.device | str | None) -> bool:
    source, most = lambda: inputs(encoded, (1, 1), np.zeros(len(encoded), bool)), len(encoded)
    decoder = Decoder(source, most, channels, 1, device, 1)
    try:
        decoder.run()
    except RuntimeError:
        return False
    finally:
        decoder.close()
    return True


@functools.cache
def _sound() -> tuple[bytes, ...]:
    """Small pictures that are good for certain, of the two formats that DALI decodes in different ways on a GPU.

    What fails on these is the decoder, for lack of memory say, and no image is to be blamed.
    """
    buffers = {kind: io.BytesIO() for kind in ("PNG", "JPEG")}
    for kind, buffer in buffers.items():
        Image.new("RGB", (16, 16), "gray").save(buffer, kind)
    return tuple(buffer.getvalue() for buffer in buffers.values())


# ---- DALI ------------------------------------------------------------------------------------------------------------


def _source(source: Callable[[], Inputs]) -> Any:
    return fn.external_source(
        source, num_outputs=3, batch=True, dtype=[types.UINT8, types.FLOAT, types.INT32], ndim=[1, 1, 0]
    )


def _kind(channels: int) -> Any:
    # never ANY_DATA: DALI 2.4 crashes on a grayscale JPEG then
    return {1: types.GRAY, 3: types.RGB}[channels]


@pipeline_def
def _on_gpu(source: Callable[[], Inputs], channels: int) -> Any:
    """Decode, resize until both sides are large enough, cut out the middle, scale bytes to [-1, 1]."""
    encoded, height_width, mirrored = _source(source)
    images = fn.decoders.image(encoded, device="mixed", output_type=_kind(channels))
    images = fn.resize(images, size=height_width, mode="not_smaller", antialias=True)
    return fn.crop_mirror_normalize(
        images,
        crop=height_width,
        mirror=mirrored,
        mean=[127.5] * channels,
        std=[127.5] * channels,
        dtype=types.FLOAT,
        output_layout="CHW",
    )


@pipeline_def
def _on_cpu(source: Callable[[], Inputs], channels: int) -> Any:
    """Decode. What :func:`_fit` does with the result costs DALI's own CPU operators five times as much."""
    encoded, height_width, mirrored = _source(source)
    return fn.decoders.image(encoded, device="cpu", output_type=_kind(channels)), height_width, mirrored


def _fit(image_HWC: torch.Tensor, height: int, width: int, mirrored: bool) -> torch.Tensor:
    """Resize until both sides are large enough and cut out the middle: uint8 (C, height, width), as Pillow has it."""
    image_CHW = image_HWC.permute(2, 0, 1)
    rows, columns = image_CHW.shape[1:]
    scale = max(height / rows, width / columns)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    if size != (rows, columns):
        (image_CHW,) = F.interpolate(image_CHW[None], size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    image_CHW = image_CHW[:, top : top + height, left : left + width]
    return image_CHW.flip(2) if mirrored else image_CHW


class Decoder:
    """A DALI pipeline that pulls from `source` and gives tensors; `depth` batches are under way at a time."""

    def __init__(
        self,
        source: Callable[[], Inputs],
        batch: int,
        channels: int,
        threads: int,
        device: torch.device | str | None,
        depth: int,
    ) -> None:
        if channels not in (1, 3):
            raise InputError(f"model.channels is {channels}, but images are decoded to 1 (gray) or 3 (RGB) channels.")
        where = torch.device("cpu" if device is None else device)
        on_gpu = where.type == "cuda"
        if on_gpu and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        self._device, self._channels = where, channels
        self._pipeline = (_on_gpu if on_gpu else _on_cpu)(
            source,
            channels,
            batch_size=batch,
            num_threads=max(threads, 1),
            device_id=where.index if on_gpu else None,  # with an id DALI looks for a GPU, even for CPU operators
            prefetch_queue_depth=depth,
        )
        self._pipeline.build()

    def run(self) -> torch.Tensor:
        """float32 (B, C, H, W), the caller's own copy. Raises RuntimeError when an image can't be decoded."""
        if self._pipeline is None:
            raise ValueError("the loader is closed")
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            (outputs,) = self._pipeline.run(stream)
            dense = outputs.as_tensor()
            images_BCHW = torch.empty(dense.shape(), dtype=torch.float32, device=self._device)
            return feed_ndarray(dense, images_BCHW, cuda_stream=stream)
        decoded, height_width, mirrored = self._pipeline.run()
        height, width = height_width.as_array()[0].astype(int).tolist()
        images_BCHW = torch.empty(len(decoded), self._channels, height, width)
        for image_CHW, image_HWC, flip in zip(images_BCHW, decoded, mirrored.as_array(), strict=True):
            image_CHW.copy_(_fit(torch.from_dlpack(image_HWC), height, width, bool(flip)))
        return images_BCHW.sub_(127.5).mul_(1 / 127.5)

    def close(self) -> None:
        self._pipeline = None  # DALI joins its threads when the last reference goes


def inputs(encoded: Sequence[bytes], height_width: tuple[int, int], mirrored_B: np.ndarray) -> Inputs:
    """What a :class:`Decoder` pulls: encoded images; float32 (B, 2) heights, widths; int32 (B,) mirrored."""
    size_B2 = np.tile(np.array(height_width, np.float32), (len(encoded), 1))
    return [np.frombuffer(image, np.uint8) for image in encoded], size_B2, mirrored_B.astype(np.int32)
