"""What Prometheus reads of a run."""

import math
import socket
import urllib.request
from dataclasses import replace

import pytest

from lorafleet.core.errors import ConfigError
from lorafleet.core.metrics import ALL, TRAIN_SKIPPED_STEPS, TRAIN_STEP
from lorafleet.train.metrics import GAUGES, served_metrics
from lorafleet.train.watch import StepReport, step_numbers


def test_a_step_can_be_scraped_until_the_run_ends() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = served_metrics(port)
    report = StepReport(step=7, epoch=1, loss=0.25, lr=1e-4, norm=2.0, samples=8, seconds=0.5, is_good=True)
    metrics.numbers(step_numbers(replace(report, step=6, norm=math.inf)), 6)
    metrics.numbers(step_numbers(report), report.step)
    metrics.numbers({"validation/loss": 0.5}, report.step)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        page = response.read().decode()
    with pytest.raises(ConfigError, match=rf"watch\.metrics_port {port} cannot be used"):
        served_metrics(port)
    metrics.close()
    for line in ("loss 0.25", "images_per_second 16.0", "step 7.0", "validation_loss 0.5", "skipped_steps_total 1.0"):
        assert f"lorafleet_train_{line}" in page.splitlines()
    assert set(step_numbers(report)) <= set(GAUGES)
    assert {*GAUGES.values(), TRAIN_STEP, TRAIN_SKIPPED_STEPS} == {
        metric for metric in ALL if metric.name.startswith("lorafleet_train_")
    }
