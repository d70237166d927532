"""The plan: every sample once a pass, each step one image shape, the same on any layout and from any step on."""

import hashlib
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit.data.plan import ROW_ATTEMPTS, Plan, rows
from mpdit.errors import InputError

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**64 - 1)
SHAPES = ((16, 16), (24, 12), (12, 24))


def make(samples: int = 10, batch_size: int = 4, seed: int = 0, fingerprint: str = "f") -> Plan:
    """Of one set and one bucket."""
    parts = rows(np.zeros(samples, np.int64), [samples])
    return Plan(shapes=SHAPES[:1], rows=parts, batch_size=batch_size, seed=seed, fingerprint=fingerprint)


def run(plan: Plan, steps: int) -> tuple[np.ndarray, np.ndarray]:
    batches = [plan.batch(step) for step in range(steps)]
    return np.concatenate([b.sample_ids for b in batches]), np.concatenate([b.visits for b in batches])


@settings(deadline=None)
@given(samples=sizes, batch_size=sizes, seed=seeds)
def test_every_epoch_is_a_permutation(samples: int, batch_size: int, seed: int) -> None:
    steps = -(-3 * samples // batch_size)
    ids, visits = run(make(samples, batch_size, seed), steps)
    assert ids.dtype == visits.dtype == np.int64
    assert len(ids) == steps * batch_size
    for epoch in range(3):
        place = slice(epoch * samples, (epoch + 1) * samples)
        assert sorted(ids[place]) == list(range(samples))
        assert set(visits[place]) == {epoch}


@settings(deadline=None)
@given(
    samples=sizes,
    dp_size=st.integers(1, 4),
    micros=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
    step=st.integers(0, 10**6),
)
def test_ranks_and_micro_batches_share_the_global_batch_in_order(
    samples: int, dp_size: int, micros: int, micro_batch: int, step: int
) -> None:
    plan = make(samples, dp_size * micros * micro_batch)
    parts = [part for rank in range(dp_size) for part in plan.local(step, rank, dp_size, micro_batch)]
    whole = plan.batch(step)
    assert {len(part) for part in parts} == {micro_batch}
    assert np.array_equal(np.concatenate([part.sample_ids for part in parts]), whole.sample_ids)
    assert np.array_equal(np.concatenate([part.visits for part in parts]), whole.visits)


@settings(deadline=None)
@given(samples=sizes, batch_size=sizes, order=st.permutations(range(8)))
def test_a_batch_needs_no_earlier_call(samples: int, batch_size: int, order: list[int]) -> None:
    used = make(samples, batch_size)
    for step in order:
        fresh = make(samples, batch_size)
        assert np.array_equal(used.batch(step).sample_ids, fresh.batch(step).sample_ids)


@settings(deadline=None)
@given(samples=sizes, batch_size=sizes, other=sizes)
def test_the_order_does_not_depend_on_the_batch_size(samples: int, batch_size: int, other: int) -> None:
    count = min(4 * batch_size, 4 * other)
    one, two = run(make(samples, batch_size), 4)[0], run(make(samples, other), 4)[0]
    assert np.array_equal(one[:count], two[:count])


def test_seed_and_epoch_change_the_order() -> None:
    orders = [tuple(make(100, 100, seed).batch(epoch).sample_ids) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_order_is_pinned() -> None:
    """A resumed run must find its place under any version of numpy: raise plan.VERSION if this has to change."""
    assert make(10, 10, seed=7).batch(0).sample_ids.tolist() == [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]
    order = make(5000, 5000, seed=7).batch(3).sample_ids
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "19de1ad885e4fc65"
    assert make(10, 10, seed=7).hash[:16] == "1f66cdaf018b3ccf"


def test_hash_changes_with_every_input() -> None:
    plan = make()
    changed = [make(samples=11), make(batch_size=5), make(seed=1), make(fingerprint="g")]
    assert len({plan.hash, *(other.hash for other in changed)}) == 5
    assert make().hash == plan.hash
    plan.batch(100)
    assert make().hash == plan.hash


def test_hash_changes_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make().hash
    monkeypatch.setattr("mpdit.data.plan.VERSION", 2)
    assert make().hash != before


def test_one_sample_and_batches_of_several_epochs() -> None:
    assert make(1, 3).batch(2).visits.tolist() == [6, 7, 8]
    assert make(1, 3).batch(2).sample_ids.tolist() == [0, 0, 0]
    batch = make(2, 7).batch(1)
    assert batch.visits.tolist() == [3, 4, 4, 5, 5, 6, 6]


def test_only_the_last_permutations_are_kept() -> None:
    plan = make(10, 35)
    for step in range(20):
        plan.batch(step)
        assert len(plan._permutations[0, 0]) <= 2


def test_epoch() -> None:
    assert make(10, 4).epoch(0) == 0.0
    assert make(10, 4).epoch(5) == 2.0


def test_a_batch_can_be_changed_without_changing_the_plan() -> None:
    plan = make(8, 8)
    before = plan.batch(0).sample_ids.copy()
    plan.batch(0).sample_ids[:] = 0
    assert np.array_equal(plan.batch(0).sample_ids, before)


def test_uneven_splits_are_refused() -> None:
    with pytest.raises(InputError, match=r"train.batch_size is 10, which 4 data-parallel ranks"):
        make(10, 10).local(0, 0, 4, 1)
    with pytest.raises(InputError, match=r"parallel.micro_batch is 3, but should divide the 5 images"):
        make(10, 10).local(0, 0, 2, 3)
    with pytest.raises(InputError, match=r"parallel.micro_batch is 0"):
        make(10, 10).local(0, 0, 2, 0)


@pytest.mark.parametrize("bad", [{"samples": 0}, {"batch_size": 0}, {"seed": -1}, {"seed": 2**64}])
def test_impossible_plans(bad: dict) -> None:
    with pytest.raises(ValueError, match="no plan of"):
        make(**bad)


def test_impossible_places() -> None:
    with pytest.raises(ValueError, match="step -1"):
        make().batch(-1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        make().local(0, 2, 2, 1)


# ---- several sets and buckets ----------------------------------------------------------------------------------------


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Up to three sets in up to three buckets, weighted or not."""
    sets = draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    bucket_N = draw(st.lists(st.integers(0, 2), min_size=sum(sets), max_size=sum(sets)))
    weight = st.one_of(st.floats(0.01, 100), st.integers(1, 5))
    weights = draw(st.one_of(st.just([]), st.lists(weight, min_size=len(sets), max_size=len(sets))))
    return {"bucket_N": np.array(bucket_N), "sets": sets, "weights": weights}


def mixed(mixture: dict[str, Any], batch_size: int = 6, seed: int = 0) -> Plan:
    return Plan(shapes=SHAPES, rows=rows(**mixture), batch_size=batch_size, seed=seed, fingerprint="f")


def set_of(mixture: dict[str, Any], samples: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(mixture["sets"]), samples, side="right")


@settings(deadline=None)
@given(mixture=mixtures(), batch_size=sizes, seed=seeds)
def test_every_pass_of_a_row_has_each_sample_once(mixture: dict[str, Any], batch_size: int, seed: int) -> None:
    plan = mixed(mixture, batch_size, seed)
    drawn: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for step in range(40):
        batch = plan.batch(step)
        assert set(mixture["bucket_N"][batch.sample_ids]) == {batch.bucket} == {plan.bucket(step)}
        assert plan.height_width(step) == SHAPES[batch.bucket]
        places = zip(set_of(mixture, batch.sample_ids).tolist(), batch.sample_ids, batch.visits, strict=True)
        for number, sample, visit in places:
            drawn.setdefault((batch.bucket, number), []).append((int(visit), int(sample)))
    for (bucket, number), found in drawn.items():
        own = (mixture["bucket_N"] == bucket) & (set_of(mixture, np.arange(plan.samples)) == number)
        wanted = [(visit, sample) for visit in range(len(found)) for sample in np.flatnonzero(own).tolist()]
        assert [visit for visit, _ in found] == [visit for visit, _ in wanted[: len(found)]]
        whole = len(found) // own.sum() * own.sum()
        assert sorted(found[:whole]) == wanted[:whole]
        assert len(set(found)) == len(found)


@settings(deadline=None)
@given(mixture=mixtures(), dp_size=st.integers(1, 3), micro_batch=st.integers(1, 3), step=st.integers(0, 10**9))
def test_layouts_share_mixed_batches_in_order(
    mixture: dict[str, Any], dp_size: int, micro_batch: int, step: int
) -> None:
    plan = mixed(mixture, dp_size * micro_batch * 2)
    parts = [part for rank in range(dp_size) for part in plan.local(step, rank, dp_size, micro_batch)]
    whole = mixed(mixture, dp_size * micro_batch * 2).batch(step)
    assert {part.bucket for part in parts} == {whole.bucket}
    assert np.array_equal(np.concatenate([part.sample_ids for part in parts]), whole.sample_ids)
    assert np.array_equal(np.concatenate([part.visits for part in parts]), whole.visits)


@settings(deadline=None)
@given(mixture=mixtures(), order=st.permutations(range(12)))
def test_a_mixed_batch_needs_no_earlier_call(mixture: dict[str, Any], order: list[int]) -> None:
    used = mixed(mixture)
    for step in order:
        one, other = used.batch(step), mixed(mixture).batch(step)
        assert (one.bucket, one.sample_ids.tolist()) == (other.bucket, other.sample_ids.tolist())
        assert one.visits.tolist() == other.visits.tolist()


@settings(deadline=None)
@given(mixture=mixtures(), steps=st.integers(1, 60), batch_size=st.integers(1, 9))
def test_buckets_and_sets_have_their_shares_at_any_time(mixture: dict[str, Any], steps: int, batch_size: int) -> None:
    """Batches of each bucket, and in a bucket's batches the samples of each set, to within 1 (see Turns: 3 rows)."""
    plan = mixed(mixture, batch_size)
    sets, weights = mixture["sets"], [Fraction(weight) for weight in mixture["weights"] or mixture["sets"]]
    number_N = set_of(mixture, np.arange(plan.samples))
    share = {
        (bucket, number): weight * int(((mixture["bucket_N"] == bucket) & (number_N == number)).sum()) / sets[number]
        for bucket in range(3)
        for number, weight in enumerate(weights)
    }
    batches, samples = Counter(), Counter()
    for step in range(steps):
        batch = plan.batch(step)
        batches[batch.bucket] += 1
        samples.update((batch.bucket, number) for number in set_of(mixture, batch.sample_ids).tolist())
    for bucket in range(3):
        of_bucket = sum(share[bucket, number] for number in range(len(sets)))
        assert abs(batches[bucket] - steps * of_bucket / sum(weights)) <= 1
        for number in range(len(sets) if of_bucket else 0):
            wanted = batches[bucket] * batch_size * share[bucket, number] / of_bucket
            assert abs(samples[bucket, number] - wanted) <= 1


def test_weights_are_shares_whatever_their_scale() -> None:
    sets = {"bucket_N": np.array([0] * 30 + [1] * 10), "sets": [30, 10]}
    one, other = (mixed({**sets, "weights": weights}) for weights in ([0.25, 0.75], [1, 3]))
    assert one.hash == other.hash
    assert [one.bucket(step) for step in range(400)].count(1) == 300
    by_number = mixed({**sets, "weights": []})
    assert [by_number.bucket(step) for step in range(400)].count(1) == 100
    assert by_number.hash == mixed({**sets, "weights": [30, 10]}).hash != one.hash


def test_the_mixed_order_is_pinned() -> None:
    """A resumed run must find its place under any version of numpy: raise plan.VERSION if this has to change."""
    mixture = {"bucket_N": np.arange(1000) % 7 % 3, "sets": [600, 400], "weights": [0.3, 0.7]}
    plan = mixed(mixture, 50, seed=7)
    order = np.concatenate([[b.bucket, *b.sample_ids, *b.visits] for b in map(plan.batch, range(100))])
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "68c8292591ddb70d"
    assert plan.hash[:16] == "a5b708626be82138"


def test_the_hash_knows_which_samples_are_in_which_row() -> None:
    def hashed(bucket_N: list[int], sets: list[int]) -> str:
        return mixed({"bucket_N": np.array(bucket_N), "sets": sets, "weights": []}).hash

    assert (
        len({hashed(b, s) for b in ([0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1]) for s in ([3], [1, 2], [2, 1])}) == 12
    )
    assert hashed([0, 0, 0], [3]) == make(samples=3, batch_size=6).hash


def test_a_stand_in_is_of_the_same_row_and_another_every_time() -> None:
    mixture = {"bucket_N": np.arange(60) % 3, "sets": [30, 30], "weights": []}
    plan = mixed(mixture)
    found = [plan.stand_in(1, 31, visit, attempt) for visit in range(20) for attempt in range(ROW_ATTEMPTS)]
    assert set(found) == {sample for sample in range(30, 60) if sample % 3 == 1}
    assert len({tuple(found[i : i + ROW_ATTEMPTS]) for i in range(0, len(found), ROW_ATTEMPTS)}) == 20
    last = {plan.stand_in(1, 31, visit, ROW_ATTEMPTS) for visit in range(1000)}
    assert last == set(range(60))
    assert mixed(mixture, seed=1).stand_in(1, 31, 0, 0) != plan.stand_in(1, 31, 0, 0)
