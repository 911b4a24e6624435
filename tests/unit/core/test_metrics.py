"""The declarations, and that the code sends exactly what is declared."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.core import metrics
from lorafleet.core.metrics import ALL, REPLICA_LABEL, FirstComers, Metric

CALLS = {"add": "counter", "set": "gauge", "observe": "histogram"}
SOURCES = ("platform", "ui", "models")
UNITS = r"(seconds|bytes|ratio|images)"


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_a_declaration_is_as_prometheus_wants_it(metric: Metric) -> None:
    assert re.fullmatch(r"lorafleet_(gateway|router|replica|engine|train|eval)(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    if metric.kind == "histogram":
        assert re.search(rf"_{UNITS}$", metric.name)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert all(bound > 0 for bound in metric.buckets)  # Ray takes no others
    assert metric.description.endswith(".")
    # Ray and Prometheus have these for themselves
    reserved = {REPLICA_LABEL, "le", "quantile", "job", "instance", "pod", "namespace", "WorkerId", "Component"}
    assert not reserved & set(metric.labels)
    assert all(re.fullmatch(r"[a-z]+", label) for label in metric.labels)


def test_names_are_unique() -> None:
    assert len({metric.name for metric in ALL}) == len(ALL) > 30


def recorded(file: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    """The metric, the method and the labels of each call of a recorder."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS):
            continue
        if (
            node.args
            and isinstance(node.args[0], ast.Name)
            and isinstance(getattr(metrics, node.args[0].id, 0), Metric)
        ):
            assert all(keyword.arg for keyword in node.keywords), f"{file}:{node.lineno}: labels must be spelled out"
            yield node.args[0].id, node.func.attr, frozenset(keyword.arg or "" for keyword in node.keywords)


def test_what_is_sent_is_declared_and_the_other_way_round(repo: Path) -> None:
    files = [file for source in SOURCES for file in (repo / source).rglob("*.py")]
    sent = {call for file in files for call in recorded(file)}
    for name, method, labels in sent:
        metric = getattr(metrics, name)
        assert (CALLS[method], labels) == (metric.kind, frozenset(metric.labels)), name
    of_jobs = ("lorafleet_train_", "lorafleet_eval_")  # these have no Recorder
    of_serving = {metric.name for metric in ALL if not metric.name.startswith(of_jobs)}
    assert {getattr(metrics, name).name for name, _, _ in sent} == of_serving


def test_nothing_is_sent_past_the_recorder(repo: Path) -> None:
    senders = {
        repo / f"platform/{part}.py" for part in ("serve/metrics", "train/metrics", "eval/metrics", "eval/ray_crew")
    }
    files = [file for file in (repo / "platform").rglob("*.py") if file not in senders]
    makers = r"ray\.util\.metrics|ray\.util import metrics|ray\.serve\.metrics|prometheus_client(?!\.parser)"
    assert [file for file in files if re.search(makers, file.read_text())] == []


def test_only_the_first_comers_are_told_apart() -> None:
    first = FirstComers[str](2)
    assert [first.knows(name) for name in ("a", "b", "c", "a", "c", "b")] == [True, True, False, True, False, True]
