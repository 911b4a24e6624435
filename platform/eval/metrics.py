"""CLIP scores for Prometheus: through Ray where a run is on it, else as a text file that node_exporter collects."""

import os
from pathlib import Path

from lorafleet.core.errors import StorageUnavailable
from lorafleet.core.metrics import EVAL_CLIP_SCORE
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.results import Results

CLIP = "clip"


def tell_scores(results: Results, config: EvalConfig) -> None:
    """Of every system that has a CLIP score. Does nothing where nobody is told of. Raises StorageUnavailable."""
    scores = {
        (results.suite.name, name): system.scores[CLIP].mean
        for name, system in results.systems.items()
        if CLIP in system.scores
    }
    if config.metrics_file is not None:
        write_textfile(config.metrics_file, scores)
    if config.run.ray:
        from lorafleet.eval.ray_crew import connected, tell_ray

        with connected(config, config.run.workers):
            tell_ray(scores)


def write_textfile(path: Path, scores: dict[tuple[str, str], float]) -> None:
    """By (suite, adapter), in the text format; replaced whole."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()
    gauge = Gauge(EVAL_CLIP_SCORE.name, EVAL_CLIP_SCORE.description, EVAL_CLIP_SCORE.labels, registry=registry)
    for (suite, adapter), score in scores.items():
        gauge.labels(suite=suite, adapter=adapter).set(score)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(os.fspath(path), registry)
    except OSError as error:
        raise StorageUnavailable(f"{path} cannot be written: {error.strerror}.", param="metrics_file") from error
