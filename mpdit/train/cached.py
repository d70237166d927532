"""Which caches (mpdit.data.cache) a config can read, by what they depend on; and its models, known with or without.

The rows of a sample's latents and features are numbered 2 i and 2 i + 1, as it is and mirrored, where data.mirror is
on, else i. Those of text are in the order of their captions' digests (mpdit.data.cached_text).
"""

import functools
from pathlib import Path
from typing import Any

from mpdit.config import Config
from mpdit.data import buckets, encoders, pretrained, text
from mpdit.data.cache import Cache, Wanted
from mpdit.data.cached_text import CachedText
from mpdit.data.encoders import Encoder
from mpdit.data.latents import Autoencoder, Space
from mpdit.data.mixture import Mixture
from mpdit.errors import InputError
from mpdit.objective import efficientnet


def sizes(config: Config) -> list[list[int]]:
    """Heights and widths that the network sees."""
    return [[height, width] for height, width in buckets.of_config(config)]


def row_of(config: Config, sample: int, mirrored: bool) -> int:
    """Of latents and features."""
    return 2 * sample + int(mirrored) if config.data.mirror else sample


# ---- what caches depend on -------------------------------------------------------------------------------------------


def wanted_latents(config: Config, shards: Mixture, model: str | None) -> Wanted:
    return _wanted("latents", shards, model=model, sizes=sizes(config), mirror=config.data.mirror)


def wanted_text(config: Config, shards: Mixture, model: str | None) -> Wanted:
    return _wanted("text", shards, model=model, text=config.data.text, text_tokens=config.model.text_tokens)


def wanted_features(config: Config, shards: Mixture, factor: int) -> Wanted:
    """Of REPA's teacher; `factor`: pixels a side of what the network sees as one."""
    pixels = [[height * factor, width * factor] for height, width in sizes(config)]
    patch = config.model.patch * factor
    return _wanted("features", shards, model=_teacher(config), pixels=pixels, patch=patch, mirror=config.data.mirror)


def _wanted(kind: str, shards: Mixture, **depends: Any) -> Wanted:
    depends |= {"source": shards.fingerprint, "dtype": "float16"}
    return Wanted(kind=kind, split=shards.split, samples=len(shards), depends=depends)


def _teacher(config: Config) -> str | None:
    """The hash of its weights; None where a DINOv2's are not there."""
    teacher = config.objective.repa_teacher
    if teacher == "efficientnet_lite0":
        return efficientnet.SHA256
    folder = Path(teacher)
    return pretrained.sha256_of(folder) if any(folder.glob("*.safetensors")) else None


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_latents(config: Config, shards: Mixture) -> Cache | None:
    """None in pixel space or without ``data.cache``. Raises InputError as :meth:`Cache.open`."""
    if config.data.latents is None or config.data.cache is None:
        return None
    known = _hash_of(Path(config.data.latents))
    return Cache.open(config.data.cache, wanted_latents(config, shards, known))


def open_features(config: Config, shards: Mixture) -> Cache | None:
    """None without REPA or ``data.cache``. Raises InputError as :meth:`Cache.open`."""
    if not config.objective.repa_weight or config.data.cache is None:
        return None
    return Cache.open(config.data.cache, wanted_features(config, shards, factor(config, shards)))


def autoencoder(config: Config, shards: Mixture) -> Autoencoder | None:
    """That of ``data.latents``, from its folder or, if that is not there, as the latents' cache knows it."""
    if config.data.latents is None:
        return None
    folder = Path(config.data.latents)
    if config.data.cache is None or folder.is_dir():
        return open_autoencoder(config)
    cache = open_latents(config, shards)
    assert cache is not None
    return Autoencoder(folder, cache.depends["model"], Space.of(cache.facts))


def open_autoencoder(config: Config) -> Autoencoder:
    """That of the folder ``data.latents``, loaded once. Raises InputError as :meth:`Autoencoder.open`."""
    assert config.data.latents is not None
    folder = Path(config.data.latents)
    return _opened(folder, _hash_of(folder))


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, sha256: str | None) -> Autoencoder:
    return Autoencoder.open(folder)


def factor(config: Config, shards: Mixture) -> int:
    """Pixels a side of what the network sees as one."""
    found = autoencoder(config, shards)
    return 1 if found is None else found.space.factor


def tokenizer(config: Config, train: Mixture, val: Mixture) -> text.Tokenizer:
    """What ``data.text`` says; out of caches where there are any. Raises InputError if it is not there or not fit."""
    data = config.data
    if data.text not in encoders.KINDS and data.text_model is not None:
        raise InputError(f"data.text_model is {data.text_model}, but data.text is {data.text}, which has no model.")
    if data.text not in encoders.KINDS or data.cache is None:
        return text.of_data_set(data.text, train.sets[0], data.text_model)
    folder = encoders.folder_of(data.text, data.text_model)
    there = Encoder.open(data.text, data.text_model) if folder.is_dir() else None
    model = there.sha256 if there else None
    caches = [Cache.open(data.cache, wanted_text(config, shards, model)) for shards in (train, val)]
    if caches[0].depends["model"] != caches[1].depends["model"]:
        raise InputError(f"data.cache {data.cache}: the text of the train and val splits is of different models.")
    known = there or Encoder(data.text, folder, caches[0].depends["model"], **caches[0].facts)
    return CachedText(known, caches)


def _hash_of(folder: Path) -> str | None:
    return pretrained.sha256_of(folder) if folder.is_dir() else None


# ---- what can't be done without a model's folder ---------------------------------------------------------------------


def notes(found: Autoencoder | None, tokenizer: text.Tokenizer) -> list[str]:
    """A sentence for each model that only its cache knows."""
    absent = [] if found is None or found.is_there else [("data.latents", found.folder)]
    if isinstance(tokenizer, CachedText) and not tokenizer.encoder.is_there:
        absent.append(("data.text_model", tokenizer.encoder.folder))
    return [f"{key} {folder}: is not there; its cache is used." for key, folder in absent]


def cannot_draw(found: Autoencoder | None, tokenizer: text.Tokenizer, prompts: list[str]) -> str:
    """Why no pictures can be drawn; empty if they can."""
    if found is not None and not found.is_there:
        return f"no pictures: data.latents {found.folder}, which would decode them, is not there"
    if isinstance(tokenizer, CachedText) and not tokenizer.can_say([*prompts, ""]):
        return f"no pictures: {tokenizer.encoder.folder}, which would encode their prompts, is not there"
    return ""
