"""Captions to ids: tokens of the sentencepiece model trained on the data set, or the numbers of its classes; or to the
states of a frozen text encoder (mpdit.data.encoders).

Shapes: B captions, L tokens.
"""

import abc
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from mpdit import files
from mpdit.data import encoders
from mpdit.data.encoders import Encoder, Text
from mpdit.data.shards import Shards, class_names
from mpdit.errors import InputError

PAD = 0
_SHOWN = 10  # classes listed in a message, at most


class Tokenizer(Protocol):
    """What captions become, whichever way."""

    sha256: str  # of what it is made from: another hash, other ids
    vocab_size: int  # ids are 0 … vocab_size - 1; 0: it gives features
    text_dim: int  # features of a token; 0: it gives ids
    pooled_dim: int  # of the vector that stands for the whole caption; 0: there is none

    def text(self, captions: Sequence[str], length: int) -> Text:
        """Ids or features of L = `length` tokens a caption. The empty caption is guidance's "no text"."""
        ...

    def save(self, folder: Path) -> None:
        """Write the file in `folder` that :func:`of_run` reads."""
        ...


class _Ids(abc.ABC):
    """A tokenizer that gives ids."""

    text_dim = pooled_dim = 0

    @abc.abstractmethod
    def encode(self, captions: Sequence[str], length: int) -> np.ndarray:
        """Ids, int64 (B, L = `length`)."""

    def text(self, captions: Sequence[str], length: int) -> Text:
        return Text(tokens_BL=self.encode(captions, length))


class SentencePiece(_Ids):
    """A sentencepiece processor that pads. The empty caption, guidance's "no text", is one end-of-text token."""

    FILE = "tokenizer.model"

    def __init__(self, processor: Any, model: bytes) -> None:
        """`model`: the file that `processor` has loaded. Use :meth:`open`."""
        self._processor, self._model = processor, model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = processor.vocab_size()
        self.eos: int = processor.eos_id()

    @classmethod
    def open(cls, path: str | Path, sha256: str | None = None) -> "SentencePiece":
        """Load a sentencepiece model file; `sha256` is what it has to be.

        Raises InputError for a file that is missing, damaged, of another hash, or without pad id 0 and an eos id.
        """
        model = _read(path, "a sentencepiece model")
        _same_hash(path, "a sentencepiece model", hashlib.sha256(model).hexdigest(), sha256)
        processor = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError("empty file")
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise InputError(f"{path}: is damaged or no sentencepiece model; rebuild the data set.") from error
        pad, eos = processor.pad_id(), processor.eos_id()
        if pad != PAD or eos < 0:
            raise InputError(
                f"{path}: has pad id {pad} and eos id {eos}, but should have pad id {PAD} and an eos id; "
                f"train it with pad_id=0 and eos_id=1."
            )
        return cls(processor, model)

    def save(self, folder: Path) -> None:
        """Write the model file, byte for byte."""
        files.replace(folder / self.FILE, self._model)

    def encode(self, captions: Sequence[str], length: int) -> np.ndarray:
        """Token ids, int64 (B, L = `length`): the caption's, the end of text when it fits, then padding (id 0)."""
        ids_BL = np.full((len(captions), length), PAD, np.int64)
        for row, pieces in enumerate(self._processor.encode(list(captions))):
            ids = [*pieces, self.eos][:length]
            ids_BL[row, : len(ids)] = ids
        return ids_BL


class Labels(_Ids):
    """Class names to their numbers. The empty caption, guidance's "no class", is the last id, as in DiT's code.

    DiT: Peebles & Xie, arXiv 2212.09748.
    """

    FILE = "classes.json"

    def __init__(self, classes: Sequence[str]) -> None:
        """`classes`: distinct names in the order of their numbers."""
        self.classes = tuple(classes)
        self._json = json.dumps(self.classes)
        self.sha256 = hashlib.sha256(self._json.encode()).hexdigest()
        self.vocab_size = len(self.classes) + 1
        self._ids = {name: number for number, name in enumerate((*self.classes, ""))}

    @classmethod
    def open(cls, path: str | Path, sha256: str | None = None) -> "Labels":
        """Load a file of class names, a JSON list; `sha256` is what :attr:`sha256` has to be.

        Raises InputError for a file that is missing, no list of class names, or of other classes.
        """
        try:
            names = json.loads(_read(path, "a list of class names"))
        except ValueError as error:
            raise InputError(f"{path}: is no JSON ({error}), but should be a list of class names.") from error
        labels = cls(class_names(names, str(path)))
        _same_hash(path, "a list of class names", labels.sha256, sha256)
        return labels

    def save(self, folder: Path) -> None:
        """Write the names as a JSON list, whose hash is :attr:`sha256`."""
        files.replace(folder / self.FILE, self._json)

    def encode(self, captions: Sequence[str], length: int) -> np.ndarray:
        """Class numbers, int64 (B, 1). Raises InputError for a caption that is no class or a `length` but 1."""
        if length != 1:
            raise InputError(
                f"model.text_tokens is {length}, but with data.text labels a caption is one token; it should be 1."
            )
        return np.array([self._number(caption) for caption in captions], np.int64).reshape(-1, 1)

    def _number(self, caption: str) -> int:
        number = self._ids.get(caption.strip())
        if number is None:
            near = difflib.get_close_matches(caption, self.classes, n=1)
            known = ", ".join(self.classes[:_SHOWN]) + (", …" if len(self.classes) > _SHOWN else "")
            hint = f"did you mean {near[0]!r}?" if near else f"the classes are {known}."
            raise InputError(f"the caption {caption!r} is no class of the data set; {hint}")
        return number


def of_data_set(kind: str, shards: Shards, model: str | None = None) -> Tokenizer:
    """What ``data.text`` = `kind` makes of a data set's captions; `model`: ``data.text_model``.

    Raises InputError if the set is not for it, or the encoder not there.
    """
    if kind in encoders.KINDS:
        return Encoder.open(kind, model)
    manifest = shards.folder / "manifest.json"
    if kind == "labels":
        if shards.classes is None:
            raise InputError(
                f"{manifest} names no classes, which data.text labels needs; build the set with `mpdit data build "
                "folder --classes` or `mpdit data build digits`, or use data.text sentencepiece."
            )
        return Labels(shards.classes)
    if shards.tokenizer is None:
        raise InputError(f"{manifest} names no tokenizer; build the data set again.")
    return SentencePiece.open(shards.tokenizer.path, shards.tokenizer.sha256)


def of_run(kind: str, folder: Path, sha256: str, model: str | None = None) -> Tokenizer:
    """What :meth:`Tokenizer.save` left in a run folder, or the encoder that the run was trained with.

    Raises InputError if it is missing or not the run's.
    """
    if kind in encoders.KINDS:
        return Encoder.open(kind, model, sha256)
    cls = Labels if kind == "labels" else SentencePiece
    return cls.open(folder / cls.FILE, sha256)


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}), but should be {what}.") from error


def _same_hash(path: str | Path, what: str, found: str, wanted: str | None) -> None:
    if wanted is not None and wanted != found:
        raise InputError(
            f"{path}: is {what} with another hash than the run's ({found[:16]}…, wanted {wanted[:16]}…); "
            "put the data set's own there."
        )
