"""How many replicas there should be, by the seconds of work in front of them, as Ray Serve's autoscaling policy.

Not by requests in flight, Ray's own measure: one may be a step of 64 x 64 pixels or eight images of 150 steps each.
"""

import warnings
from typing import Any, Final

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from lorafleet.serve.config import ScalingSettings

BACKLOG: Final = "backlog_s"  # what replicas report
IN_FLIGHT: Final = "in_flight"
REPORT_S: Final = 1.0
LOOK_BACK_S: Final = 5.0


class BacklogPolicy:
    """As many replicas as bring the work in front of each down to `backlog_s` seconds. Ray adds bounds and delays."""

    def __init__(self, backlog_s: float) -> None:
        self._backlog_s = backlog_s

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        wanted = sum(reported.get(BACKLOG, {}).values()) / self._backlog_s
        # The last one stays while anything is in flight, however short; and where there is none, somebody asks for one.
        is_needed = sum(reported.get(IN_FLIGHT, {}).values()) > 0 or context.total_num_requests > 0
        return max(wanted, 1.0 if is_needed else 0.0), {}


def autoscaling(settings: ScalingSettings, initial_replicas: int) -> AutoscalingConfig:
    # Ray 2.60 warns of it, and does not read the variables yet that its warning names.
    warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
    name = f"{BacklogPolicy.__module__}:{BacklogPolicy.__qualname__}"
    return AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        initial_replicas=min(max(initial_replicas, settings.min_replicas), settings.max_replicas),
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        look_back_period_s=LOOK_BACK_S,
        metrics_interval_s=REPORT_S,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function=name, policy_kwargs={"backlog_s": settings.backlog_s}
        ),
    )
