import pytest

from lorafleet.core.errors import Overloaded
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.recipe import RecipeStart
from lorafleet.serve.admission import Admission
from lorafleet.serve.work import Start, Work


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def admission(clock: Clock, **limits: int) -> Admission:
    return Admission(**{"servers": 1, "max_queued": 9, **limits}, clock=clock)


def learn(gate: Admission, clock: Clock, units: float, seconds: float) -> None:
    place = gate.admit(units, 1e9)
    clock.now += seconds
    place.leave(is_done=True)


def test_places_are_counted_and_given_back(clock: Clock) -> None:
    gate = admission(clock, servers=2, max_queued=1)
    places = [gate.admit(1, 10) for _ in range(3)]
    with pytest.raises(Overloaded, match="3 requests are running or waiting") as refused:
        gate.admit(1, 10)
    assert refused.value.retry_after_s >= 1
    places[0].leave(is_done=True)
    gate.admit(1, 10)


def test_what_would_be_late_is_refused_and_told_when_to_come_back(clock: Clock) -> None:
    gate = admission(clock)
    learn(gate, clock, units=10, seconds=20)  # 2 seconds a unit
    gate.admit(10, 30)
    assert gate.backlog_s == pytest.approx(20)
    gate.admit(5, 30)
    with pytest.raises(Overloaded, match="done in about 40 seconds, as 30 seconds of work are in front") as refused:
        gate.admit(5, 30)
    assert refused.value.retry_after_s == pytest.approx(10)


def test_what_is_too_long_by_itself_is_to_come_back_when_nobody_is_before_it(clock: Clock) -> None:
    gate = admission(clock)
    learn(gate, clock, units=1, seconds=1)
    place = gate.admit(4, 30)
    with pytest.raises(Overloaded) as refused:
        gate.admit(100, 30)
    assert refused.value.retry_after_s == pytest.approx(4)
    place.leave(is_done=True)
    gate.admit(100, 30)  # a wrong idea of the speed must not refuse for ever


def test_work_done_side_by_side_counts_once(clock: Clock) -> None:
    gate = admission(clock)
    places = [gate.admit(10, 1e9) for _ in range(4)]
    clock.now += 20  # all 40 units together
    for place in places:
        place.leave(is_done=True)
    gate.admit(10, 1e9)
    assert gate.backlog_s == pytest.approx(5, rel=0.5)


def test_what_fails_or_is_called_off_teaches_nothing(clock: Clock) -> None:
    gate = admission(clock)
    learn(gate, clock, units=1, seconds=1)
    place = gate.admit(1, 1e9)
    clock.now += 1000
    place.leave(is_done=False)
    learn(gate, clock, units=1, seconds=1)
    gate.admit(1, 1e9)
    assert gate.backlog_s == pytest.approx(1)


def test_cost_counts_images_steps_rows_and_pixels() -> None:
    def cost(start: Start | None = None, **fields: object) -> float:
        request = {"prompt": "x", "width": 1000, "height": 1000, "steps": 10, "guidance_scale": 1.0, **fields}
        return Work(GenerationRequest.model_validate(request), start).cost()

    assert cost() == pytest.approx(12)
    assert cost(guidance_scale=5.0, num_images=2, width=500) == pytest.approx(24)
    assert cost(step_reuse=2) == pytest.approx(7.5)
    assert cost(scheduler="heun") == pytest.approx(22)
    assert cost(Start(b"", None, RecipeStart(image="0" * 64, strength=0.5))) == pytest.approx(7)
