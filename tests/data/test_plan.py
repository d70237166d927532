import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit.data.plan import Plan
from mpdit.errors import InputError

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**64 - 1)


def make(samples: int = 10, batch_size: int = 4, seed: int = 0, fingerprint: str = "f") -> Plan:
    return Plan(samples=samples, batch_size=batch_size, seed=seed, fingerprint=fingerprint)


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
    changed = [
        dataclasses.replace(plan, samples=11),
        dataclasses.replace(plan, batch_size=5),
        dataclasses.replace(plan, seed=1),
        dataclasses.replace(plan, fingerprint="g"),
    ]
    assert len({plan.hash, *(other.hash for other in changed)}) == 5
    assert make().hash == plan.hash
    plan.batch(100)
    assert make().hash == plan.hash
    assert make() == plan


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
        assert len(plan._permutations) <= 2


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
