"""Latents: what diffusers' AutoencoderKL, read from a local folder, makes of pictures, and pictures out of them.

An encoder gives a Gaussian for each latent pixel (Rombach et al., arXiv 2112.10752, section 3.1): its moments, mean and
log-variance, are rounded to fp16, so that they are the same out of a cache; the latent is drawn from it anew at each
visit. Shapes: B samples, C latent channels, M = 2 C moments, H x W latent pixels, Y x X = factor H x factor W pixels.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdit import files
from mpdit.data import pretrained
from mpdit.data.pretrained import whole_number
from mpdit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "data.latents"
_AT_ONCE = 16  # pictures: an autoencoder's activations are many times the size of what it is given


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What there is to know of latents without the autoencoder's weights. Where something follows from config.json of
    diffusers, the pipelines of diffusers use it so: latent = (sample - shift) * scale, a number a channel or one."""

    channels: int  # C
    pixel_channels: int
    factor: int  # pixels a side of a latent pixel
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Space":
        """Out of what dataclasses.asdict and JSON made of one."""
        lists: dict[str, Any] = {key: tuple(value) for key, value in facts.items() if isinstance(value, list)}
        return cls(**{**facts, **lists})

    def latent(self, moments_BMHW: "Tensor", noise_BCHW: "Tensor") -> "Tensor":
        """The latent [B, C, H, W] that `noise` draws from the Gaussian of `moments`; fp32."""
        mean_BCHW, logvar_BCHW = moments_BMHW.float().chunk(2, 1)
        sample_BCHW = mean_BCHW + (logvar_BCHW.clamp(-30, 20) / 2).exp() * noise_BCHW
        return (sample_BCHW - self._channels(self.shift, sample_BCHW)) * self._channels(self.scale, sample_BCHW)

    def sample(self, latent_BCHW: "Tensor") -> "Tensor":
        """What the decoder takes, the inverse of the last step of :meth:`latent`."""
        return latent_BCHW / self._channels(self.scale, latent_BCHW) + self._channels(self.shift, latent_BCHW)

    @staticmethod
    def _channels(values: tuple[float, ...], like: "Tensor") -> "Tensor":
        return like.new_tensor(values)[:, None, None]


class Autoencoder:
    """An AutoencoderKL. Its weights are loaded, onto this process's device, when the first picture comes."""

    FILE = "autoencoder.json"

    def __init__(self, folder: Path, sha256: str, space: Space) -> None:
        """Use :meth:`open`."""
        self.folder, self.sha256, self.space = folder, sha256, space

    @classmethod
    def open(cls, folder: str | Path) -> "Autoencoder":
        """The autoencoder in a local folder. Raises InputError if there is none, or it is of another kind."""
        folder = Path(folder)
        config = pretrained.config_of(_KEY, folder, "diffusers", "latents")
        if config.get("_class_name") != "AutoencoderKL":
            raise InputError(
                f"{folder / 'config.json'}: has _class_name {config.get('_class_name')!r}, but {_KEY} should be the "
                "folder of diffusers' AutoencoderKL."
            )
        return cls(folder, pretrained.sha256_of(folder), _space(config, folder))

    def moments(self, images_BCYX: "Tensor") -> "Tensor":
        """Moments [B, M, H, W], float16, of pictures in [-1, 1]; Y and X are multiples of the factor.

        Raises InputError if the weights can't be loaded or fp16 can't hold what comes out.
        """
        import torch

        network, device = self._loaded
        with torch.no_grad():
            parts = [
                network.encode(part.to(device).float()).latent_dist.parameters for part in images_BCYX.split(_AT_ONCE)
            ]
        mean, logvar = torch.cat(parts).chunk(2, 1)
        half = torch.cat([mean, logvar.clamp(-30, 20)], 1).half()
        if not half.isfinite().all():
            raise InputError(
                f"{_KEY} {self.folder}: gives means up to {mean.abs().max().item():.3g}, which fp16 can't hold; "
                "its weights are damaged."
            )
        return half

    def pictures(self, latent_BCHW: "Tensor") -> "Tensor":
        """Pictures [B, pixel channels, Y, X] in [-1, 1]."""
        import torch

        network, device = self._loaded
        sample_BCHW = self.space.sample(latent_BCHW.to(device).float())
        with torch.no_grad():
            return torch.cat([network.decode(part).sample for part in sample_BCHW.split(_AT_ONCE)]).clamp(-1, 1)

    @property
    def is_there(self) -> bool:
        """Whether its folder is: a cache knows an autoencoder without it."""
        return (self.folder / "config.json").is_file()

    def save(self, folder: Path) -> None:
        """Write down which autoencoder it is; the weights stay where they are."""
        known = {"folder": str(self.folder), "sha256": self.sha256}
        files.replace(folder / self.FILE, json.dumps(known) + "\n")

    def same_as_in(self, run: Path) -> None:
        """Raises InputError if :meth:`save` has written down another one in the run folder `run`."""
        path = run / self.FILE
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: can't be read ({error}); put it back, or give another run.dir.") from error
        if found != self.sha256:
            raise InputError(
                f"{_KEY} {self.folder}: is another autoencoder than the run's (SHA-256 {self.sha256[:16]}…, wanted "
                f"{str(found)[:16]}…); put the run's there, or give another run.dir."
            )

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from diffusers import AutoencoderKL

        from mpdit.parallel import accel

        pretrained.config_of(_KEY, self.folder, "diffusers", "latents")  # a cache knows it without its folder
        options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}  # the other way needs accelerate
        network = pretrained.load(_KEY, self.folder, AutoencoderKL.from_pretrained, **options)
        return network.to(accel.device()), accel.device()


def _space(config: dict[str, Any], folder: Path) -> Space:
    where, channels = folder / "config.json", whole_number(config, "latent_channels", folder)
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise InputError(f"{where}: block_out_channels is {blocks!r}, but should be a list of sizes.")
    scaling: Any = config.get("scaling_factor")
    shift: Any = config.get("shift_factor") or 0.0
    for name, value in (("scaling_factor", scaling), ("shift_factor", shift)):
        if type(value) not in (int, float) or (name == "scaling_factor" and value == 0):
            raise InputError(f"{where}: {name} is {value!r}, but should be a number.")
    means, stds = config.get("latents_mean"), config.get("latents_std")
    for name, values in (("latents_mean", means), ("latents_std", stds)):
        if values is not None and not _numbers(values, channels):
            raise InputError(f"{where}: {name} is {values!r}, but should be {channels} numbers, or null.")
    return Space(
        channels=channels,
        pixel_channels=whole_number(config, "in_channels", folder),
        factor=2 ** (len(blocks) - 1),
        scale=tuple(scaling / std for std in stds) if stds else (scaling,),
        shift=tuple(means) if means else (shift,),
    )


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(type(v) in (int, float) for v in values)
