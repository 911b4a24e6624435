"""CLIP scores for Prometheus: as a text file that node_exporter collects, or pushed to a Pushgateway.

A run ends before anybody would scrape it, on Ray too, so nothing is served and no Ray gauge is set.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lorafleet.core.errors import StorageUnavailable
from lorafleet.core.metrics import EVAL_CLIP_SCORE
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.results import Results

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

CLIP: Final = "clip"
JOB: Final = "lorafleet_eval"
TIMEOUT_S: Final = 10.0


def tell_scores(results: Results, config: EvalConfig) -> None:
    """Of every system that has a CLIP score, to whom the settings name. Raises StorageUnavailable."""
    if config.metrics_file is None and config.metrics_gateway is None:
        return
    from prometheus_client import CollectorRegistry, Gauge

    registry = CollectorRegistry()
    gauge = Gauge(EVAL_CLIP_SCORE.name, EVAL_CLIP_SCORE.description, EVAL_CLIP_SCORE.labels, registry=registry)
    for name, system in results.systems.items():
        if CLIP in system.scores:
            gauge.labels(suite=results.suite.name, adapter=name).set(system.scores[CLIP].mean)
    if config.metrics_file is not None:
        _write(config.metrics_file, registry)
    if config.metrics_gateway is not None:
        _push(config.metrics_gateway, registry, results.suite.name)


def _write(path: Path, registry: "CollectorRegistry") -> None:
    from prometheus_client import write_to_textfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(os.fspath(path), registry)
    except OSError as error:
        raise StorageUnavailable(f"{path} cannot be written: {error.strerror}.", param="metrics_file") from error


def _push(address: str, registry: "CollectorRegistry", suite: str) -> None:
    """In place of what an earlier run of the suite pushed."""
    from prometheus_client import push_to_gateway

    try:
        push_to_gateway(address, JOB, registry, grouping_key={"suite": suite}, timeout=TIMEOUT_S)
    except OSError as error:  # urllib's errors are
        raise StorageUnavailable(
            f"the Pushgateway {address} does not take the scores: {error}.", param="metrics_gateway"
        ) from error
