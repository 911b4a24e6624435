"""How many seconds of work are in flight, learnt as it is done."""

import pytest

from lorafleet.serve.workload import Workload


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_backlog_is_the_units_in_flight_at_the_speed_so_far() -> None:
    clock = Clock()
    load = Workload(clock)
    load.enter(10)
    assert (load.in_flight, load.unit_s, load.backlog_s) == (1, 0, 0)  # nothing is known yet
    load.enter(30)
    clock.now += 2
    load.leave(10, is_done=True)
    assert load.unit_s == pytest.approx(0.2)
    assert load.backlog_s == pytest.approx(6)
    clock.now += 6
    load.leave(30, is_done=True)
    assert (load.in_flight, load.backlog_s) == (0, 0)


def test_pauses_and_what_failed_teach_nothing() -> None:
    clock = Clock()
    load = Workload(clock)
    for is_done in (True, False):
        clock.now += 1000
        load.enter(10)
        clock.now += 1 if is_done else 500
        load.leave(10, is_done=is_done)
    assert load.unit_s == pytest.approx(0.1)


def test_a_new_speed_is_learnt() -> None:
    clock = Clock()
    load = Workload(clock)
    for seconds in (1, *(5,) * 30):
        load.enter(10)
        clock.now += seconds
        load.leave(10, is_done=True)
    assert load.unit_s == pytest.approx(0.5, rel=0.01)
