"""A run's numbers for Prometheus: its own port for a process of ours, Ray's for a worker of Ray."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from lorafleet.core.errors import ConfigError
from lorafleet.train.watch import SampleReport

GAUGES: Final[Mapping[str, tuple[str, str]]] = {
    "train/loss": ("lorafleet_train_loss", "Loss of the last step, weights of the objective included."),
    "train/lr": ("lorafleet_train_learning_rate", "Learning rate of the last step."),
    "train/gradient_norm": ("lorafleet_train_gradient_norm", "Norm of the last step's gradient, before clipping."),
    "train/images_per_second": ("lorafleet_train_images_per_second", "Images a second of the last step, all workers."),
    "train/epoch": ("lorafleet_train_epoch", "Epoch of the last step, from 0."),
    "validation/loss": ("lorafleet_train_validation_loss", "Loss on held-out images at eight fixed timesteps."),
    "validation/clip_score": ("lorafleet_train_clip_score", "Mean CLIP score of the last sample pictures."),
}
"""Name and description by the name that other trackers use. One run has a process, so there are no labels."""
STEP: Final = ("lorafleet_train_step", "Steps taken.")

SetGauge = Callable[[float], object]


class Metrics:
    """A Tracker that sets gauges."""

    def __init__(self, make_gauge: Callable[[str, str], SetGauge], close: Callable[[], None] = lambda: None) -> None:
        self._gauges = {key: make_gauge(*about) for key, about in GAUGES.items()}
        self._step = make_gauge(*STEP)
        self._close = close

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._step(step)
        for key, value in values.items():
            if key in self._gauges:
                self._gauges[key](value)

    def images(self, report: SampleReport) -> None:
        return

    def close(self) -> None:
        self._close()


def served_metrics(port: int) -> Metrics:
    """Gauges that Prometheus may scrape on 127.0.0.1 until they are closed. Raises ConfigError for a taken port."""
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

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

    return Metrics(lambda name, about: Gauge(name, about, registry=registry).set, close)


def ray_metrics() -> Metrics:
    """Gauges that Ray gathers from its workers; it puts `ray_` in front of their names."""
    from ray.util.metrics import Gauge

    def make_gauge(name: str, about: str) -> SetGauge:
        gauge: Any = Gauge(name, description=about)
        return lambda value: gauge.set(value)

    return Metrics(make_gauge)
