"""A run's numbers for Prometheus: its own port for a process of ours, Ray's for a worker of Ray."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from lorafleet.core.errors import ConfigError
from lorafleet.core.metrics import (
    TRAIN_CLIP_SCORE,
    TRAIN_EPOCH,
    TRAIN_GRADIENT_NORM,
    TRAIN_IMAGES_PER_SECOND,
    TRAIN_LEARNING_RATE,
    TRAIN_LOSS,
    TRAIN_SKIPPED_STEPS,
    TRAIN_STEP,
    TRAIN_VALIDATION_LOSS,
    Metric,
)
from lorafleet.train.watch import SampleReport

GAUGES: Final[Mapping[str, Metric]] = {
    "train/loss": TRAIN_LOSS,
    "train/lr": TRAIN_LEARNING_RATE,
    "train/gradient_norm": TRAIN_GRADIENT_NORM,
    "train/images_per_second": TRAIN_IMAGES_PER_SECOND,
    "train/epoch": TRAIN_EPOCH,
    "validation/loss": TRAIN_VALIDATION_LOSS,
    "validation/clip_score": TRAIN_CLIP_SCORE,
}
"""By the name that other trackers use. One run has a process, so there are no labels."""

Send = Callable[[float], object]
"""Sets a gauge, or adds to a counter."""


class Metrics:
    """A Tracker that sets gauges, and counts the steps that were none."""

    def __init__(self, make: Callable[[Metric], Send], close: Callable[[], None] = lambda: None) -> None:
        self._gauges = {key: make(metric) for key, metric in GAUGES.items()}
        self._step = make(TRAIN_STEP)
        self._skipped = make(TRAIN_SKIPPED_STEPS)
        self._skipped(0)
        self._close = close

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._step(step)
        if not all(math.isfinite(values.get(key, 0.0)) for key in ("train/loss", "train/gradient_norm")):
            self._skipped(1)
        for key, value in values.items():
            if key in self._gauges:
                self._gauges[key](value)

    def images(self, report: SampleReport) -> None:
        return

    def close(self) -> None:
        self._close()


def served_metrics(port: int) -> Metrics:
    """Numbers that Prometheus may scrape on 127.0.0.1 until they are closed. Raises ConfigError for a taken port."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ConfigError(
            f"watch.metrics_port {port} cannot be used ({error.strerror}): choose another one",
            param="watch.metrics_port",
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    def make(metric: Metric) -> Send:
        if metric.kind == "counter":
            return Counter(metric.name, metric.description, registry=registry).inc
        return Gauge(metric.name, metric.description, registry=registry).set

    return Metrics(make, close)


def ray_metrics() -> Metrics:
    """Numbers that Ray gathers from its workers; it puts `ray_` in front of their names."""
    from ray.util.metrics import Counter, Gauge

    def make(metric: Metric) -> Send:
        if metric.kind == "counter":
            counter: Any = Counter(metric.name, description=metric.description)
            return lambda amount: counter.inc(amount) if amount else None  # Ray's takes no 0
        gauge: Any = Gauge(metric.name, description=metric.description)
        return lambda value: gauge.set(value)

    return Metrics(make)
