from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lorafleet.serve.engine.order import choose, seat


@dataclass
class Waiting:
    arrival: int
    deadline: float | None = None
    size: tuple[int, int] = (64, 64)
    skipped_turns: int = 0
    step_reuse: int = 1
    steps: int = 0

    @property
    def is_shallow(self) -> bool:
        return self.steps % self.step_reuse > 0


def arrivals(chosen: list[Waiting]) -> list[int]:
    return [waiting.arrival for waiting in chosen]


def test_earliest_deadline_first_then_first_come() -> None:
    waiting = [Waiting(0), Waiting(1, deadline=9.0), Waiting(2, deadline=5.0), Waiting(3)]
    assert arrivals(choose(waiting, max_jobs=3, max_skipped_turns=10)) == [2, 1, 0]


def test_a_batch_has_the_size_of_the_most_urgent() -> None:
    waiting = [Waiting(0), Waiting(1, 5.0, (96, 64)), Waiting(2, 6.0), Waiting(3, None, (96, 64))]
    assert arrivals(choose(waiting, max_jobs=8, max_skipped_turns=10)) == [1, 3]
    assert [one.skipped_turns for one in waiting] == [1, 0, 1, 0]


def test_shallow_steps_of_that_size_go_first_and_whole_ones_together() -> None:
    urgent, other = Waiting(0, deadline=1.0), Waiting(3, size=(96, 64), step_reuse=2, steps=1)
    waiting = [urgent, Waiting(1, step_reuse=2, steps=1), Waiting(2, step_reuse=3, steps=1), other]
    turns = []
    for _ in range(4):
        chosen = choose(waiting, max_jobs=8, max_skipped_turns=10)
        turns.append(arrivals(chosen))
        for one in chosen:
            one.steps += 1
    assert turns == [[1, 2], [2], [0, 1, 2], [1, 2]]
    urgent.skipped_turns = 10
    assert arrivals(choose(waiting, max_jobs=8, max_skipped_turns=10)) == [0, 1]


def test_who_was_skipped_too_often_goes_first() -> None:
    late = Waiting(0, deadline=None, size=(96, 96), skipped_turns=4)
    urgent = Waiting(1, deadline=0.0)
    assert choose([late, urgent], max_jobs=2, max_skipped_turns=5) == [urgent]
    assert choose([late, urgent], max_jobs=2, max_skipped_turns=5) == [late]
    assert late.skipped_turns == 0


@given(
    deadlines=st.lists(st.none() | st.floats(0, 100), min_size=1, max_size=12),
    sizes=st.lists(st.sampled_from([(64, 64), (96, 96), (128, 64)]), min_size=12, max_size=12),
    reuses=st.lists(st.integers(1, 5), min_size=12, max_size=12),
    max_jobs=st.integers(1, 8),
    max_skipped_turns=st.integers(0, 10),
)
def test_nobody_is_passed_over_for_ever(
    deadlines: list[float | None],
    sizes: list[tuple[int, int]],
    reuses: list[int],
    max_jobs: int,
    max_skipped_turns: int,
) -> None:
    waiting = [Waiting(i, deadline, sizes[i], step_reuse=reuses[i]) for i, deadline in enumerate(deadlines)]
    for _ in range(4 * (max_skipped_turns + len(waiting))):
        chosen = choose(waiting, max_jobs=max_jobs, max_skipped_turns=max_skipped_turns)
        assert 1 <= len(chosen) <= max_jobs
        assert len({(one.size, one.is_shallow) for one in chosen}) == 1
        assert all(one.skipped_turns <= max_skipped_turns + len(waiting) for one in waiting)
        for one in chosen:
            one.steps += 1


def seated(waiting: list[Waiting], can: Callable[[int, bool], bool], max_skipped_turns: int = 10) -> list[int]:
    got: list[int] = []

    def claim(one: Waiting, only_resident: bool) -> bool:
        if can(one.arrival, only_resident):
            got.append(one.arrival)
        return one.arrival in got

    seat(waiting, claim, max_skipped_turns=max_skipped_turns)
    return got


def test_slots_go_to_the_most_urgent_first() -> None:
    waiting = [Waiting(0), Waiting(1, deadline=9.0), Waiting(2, deadline=5.0)]
    assert seated(waiting, lambda arrival, only_resident: not only_resident) == [2, 1, 0]


def test_behind_one_that_waits_for_slots_nobody_takes_new_ones() -> None:
    waiting = [Waiting(0), Waiting(1), Waiting(2), Waiting(3)]
    assert seated(waiting, lambda arrival, only_resident: arrival != 1) == [0, 2, 3]
    assert seated(waiting, lambda arrival, only_resident: arrival != 1 and not only_resident) == [0]


def test_who_waited_for_slots_too_long_is_passed_by_nobody() -> None:
    waiting = [Waiting(0, skipped_turns=3), Waiting(1, deadline=1.0), Waiting(2)]
    assert seated(waiting, lambda arrival, only_resident: arrival != 0, max_skipped_turns=3) == []
    assert seated(waiting, lambda arrival, only_resident: arrival != 0, max_skipped_turns=4) == [1, 2]
