"""Captions to token ids, with the sentencepiece model that was trained on the data set.

Shapes: B captions, L tokens.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from mpdit.errors import InputError

PAD = 0


class Tokenizer:
    """A sentencepiece processor that pads. The empty caption, guidance's "no text", is one end-of-text token."""

    def __init__(self, processor: Any, sha256: str) -> None:
        self._processor = processor
        self.sha256 = sha256  # of the model file
        self.vocab_size: int = processor.vocab_size()
        self.eos: int = processor.eos_id()

    @classmethod
    def open(cls, path: str | Path, sha256: str | None = None) -> "Tokenizer":
        """Load a sentencepiece model file; `sha256` is what it has to be.

        Raises InputError for a file that is missing, damaged, of another hash, or without pad id 0 and an eos id.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: can't be read ({error.strerror}), but should be a sentencepiece model."
            ) from error
        found = hashlib.sha256(model).hexdigest()
        if sha256 is not None and found != sha256:
            raise InputError(
                f"{path}: is a sentencepiece model with another hash than the run's "
                f"({found[:16]}…, wanted {sha256[:16]}…); put the data set's own tokenizer there."
            )
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
        return cls(processor, found)

    def encode(self, captions: Sequence[str], length: int) -> np.ndarray:
        """Token ids, int64 (B, L = `length`): the caption's, the end of text when it fits, then padding (id 0)."""
        ids_BL = np.full((len(captions), length), PAD, np.int64)
        for row, pieces in enumerate(self._processor.encode(list(captions))):
            ids = [*pieces, self.eos][:length]
            ids_BL[row, : len(ids)] = ids
        return ids_BL
