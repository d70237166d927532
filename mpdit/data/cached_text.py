"""A text encoder whose states lie in caches, by caption: its weights are loaded for captions that are in none."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpdit.data.cache import Cache
from mpdit.data.encoders import Encoder, Text
from mpdit.errors import InputError

DIGESTS = "captions.npy"


def digests(captions: Sequence[str]) -> np.ndarray:
    """What captions are found by: byte strings (B,) in hexadecimal digits, of 128 bits each."""
    found = [hashlib.blake2b(caption.encode(), digest_size=16).hexdigest() for caption in captions]
    return np.array(found, "S32")


class CachedText:
    """As its `encoder`, out of `caches`, whose rows are in the order of their captions' digests."""

    vocab_size = 0

    def __init__(self, encoder: Encoder, caches: Sequence[Cache]) -> None:
        self.encoder, self.caches = encoder, caches
        self.sha256, self.text_dim, self.pooled_dim = encoder.sha256, encoder.text_dim, encoder.pooled_dim
        self._digests = [cache.strings(DIGESTS) for cache in caches]

    def text(self, captions: Sequence[str], length: int) -> Text:
        """Raises InputError for a damaged row, and for a caption that is in no cache if the encoder is not there."""
        tokens_BL = np.zeros((len(captions), length, self.text_dim), np.float16)
        pooled_BP = np.zeros((len(captions), self.pooled_dim), np.float16)
        places = self._places(captions)
        for at, place in enumerate(places):
            if place is not None:
                row, (tokens,) = self.caches[place[0]].row(place[1])
                tokens_BL[at, :tokens] = row[: tokens * self.text_dim].reshape(tokens, self.text_dim)
                pooled_BP[at] = row[tokens * self.text_dim :]
        if others := [at for at, place in enumerate(places) if place is None]:
            if not self.encoder.is_there:
                raise InputError(
                    f"the caption {captions[others[0]]!r} is in no cache, and {self.encoder.folder}, which would "
                    "encode it, is not there; put the text encoder there."
                )
            given = self.encoder.text([captions[at] for at in others], length)
            tokens_BL[others] = given.tokens_BL
            if given.pooled_BP is not None:
                pooled_BP[others] = given.pooled_BP
        return Text(tokens_BL=tokens_BL, pooled_BP=pooled_BP if self.pooled_dim else None)

    def can_say(self, captions: Sequence[str]) -> bool:
        """Whether :meth:`text` has these, or can have them encoded."""
        return self.encoder.is_there or None not in self._places(captions)

    def save(self, folder: Path) -> None:
        """As :meth:`Encoder.save`."""
        self.encoder.save(folder)

    def _places(self, captions: Sequence[str]) -> list[tuple[int, int] | None]:
        """The cache and row of each caption."""
        asked = digests(captions)
        places: list[tuple[int, int] | None] = [None] * len(asked)
        for number, known in enumerate(self._digests):
            rows = np.searchsorted(known, asked)
            for at, row in enumerate(rows.tolist()):
                if places[at] is None and row < len(known) and known[row] == asked[at]:
                    places[at] = number, row
        return places
