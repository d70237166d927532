"""The write side of a sharded checkpoint: shares of equal size, nothing twice and nothing missing."""

import io
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ranks


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    ranks.warm()


def chunk(key: str, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]):  # type: ignore[no-untyped-def]
    from mpdit.parallel.packed import Chunk

    return Chunk(key=key, whole=whole, offset=offset, shape=shape)


def place(key: str, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]):  # type: ignore[no-untyped-def]
    from mpdit.parallel.packed import Place

    return Place(chunk=chunk(key, whole, offset, shape), file="__0_0.distcp", start=0, size=1)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 10**6), max_size=200), count=st.integers(1, 16))
def test_shares_differ_by_one_tensor_at_most(sizes: list[int], count: int) -> None:
    from mpdit.parallel.packed import Shares

    shares, held = Shares(count), [0] * count
    for size in sizes:
        held[shares.owner(size)] += size
    assert max(held) - min(held) <= max(sizes, default=0)


def test_files_lie_end_to_end_and_are_used_again() -> None:
    from mpdit.parallel.packed import Image

    image = Image()
    for round_ in range(2):
        image.clear()
        image.add("a", b"12345")
        image.open("b")
        image.write(memoryview(torch.arange(3.0).numpy()))
        assert image.tell() == 12
        assert image.files == {"a": (0, 5), "b": (5, 12)}, round_
        assert os.pread(image.fd, 5, 0) == b"12345"
    image.close()


def test_a_view_is_written_alone_and_loads_without_code() -> None:
    """A parameter is often a view of a buffer of all parameters; torch.save would take the buffer along."""
    from mpdit.parallel.packed import put

    value, stream = torch.arange(10_000.0)[5000:5006].view(2, 3), io.BytesIO(b"before")
    stream.seek(6)
    found = put(stream, "file", chunk("a", (2, 3), (0, 0), (2, 3)), value)
    assert (found.start, found.size) == (6, len(stream.getvalue()) - 6)
    assert found.size < 2000
    assert torch.serialization.get_crc32_options(), "the setting is put back"
    read = torch.load(io.BytesIO(stream.getvalue()[found.start :]), weights_only=True)
    assert read.tolist() == value.tolist()


def test_chunks_make_up_the_whole_once() -> None:
    left, right = place("a", (2, 4), (0, 0), (2, 2)), place("a", (2, 4), (0, 2), (2, 2))
    from mpdit.parallel.packed import index_files

    assert {".metadata", "metadata.json", "common.pt"} == index_files([left, right]).keys()
    with pytest.raises(ValueError, match="the chunks of a do not make up the whole"):
        index_files([left])
    with pytest.raises(ValueError, match="a has two chunks at"):
        index_files([left, right, right])
