"""Latents: what diffusers' AutoencoderKL gives, drawn and scaled as its pipelines do; others are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrained
from mpdit.data.latents import Autoencoder
from mpdit.errors import InputError

IMAGES = torch.rand(3, 3, 12, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained.save_vae(tmp_path_factory.mktemp("vae"), scaling_factor=1.5305, shift_factor=0.0609)


def theirs(folder: Path):  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder).eval()


def test_moments_and_latents_are_those_of_diffusers(vae: Path) -> None:
    autoencoder, network = Autoencoder.open(vae), theirs(vae)
    assert (autoencoder.space.channels, autoencoder.space.factor, autoencoder.space.pixel_channels) == (4, 2, 3)
    moments = autoencoder.moments(IMAGES)
    assert moments.dtype == torch.float16
    assert moments.shape == (3, 8, 6, 4)
    with torch.no_grad():
        posterior = network.encode(IMAGES).latent_dist
    torch.testing.assert_close(moments.float(), torch.cat([posterior.mean, posterior.logvar], 1), rtol=2e-3, atol=2e-3)
    noise = torch.randn(3, 4, 6, 4, generator=torch.Generator().manual_seed(1))
    wanted = (posterior.mean + posterior.std * noise - 0.0609) * 1.5305  # as StableDiffusion3's pipelines
    torch.testing.assert_close(autoencoder.space.latent(moments, noise), wanted, rtol=5e-3, atol=5e-3)


def test_pictures_are_what_the_decoder_makes_of_what_was_encoded(vae: Path) -> None:
    autoencoder, network = Autoencoder.open(vae), theirs(vae)
    moments, nothing = autoencoder.moments(IMAGES), torch.zeros(3, 4, 6, 4)
    pictures = autoencoder.pictures(autoencoder.space.latent(moments, nothing))
    with torch.no_grad():
        wanted = network.decode(moments[:, :4].float()).sample.clamp(-1, 1)
    torch.testing.assert_close(pictures, wanted, rtol=1e-4, atol=1e-4)
    assert pictures.shape == IMAGES.shape


def test_means_and_deviations_of_channels(tmp_path: Path) -> None:
    """As in the pipelines of StableDiffusionXL."""
    means, stds = [0.1, 0.2, -0.3, 0.4], [1.0, 2.0, 0.5, 4.0]
    folder = pretrained.save_vae(tmp_path, scaling_factor=0.5, latents_mean=means, latents_std=stds)
    space = Autoencoder.open(folder).space
    moments = torch.cat([torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)], 1)
    latent = space.latent(moments, torch.zeros(1, 4, 1, 1)).flatten()
    np.testing.assert_allclose(latent, [(1 - m) * 0.5 / s for m, s in zip(means, stds, strict=True)], rtol=1e-6)
    np.testing.assert_allclose(space.sample(latent.view(1, 4, 1, 1)).flatten(), np.ones(4), rtol=1e-6)


def test_the_factor_is_the_number_of_levels(tmp_path: Path) -> None:
    autoencoder = Autoencoder.open(pretrained.save_vae(tmp_path, factor=4))
    assert autoencoder.space.factor == 4
    assert autoencoder.moments(IMAGES).shape == (3, 8, 3, 2)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        Autoencoder.open(folder).moments(IMAGES)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_what_is_no_autoencoder_is_refused(vae: Path, tmp_path: Path) -> None:
    assert "data.latents" in refusal(tmp_path / "gone")
    assert "there is no such folder" in refusal(tmp_path / "gone")
    config = json.loads((vae / "config.json").read_text())
    for number, (change, words) in enumerate(
        [
            ({"_class_name": "VQModel"}, "has _class_name 'VQModel'"),
            ({"latent_channels": 0}, "latent_channels is 0"),
            ({"scaling_factor": None}, "scaling_factor is None"),
            ({"block_out_channels": 8}, "block_out_channels is 8"),
            ({"latents_mean": [0.0]}, "latents_mean is"),
        ]
    ):
        folder = shutil.copytree(vae, tmp_path / str(number))
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert words in refusal(folder)
    weights = next(iter(shutil.copytree(vae, tmp_path / "cut").glob("*.safetensors")))
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "can't be loaded" in refusal(weights.parent)


def test_another_autoencoder_than_the_runs_is_refused(vae: Path, tmp_path: Path) -> None:
    first, other = Autoencoder.open(vae), Autoencoder.open(pretrained.save_vae(tmp_path / "other", seed=1))
    first.same_as_in(tmp_path)  # nothing was written down
    first.save(tmp_path)
    first.same_as_in(tmp_path)
    with pytest.raises(InputError, match="is another autoencoder than the run's"):
        other.same_as_in(tmp_path)
