"""Prometheus's rules and Grafana's dashboards as files."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dashboards
import pytest
import yaml

from lorafleet.core.metrics import ALL, BUCKETS, Metric

FILES = Path("deploy/helm/lorafleet/files")
CASES = Path("tests/deploy/rules")
RULE_FILES = ("evaluation", "kuberay", "serving", "slo", "training")
UNSHOWN = {"lorafleet_gateway_adapter_seconds"}
"""Metrics of ours that no dashboard shows and no rule reads, on purpose: a canary is watched by `eval promote`."""


def rules(repo: Path) -> list[dict[str, Any]]:
    files = [yaml.safe_load((repo / FILES / f"rules/{name}.yaml").read_text()) for name in RULE_FILES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def alerts(repo: Path) -> list[dict[str, Any]]:
    return [rule for rule in rules(repo) if "alert" in rule]


def panels(repo: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted((repo / FILES / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            if panel["type"] != "row":
                yield file.stem, panel


def expressions(repo: Path) -> list[str]:
    shown = [target["expr"] for _, panel in panels(repo) for target in panel["targets"]]
    return [*(rule["expr"] for rule in rules(repo)), *shown]


def anchors(repo: Path) -> set[str]:
    """Those that GitHub gives the runbook's headings."""
    headings = re.findall(r"^#+ (.+)$", (repo / "deploy/RUNBOOK.md").read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def arriving(metric: Metric) -> set[str]:
    """The names under which Prometheus gets it."""
    ends = ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",)
    return {f"{metric.name}{end}" for end in ends}


def test_every_rule_file_is_there(repo: Path) -> None:
    assert {file.stem for file in (repo / FILES / "rules").iterdir()} == set(RULE_FILES)


def test_promtool_takes_the_rules(repo: Path, require: Callable[[str], str]) -> None:
    files = sorted((repo / FILES / "rules").glob("*.yaml"))
    done = subprocess.run([require("promtool"), "check", "rules", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("name", [*RULE_FILES, "slo-slow"])
def test_alerts_fire_and_do_not(name: str, repo: Path, require: Callable[[str], str]) -> None:
    command = [require("promtool"), "test", "rules", f"{name}.test.yaml"]
    done = subprocess.run(command, cwd=repo / CASES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_not(repo: Path) -> None:
    cases: dict[bool, set[str]] = {True: set(), False: set()}
    for file in (repo / CASES).glob("*.test.yaml"):
        for group in yaml.safe_load(file.read_text())["tests"]:
            assert group["input_series"]
            (test,) = group["promql_expr_test"]
            cases[bool(test["exp_samples"])].add(re.search(r'alertname="(\w+)"', test["expr"])[1])  # type: ignore[index]
    names = [alert["alert"] for alert in alerts(repo)]
    assert len(names) == len(set(names)) >= 20
    assert cases[True] == cases[False] == set(names)


def test_every_alert_says_what_how_bad_and_what_to_do(repo: Path) -> None:
    for alert in alerts(repo):
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        file, anchor = alert["annotations"]["runbook_url"].split("#")
        assert file == "deploy/RUNBOOK.md"
        assert anchor in anchors(repo), alert["alert"]


def test_the_runbook_names_every_alert_and_no_other(repo: Path) -> None:
    named = set(re.findall(r"`(Lorafleet\w+)`", (repo / "deploy/RUNBOOK.md").read_text()))
    assert named == {alert["alert"] for alert in alerts(repo)}


def test_the_runbook_names_settings_and_errors_that_exist(repo: Path) -> None:
    from lorafleet.core import errors
    from lorafleet.serve.config import ServeSettings
    from lorafleet.train.config import TrainConfig

    text = (repo / "deploy/RUNBOOK.md").read_text()
    dotted = set(re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)[=`:]", text)) - {"helm.sh"}
    assert len(dotted) > 10
    for name in dotted:
        models: list[Any] = [TrainConfig if name.startswith(("loop", "optimizer")) else ServeSettings]
        for part in name.split("."):
            (field,) = {model.model_fields[part].annotation for model in models if part in model.model_fields}
            models = [kind for kind in (field, *getattr(field, "__args__", ())) if hasattr(kind, "model_fields")]
    codes = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    named = {code for row in re.findall(r"^\| (`.+?) \|", text, re.MULTILINE) for code in re.findall(r"`(\w+)`", row)}
    assert named - codes == {"internal_error"}  # what no error of ours stands for


def test_errors_are_neither_what_clients_get_wrong_nor_who_leaves(repo: Path) -> None:
    selectors = {
        status
        for rule in rules(repo)
        if rule.get("record", "").startswith(("lorafleet:requests:", "lorafleet:request_errors:"))
        for status in re.findall(r'status(\S+?"[^"]+")', rule["expr"])
    }
    assert selectors == {'!~"4.."', '=~"5.."'}


def test_the_latency_bound_is_a_bucket(repo: Path) -> None:
    (bound,) = {bound for rule in rules(repo) for bound in re.findall(r'le="([^"]+)"', rule["expr"])}
    assert float(bound) in BUCKETS
    assert yaml.safe_load((repo / FILES / "latency-bounds.yaml").read_text()) == [f"{bound:g}" for bound in BUCKETS]


def test_the_routes_that_count_exist(repo: Path) -> None:
    from lorafleet.serve.api import create_app
    from lorafleet.serve.config import ServeSettings

    app: Any = create_app(ServeSettings(), backend=None)  # type: ignore[arg-type]
    known = [route.path for route in app.routes] + ["unmatched"]
    patterns = {pattern for text in expressions(repo) for pattern in re.findall(r'route\S?~"([^"]+)"', text)}
    assert len(patterns) == 2
    for part in {part for pattern in patterns for part in pattern.split("|")}:
        assert any(re.fullmatch(part, path) for path in known), part
    images = next(pattern for pattern in patterns if "generate" in pattern)
    made = {path for path in known if re.fullmatch(images, path)}
    assert made == {"/generate", "/v1/images/generations", "/v1/images/edits", "/models/{name:path}"}


def test_every_metric_that_is_asked_for_is_declared_and_the_other_way_round(repo: Path) -> None:
    declared = {name: metric for metric in ALL for name in arriving(metric)}
    text = " ".join(expressions(repo))
    asked = set(re.findall(r"\b(?:ray_|\(ray_\)\?)?(lorafleet_\w+)", text))
    assert asked <= declared.keys()
    assert {metric.name for metric in ALL} - {declared[name].name for name in asked} == UNSHOWN


def test_a_recorded_series_that_is_asked_for_is_recorded(repo: Path) -> None:
    recorded = {rule["record"] for rule in rules(repo) if "record" in rule}
    asked = {name for text in expressions(repo) for name in re.findall(r"lorafleet:[\w:]+", text)}
    assert asked <= recorded


def test_dashboards_are_what_the_script_writes(repo: Path) -> None:
    written = {file.name: file.read_text() for file in (repo / FILES / "dashboards").iterdir()}
    made = {f"{spec.uid.removeprefix('lorafleet-')}.json": dashboards.build(spec) for spec in dashboards.ALL}
    assert written == made, "run make dashboards"
    assert sum(len(text) for text in written.values()) < 300_000  # a release's Secret holds 1 MiB, rendered twice


def test_every_panel_has_units_a_description_and_the_chosen_source(repo: Path) -> None:
    titles = [(board, panel["gridPos"]["y"], panel["title"]) for board, panel in panels(repo)]
    assert len(titles) == len(set(titles)) > 40
    for board, panel in panels(repo):
        where = f"{board}: {panel['title']}"
        assert panel["description"].endswith("."), where
        assert panel["fieldConfig"]["defaults"]["unit"], where
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, where
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for link in panel.get("links") or []:
            assert link["url"].split("#")[1] in anchors(repo), where


def test_no_two_panels_lie_on_each_other(repo: Path) -> None:
    taken: dict[tuple[str, int, int], str] = {}
    for board, panel in panels(repo):
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert taken.setdefault((board, x, y), panel["title"]) == panel["title"]
