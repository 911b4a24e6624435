"""Which images a step sees."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.train.sampler import Sampler

ITEMS = list(range(100, 117))
SIZES = [(128, 128) if item % 3 else (96, 160) for item in ITEMS]


def sampler(seed: int = 0, batch_size: int = 4, portion: int = 2) -> Sampler:
    return Sampler(ITEMS, SIZES, seed=seed, batch_size=batch_size, portion=portion)


@settings(max_examples=30, deadline=None)
@given(portions=st.integers(1, 5), portion=st.integers(1, 6), epoch=st.integers(0, 3))
def test_an_epoch_has_every_image_once_and_portions_of_one_size(portions: int, portion: int, epoch: int) -> None:
    made = sampler(batch_size=portions * portion, portion=portion)
    first = epoch * made.steps_per_epoch
    plans = [made.step(first + i) for i in range(made.steps_per_epoch)]
    assert Counter(s.item for plan in plans for p in plan.portions for s in p) == Counter(ITEMS)
    for plan in plans:
        assert plan.epoch == epoch
        assert [s.number for p in plan.portions for s in p] == list(range(plan.samples))
        assert all(len({SIZES[ITEMS.index(s.item)] for s in p}) == 1 for p in plan.portions)


def test_a_step_is_a_pure_function_of_seed_and_number() -> None:
    forwards = [sampler().step(i) for i in range(20)]
    assert [sampler().step(i) for i in reversed(range(20))] == forwards[::-1]
    assert sampler(seed=1).step(0) != forwards[0]
    assert forwards[0].portions != forwards[sampler().steps_per_epoch].portions  # the next epoch is another order


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_share_the_same_step(workers: int) -> None:
    plan = sampler(batch_size=8).step(1)
    dealt = [portion for rank in range(workers) for portion in plan.portions[rank::workers]]
    assert sorted(dealt, key=lambda p: p[0].number) == list(plan.portions)


def test_one_image_is_enough() -> None:
    lone = Sampler([5], [(8, 8)], seed=0, batch_size=4, portion=4)
    assert [s.item for s in lone.step(9).portions[0]] == [5]
