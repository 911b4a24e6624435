"""How many replicas the work asks for."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from lorafleet.serve.config import ScalingSettings
from lorafleet.serve.scaling import BacklogPolicy, autoscaling


def wanted(reported: dict[str, float] | None, requests: int) -> float:
    metrics = None if reported is None else {"backlog_s": reported}
    context = cast("Any", SimpleNamespace(aggregated_metrics=metrics, total_num_requests=requests))
    replicas, state = BacklogPolicy(backlog_s=10)(context)
    assert state == {}
    return replicas


@pytest.mark.parametrize(
    ("reported", "requests", "replicas"),
    [
        (None, 0, 0),
        (None, 3, 1),
        ({"a": 0.0, "b": 0.0}, 0, 0),
        ({"a": 0.1}, 1, 1),
        ({"a": 10.0}, 5, 1),
        ({"a": 25.0, "b": 5.0}, 9, 3),
    ],
)
def test_replicas_are_as_many_as_bring_the_work_down(
    reported: dict[str, float] | None, requests: int, replicas: float
) -> None:
    assert wanted(reported, requests) == replicas


@pytest.mark.filterwarnings("ignore:.*metrics_interval_s.*:DeprecationWarning")
def test_ray_gets_bounds_and_delays() -> None:
    settings = ScalingSettings(min_replicas=2, max_replicas=5, upscale_delay_s=3, downscale_delay_s=60)
    for replicas, initial in ((1, 2), (3, 3), (9, 5)):
        config = autoscaling(settings, replicas)
        assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, initial, 5)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (3, 60)


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_replicas=3 is above max_replicas=2"):
        ScalingSettings(min_replicas=3, max_replicas=2)
