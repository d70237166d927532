import hashlib
import io
from pathlib import Path

import pytest
import sentencepiece

from mpdit.data.text import Tokenizer
from mpdit.errors import InputError

CAPTIONS = [f"a {color} {thing}" for color in ("red", "green", "café") for thing in ("cat", "unicorn", "house")] * 5


def train(path: Path, **changes: object) -> Path:
    model = io.BytesIO()
    settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **changes}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("text") / "tokenizer.model")


def test_padded_and_ended(model: Path) -> None:
    tokenizer = Tokenizer.open(model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("a red cat")
    ids = tokenizer.encode(["a red cat", ""], len(pieces) + 3)
    assert ids.dtype == "int64"
    assert ids[0].tolist() == [*pieces, tokenizer.eos, 0, 0]
    assert ids[1].tolist() == [tokenizer.eos] + [0] * (len(pieces) + 2)
    assert tokenizer.vocab_size > ids.max() > 2


def test_cut(model: Path) -> None:
    tokenizer = Tokenizer.open(model)
    long = tokenizer.encode(["a red unicorn"], 50)[0]
    count = int((long != 0).sum())
    assert long[count - 1] == tokenizer.eos
    assert tokenizer.encode(["a red unicorn"], count)[0].tolist() == long[:count].tolist()
    for length in (1, 2, count - 1):
        assert tokenizer.encode(["a red unicorn"], length)[0].tolist() == long[:length].tolist()


def test_a_caption_s_ids_do_not_depend_on_its_neighbours(model: Path) -> None:
    tokenizer = Tokenizer.open(model)
    together = tokenizer.encode(CAPTIONS, 12)
    assert [tokenizer.encode([caption], 12)[0].tolist() for caption in CAPTIONS] == together.tolist()


def test_characters_never_seen_are_bytes(model: Path) -> None:
    tokenizer = Tokenizer.open(model)
    assert 2 not in tokenizer.encode(["🦄 猫"], 32)


def test_white_space_is_the_empty_caption(model: Path) -> None:
    tokenizer = Tokenizer.open(model)
    assert tokenizer.encode([" \n"], 4).tolist() == tokenizer.encode([""], 4).tolist()


def test_no_captions(model: Path) -> None:
    assert Tokenizer.open(model).encode([], 5).shape == (0, 5)


def test_hash(model: Path) -> None:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert Tokenizer.open(model, digest).sha256 == digest
    with pytest.raises(InputError, match=r"tokenizer.model: is a sentencepiece model with another hash than the run's"):
        Tokenizer.open(model, "0" * 64)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.model: can't be read"):
        Tokenizer.open(tmp_path / "none.model")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no model"])
def test_damaged(model: Path, tmp_path: Path, damage) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(damage(model.read_bytes()))
    with pytest.raises(InputError, match=r"bad.model: is damaged"):
        Tokenizer.open(path)


def test_model_without_padding(tmp_path: Path) -> None:
    path = train(tmp_path / "nopad.model", pad_id=-1, unk_id=0, eos_id=1)
    with pytest.raises(InputError, match=r"nopad.model: has pad id -1"):
        Tokenizer.open(path)
