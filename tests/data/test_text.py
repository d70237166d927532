"""Captions to ids: a sentencepiece model's tokens, or the numbers of classes."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import sentencepiece

from data.make_shards import edit_manifest, make_shards
from mpdit.data import text
from mpdit.data.shards import Shards
from mpdit.data.text import Labels, SentencePiece, Tokenizer
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
    tokenizer = SentencePiece.open(model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("a red cat")
    ids = tokenizer.encode(["a red cat", ""], len(pieces) + 3)
    assert ids.dtype == "int64"
    assert ids[0].tolist() == [*pieces, tokenizer.eos, 0, 0]
    assert ids[1].tolist() == [tokenizer.eos] + [0] * (len(pieces) + 2)
    assert tokenizer.vocab_size > ids.max() > 2


def test_cut(model: Path) -> None:
    tokenizer = SentencePiece.open(model)
    long = tokenizer.encode(["a red unicorn"], 50)[0]
    count = int((long != 0).sum())
    assert long[count - 1] == tokenizer.eos
    assert tokenizer.encode(["a red unicorn"], count)[0].tolist() == long[:count].tolist()
    for length in (1, 2, count - 1):
        assert tokenizer.encode(["a red unicorn"], length)[0].tolist() == long[:length].tolist()


def test_a_caption_s_ids_do_not_depend_on_its_neighbours(model: Path) -> None:
    tokenizer = SentencePiece.open(model)
    together = tokenizer.encode(CAPTIONS, 12)
    assert [tokenizer.encode([caption], 12)[0].tolist() for caption in CAPTIONS] == together.tolist()


def test_characters_never_seen_are_bytes(model: Path) -> None:
    tokenizer = SentencePiece.open(model)
    assert 2 not in tokenizer.encode(["🦄 猫"], 32)


def test_white_space_is_the_empty_caption(model: Path) -> None:
    tokenizer = SentencePiece.open(model)
    assert tokenizer.encode([" \n"], 4).tolist() == tokenizer.encode([""], 4).tolist()


def test_no_captions(model: Path) -> None:
    assert SentencePiece.open(model).encode([], 5).shape == (0, 5)


def test_hash(model: Path) -> None:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert SentencePiece.open(model, digest).sha256 == digest
    with pytest.raises(InputError, match=r"tokenizer.model: is a sentencepiece model with another hash than the run's"):
        SentencePiece.open(model, "0" * 64)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.model: can't be read"):
        SentencePiece.open(tmp_path / "none.model")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no model"])
def test_damaged(model: Path, tmp_path: Path, damage) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(damage(model.read_bytes()))
    with pytest.raises(InputError, match=r"bad.model: is damaged"):
        SentencePiece.open(path)


def test_model_without_padding(tmp_path: Path) -> None:
    path = train(tmp_path / "nopad.model", pad_id=-1, unk_id=0, eos_id=1)
    with pytest.raises(InputError, match=r"nopad.model: has pad id -1"):
        SentencePiece.open(path)


# ---- labels ----------------------------------------------------------------------------------------------------------

CLASSES = ("zero", "one", "café", "ten and a half")


def test_labels_are_numbered_in_order_and_no_class_is_the_last() -> None:
    """The ids are what rows of the embedding mean: another order would draw other classes after a resume."""
    labels = Labels(CLASSES)
    ids = labels.encode(["one", "", "zero", " ten and a half\n", "café", " "], 1)
    assert ids.dtype == "int64"
    assert ids.tolist() == [[1], [4], [0], [3], [2], [4]]
    assert labels.vocab_size == 5
    assert labels.encode([], 1).shape == (0, 1)


@pytest.mark.parametrize(
    ("classes", "caption", "hint"),
    [
        (CLASSES, "zeor", "did you mean 'zero'?"),
        (CLASSES, "Q", "the classes are zero, one, café, ten and a half."),
        ([f"class {number}" for number in range(1000)], "Q", "class 9, …."),
    ],
)
def test_an_unknown_caption_is_named_with_the_nearest_class(classes: list[str], caption: str, hint: str) -> None:
    """A misspelt prompt must not be drawn as some class, and a thousand classes must not fill the terminal."""
    with pytest.raises(InputError) as caught:
        Labels(classes).encode(["", caption], 1)
    assert str(caught.value).startswith(f"the caption {caption!r} is no class of the data set; ")
    assert str(caught.value).endswith(hint)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("length", [0, 2, 16])
def test_labels_are_one_token(length: int) -> None:
    """A model that was given room for more would attend to padding that is not there."""
    with pytest.raises(InputError, match=rf"^model\.text_tokens is {length}, .* should be 1\."):
        Labels(CLASSES).encode([], length)


def test_labels_come_back_from_a_run_folder(tmp_path: Path) -> None:
    """`mpdit sample` has only the run folder: what it reads there must be what the run was trained with."""
    labels = Labels(CLASSES)
    labels.save(tmp_path)
    assert json.loads((tmp_path / "classes.json").read_text(encoding="utf-8")) == list(CLASSES)
    for found in (Labels.open(tmp_path / "classes.json"), text.of_run("labels", tmp_path, labels.sha256)):
        assert isinstance(found, Labels)
        assert (found.classes, found.sha256) == (CLASSES, labels.sha256)


def test_the_hash_of_labels_is_that_of_the_names_in_order() -> None:
    """Stable, since checkpoints hold it: a value written down here. Order and where a name ends are part of it."""
    assert Labels(["zero", "one"]).sha256 == "af6e7887706bc9a993ea895b7c78c1b64d916733a6bf6b4564473064a6efdd10"
    others = (["one", "zero"], ["zero", "one", "two"], ["zeroone"], ["ze", "roone"])
    assert len({Labels(names).sha256 for names in (["zero", "one"], *others)}) == 5


def test_other_labels_than_the_run_s_are_refused(tmp_path: Path) -> None:
    """A classes.json of another set would draw its classes under wrong names."""
    Labels(CLASSES).save(tmp_path)
    with pytest.raises(InputError, match=r"classes\.json: is a list of class names with another hash than the run's"):
        text.of_run("labels", tmp_path, Labels(CLASSES[::-1]).sha256)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "can't be read"),
        ("[", "is no JSON"),
        ("\xff", "is no JSON"),
        ("{}", "distinct names"),
        ("[]", "distinct names"),
        ('["a", 1]', "distinct names"),
        ('["a", "b", "a"]', "distinct names"),
        ('["a", ""]', "distinct names"),
        ('["a", " b"]', "distinct names"),
    ],
)
def test_a_damaged_list_of_classes_is_named(tmp_path: Path, content: str | None, told: str) -> None:
    """Whatever is in the file, one sentence with its name and no traceback."""
    path = tmp_path / "classes.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        Labels.open(path)
    assert str(caught.value).startswith(f"{path}")
    assert told in str(caught.value)


# ---- which of them ---------------------------------------------------------------------------------------------------


def open_set(folder: Path) -> Shards:
    return Shards.open(folder, "train")


def test_data_text_says_how_a_set_is_read(model: Path, tmp_path: Path) -> None:
    """A set may have both, classes and a tokenizer; the config decides, and what a run saves is read back the same."""
    folder = make_shards(tmp_path / "set")
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    edit_manifest(folder, lambda m: m.update(classes=list(CLASSES), tokenizer={**m["tokenizer"], "sha256": digest}))
    for kind, cls in (("labels", Labels), ("sentencepiece", SentencePiece)):
        found = text.of_data_set(kind, open_set(folder))
        assert type(found) is cls
        run = tmp_path / kind
        run.mkdir()
        found.save(run)
        again: Tokenizer = text.of_run(kind, run, found.sha256)
        assert type(again) is cls
        assert again.encode([""], 1).tolist() == found.encode([""], 1).tolist()
    assert (tmp_path / "sentencepiece" / "tokenizer.model").read_bytes() == model.read_bytes()


def test_a_set_without_classes_or_tokenizer_is_named(tmp_path: Path) -> None:
    """The sentence says which command makes such a set."""
    folder = make_shards(tmp_path / "set")
    with pytest.raises(InputError, match=r"manifest\.json names no classes.*folder --classes.*data build digits"):
        text.of_data_set("labels", open_set(folder))
    edit_manifest(folder, lambda m: m.update(tokenizer=None))
    with pytest.raises(InputError, match=r"manifest\.json names no tokenizer; build the data set again"):
        text.of_data_set("sentencepiece", open_set(folder))
