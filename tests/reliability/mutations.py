"""Seeded damage, and what becomes of it: a table of kinds of files, each with good bytes and a reader that is attacked.

To add a kind of file, make a `Kind` and give it to `attack`. A mutant has a number; its kind and number make it anew.
"""

import collections
import contextlib
import dataclasses
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

SAME, REFUSED, OTHER = "same content", "refused", "other content"
SECONDS = 20  # more than any reader needs on a busy machine
MIB = 600  # more memory than that is a bomb that went off

EXTREMES = [0, 1, -1, *(2**bits - low for bits in (7, 8, 15, 16, 31, 32, 63, 64) for low in (0, 1)), -(2**63)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of file that somebody may have damaged."""

    good: Callable[[Path], bytes]  # the bytes of a good one; the folder is its own, for what it needs beside it
    read: Callable[[Path, bytes], object]  # what the reader makes of such bytes in that folder
    refusals: tuple[type[Exception], ...]  # how the reader says no
    covered: bool = True  # a checksum covers all of it, so that nothing else than the good content may be read


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to three kinds of damage: it is always another string of bytes."""
    changed = data
    while changed == data:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            changed = rng.choice(DAMAGES)(bytearray(changed), rng)
    return changed


def _span(data: bytearray, rng: random.Random, most: int = 2000) -> tuple[int, int]:
    first = rng.randint(0, len(data))
    return first, min(len(data), first + rng.choice((1, 2, 8, rng.randint(1, most))))


def _flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 4, 16)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _truncate(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.choice((0, rng.randint(0, len(data)), max(0, len(data) - rng.randint(1, 600))))])


def _cut_out(data: bytearray, rng: random.Random) -> bytes:
    first, last = _span(data, rng)
    return bytes(data[:first] + data[last:])


def _zero(data: bytearray, rng: random.Random) -> bytes:
    first, last = _span(data, rng)
    data[first:last] = bytes([rng.choice((0, 0, 255, 32))]) * (last - first)
    return bytes(data)


def _insert(data: bytearray, rng: random.Random) -> bytes:
    where = rng.randint(0, len(data))
    return bytes(data[:where] + rng.randbytes(rng.choice((1, 2, 512, rng.randint(1, 3000)))) + data[where:])


def _double(data: bytearray, rng: random.Random) -> bytes:
    first, last = _span(data, rng)
    where = rng.choice((last, rng.randint(0, len(data))))
    return bytes(data[:where] + data[first:last] * rng.choice((1, 1, 2, 100)) + data[where:])


def _swap(data: bytearray, rng: random.Random) -> bytes:
    (a, b), (c, d) = sorted((_span(data, rng), _span(data, rng)))
    return bytes(data[:a] + data[c:d] + data[b:c] + data[a:b] + data[max(b, d) :])


def _length_field(data: bytearray, rng: random.Random) -> bytes:
    """A number of one to eight bytes, of either order, that says something extreme."""
    size = rng.choice((1, 2, 4, 8))
    where = rng.randint(0, max(0, len(data) - size))
    data[where : where + size] = (rng.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
    return bytes(data)


def _number(data: bytearray, rng: random.Random) -> bytes:
    """A number in digits that says something extreme, or something a little different."""
    found = [*re.finditer(rb"\d+", data)]
    if not found:
        return bytes(data)
    number = rng.choice(found)
    near = int(number.group()[:18]) + rng.choice((-1, 1, 512))
    said = rng.choice([near, *EXTREMES, 10**30, "1e999", "nan", "0x10", "1_0", "٣", ""])
    return bytes(data[: number.start()]) + str(said).encode() + bytes(data[number.end() :])


DAMAGES = (_flip, _flip, _flip, _truncate, _cut_out, _zero, _insert, _double, _swap, _length_field, _number)


@contextlib.contextmanager
def in_time(what: str) -> Iterator[None]:
    """Whatever is done in it has `SECONDS`."""

    def late(*_: object) -> None:
        raise AssertionError(f"{what}: no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind, folder: Path, good: object, mutant: bytes, what: str) -> str:
    """What the reader did with the mutant. Any exception but its refusals goes through, with `what` in its notes."""
    with in_time(what):
        try:
            read = kind.read(folder, mutant)
        except kind.refusals:
            return REFUSED
        except BaseException as error:
            error.add_note(f"{what}: {mutant[:200]!r}…")
            raise
    if read == good:
        return SAME
    assert not kind.covered, f"{what}: other content was taken in silence"
    return OTHER


def attack(kinds: Mapping[str, Kind], folder: Path, numbers: range) -> dict[str, collections.Counter[str]]:
    """Outcomes, counted, of mutants `numbers` of each kind; prints the table. Asserts time, memory and checksums."""
    counts = {name: collections.Counter[str]() for name in kinds}
    for name, kind in kinds.items():
        place = folder / re.sub(r"\W+", "-", name)
        place.mkdir()
        good = kind.good(place)
        content = kind.read(place, good)
        before = _peak_mib()
        for number in numbers:
            what = f"{name} {number}"
            mutant = mutate(good, random.Random(what))
            counts[name][outcome(kind, place, content, mutant, what)] += 1
        assert kind.read(place, good) == content, f"{name}: the good one reads otherwise after {len(numbers)} mutants"
        assert _peak_mib() - before < MIB, f"{name}: took {_peak_mib() - before:.0f} MiB"
    outcomes = (SAME, REFUSED, OTHER)
    print(f"\n{'':32}" + "".join(f"{outcome:>16}" for outcome in outcomes))
    for name, row in [*counts.items(), ("all", sum(counts.values(), collections.Counter[str]()))]:
        print(f"{name:32}" + "".join(f"{row[outcome]:16,}" for outcome in outcomes))
    return counts


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
