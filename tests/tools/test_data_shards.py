"""The shard writer, the index, the split and the tokenizer, each by itself."""

import importlib.util
import subprocess
import sys
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpdit.errors import InputError
from mpdit_tools.data.shards import ShardWriter, build_hash
from mpdit_tools.data.split import split_classes, split_concepts
from mpdit_tools.data.tokenizer import train_tokenizer

SAMPLES = st.lists(
    st.tuples(st.binary(max_size=1500), st.text(max_size=300), st.dictionaries(st.text(max_size=5), st.integers())),
    min_size=1,
    max_size=12,
)


def write(folder, rows, per_shard=5):
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, "train", per_shard=per_shard) as writer:
        for png, caption, meta in rows:
            writer.add(png=png, height=3, width=4, caption=caption, meta=meta)
    return writer.shards


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=SAMPLES, per_shard=st.integers(1, 6))
def test_the_index_points_at_the_data_tarfile_finds(tmp_path_factory, rows, per_shard):
    folder = tmp_path_factory.mktemp("shards")
    shards = write(folder, rows, per_shard)
    found = []
    for shard in shards:
        data = (folder / shard.tar).read_bytes()
        assert len(data) == shard.bytes
        assert len(data) % tarfile.RECORDSIZE == 0
        with tarfile.open(folder / shard.tar) as archive:
            members = {member.name: member for member in archive}
        assert all((member.mtime, member.uid, member.mode) == (0, 0, 0o644) for member in members.values())
        first, *lines = (folder / shard.index).read_text().splitlines()
        assert first == f"v1.2 {shard.samples}" == f"v1.2 {len(lines)}"
        for line in lines:
            words = line.split(" ")
            assert words[::4] == ["png", "txt", "json"]
            for extension, offset, size, name in zip(*[iter(words)] * 4, strict=True):
                member = members.pop(name)
                assert (member.offset_data, member.size) == (int(offset), int(size))
                if extension == "txt":
                    found.append(data[int(offset) : int(offset) + int(size)].decode())
        assert not members
    assert found == [caption for _, caption, _ in rows]
    assert [shard.samples for shard in shards[:-1]] == [per_shard] * (len(shards) - 1)


@pytest.mark.skipif(
    importlib.util.find_spec("wds2idx") is None, reason="DALI, whose tool wds2idx is compared with, is for Linux alone"
)
def test_the_index_is_what_dalis_tool_writes(tmp_path):
    rows = [(bytes([number]) * (number * 311), f"caption {number}", {"n": number}) for number in range(9)]
    for shard in write(tmp_path / "shards", rows):
        tool = tmp_path / "tool.idx"
        command = [sys.executable, "-m", "wds2idx", str(tmp_path / "shards" / shard.tar), str(tool)]
        subprocess.run(command, check=True, capture_output=True)
        assert tool.read_text() == (tmp_path / "shards" / shard.index).read_text()


def test_the_same_samples_give_the_same_shards(tmp_path):
    rows = [(b"x" * number, f"caption {number}", {"b": 1, "a": "ü"}) for number in range(7)]
    assert write(tmp_path / "a", rows) == write(tmp_path / "b", rows)
    assert (tmp_path / "a" / "train-00001.tar").read_bytes() == (tmp_path / "b" / "train-00001.tar").read_bytes()


def test_the_build_hash_knows_arguments_and_sources():
    one = build_hash({"size": 1, "seed": 0}, ["x"])
    assert one == build_hash({"seed": 0, "size": 1}, ["x"])
    assert len({one, build_hash({"size": 2, "seed": 0}, ["x"]), build_hash({"size": 1, "seed": 0}, ["y"])}) == 3


@given(
    samples=st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from("0123456789")), min_size=2, max_size=40),
    fraction=st.floats(0.001, 0.999),
)
def test_nothing_shared_is_torn_apart_and_no_split_is_empty(samples, fraction):
    try:
        held = split_concepts(samples, fraction=fraction)
    except InputError:
        return
    for part in (0, 1):
        inside = {sample[part] for sample, out in zip(samples, held, strict=True) if out}
        outside = {sample[part] for sample, out in zip(samples, held, strict=True) if not out}
        assert inside
        assert outside
        assert not inside & outside


def test_the_fraction_is_kept_and_does_not_depend_on_the_rest():
    samples = [(f"concept {number}", f"picture {number}") for number in range(4000)]
    held = split_concepts(samples, fraction=0.05)
    assert 150 < sum(held) < 250
    assert split_concepts(samples[:2000], fraction=0.05) == held[:2000]


def test_a_caption_of_half_the_set_is_never_held_out():
    for name in map(str, range(200)):
        samples = [(name, f"p{number}") for number in range(50)] + [
            (f"c{number}", f"q{number}") for number in range(50)
        ]
        assert not split_concepts(samples, fraction=0.05)[0]


@given(
    samples=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 12).map(str), st.sampled_from("0123456789")), max_size=40
    ),
    fraction=st.floats(0.001, 0.999),
)
def test_every_class_stays_in_training_and_no_picture_is_in_both(samples, fraction):
    """Whatever is shared: an image under two classes, a picture in two files."""
    try:
        held = split_classes(samples, fraction=fraction)
    except InputError:
        return
    train, val = (
        [sample for sample, out in zip(samples, held, strict=True) if out == split] for split in (False, True)
    )
    assert {name for name, _, _ in train} == {name for name, _, _ in samples}
    for part in (1, 2):
        assert not {sample[part] for sample in train} & {sample[part] for sample in val}


def test_the_share_of_a_class_is_kept_and_does_not_depend_on_the_rest():
    """A class held out in full or not at all would make the validation loss that of other classes than trained."""
    samples = [(f"class {number % 4}", f"image {number}", f"picture {number}") for number in range(8000)]
    held = split_classes(samples, fraction=0.05)
    for first in range(4):
        assert 70 < sum(held[first::4]) < 130
    assert split_classes(samples[:4000], fraction=0.05) == held[:4000]
    more = split_classes(samples, fraction=0.1)
    assert all(later or not before for before, later in zip(held, more, strict=True))


def test_classes_of_one_picture_cannot_be_split():
    """There has to be something to train on before anything is held out, and the split may not be empty."""
    for samples in ([], [("a", "1", "x"), ("b", "2", "y")], [("a", "1", "x"), ("a", "2", "x")]):
        with pytest.raises(InputError, match="at least two"):
            split_classes(samples, fraction=0.5)
    assert sum(split_classes([("a", "1", "x"), ("a", "2", "y"), ("b", "3", "z")], fraction=0.5)) == 1


def test_the_tokenizer_is_deterministic_and_total():
    import sentencepiece

    captions = [f"a {colour} {shape}, noto style" for colour in ("red", "blue") for shape in ("heart", "square")] * 5
    model, size = train_tokenizer(captions, vocab_size=400)
    assert (model, size) == train_tokenizer(captions, vocab_size=400)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert size == processor.get_piece_size() <= 400
    assert [processor.id_to_piece(number) for number in range(4)] == ["<pad>", "</s>", "<unk>", "<0x00>"]
    assert processor.bos_id() == -1
    strange = "a café 🦄 naïve 猫 house"
    assert processor.unk_id() not in processor.encode(strange)
    assert processor.decode(processor.encode(strange)) == strange


def test_a_long_caption_is_cut_not_lost():
    _, size = train_tokenizer(["heart " * 2500], vocab_size=400)
    assert size > 259


def test_a_vocabulary_too_small_gets_a_sentence():
    with pytest.raises(InputError, match="--vocab-size 262"):
        train_tokenizer(["red heart", "blue square"], vocab_size=262)
