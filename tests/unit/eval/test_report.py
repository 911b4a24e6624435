"""From pictures to results and a report: numbers that can be worked by hand, files that come back equal."""

import json
import re
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.core.errors import ConfigError, DataNotFound, DataUnreadable, InvalidRequest, StorageUnavailable
from lorafleet.eval import scorers
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.metrics import tell_scores
from lorafleet.eval.report import write_report
from lorafleet.eval.results import Results, merged, read_results, score_run, sweeps
from lorafleet.eval.run import Picture, Run
from lorafleet.eval.scorers import Context, Measured, Samples
from lorafleet.eval.suites import Suite

PROMPTS = [("a", "object", True), ("b", "object", True), ("c", "held-out", False), ("d", "held-out", False)]
SUITE = Suite.model_validate(
    {
        "name": "few",
        "prompts": [{"id": i, "text": f"<{i}> & co", "category": c, "trained": t} for i, c, t in PROMPTS],
    }
)
REDNESS = {"base": [10, 20, 30, 40], "plush-0.5": [12, 24, 30, 41], "plush-1": [50, 60, 70, 80], "bad": [0, 0, 1, 1]}


class Redness:
    """A plug-in: how red a picture is."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def measure(self, samples: Samples) -> Measured:
        return Measured(per_image=[np.asarray(image)[..., 0].mean() for image in samples.images()], about={"v": 1})


class Point:
    def __init__(self, name: str, scorer: Any) -> None:
        self.name, self._scorer = name, scorer

    def load(self) -> Any:
        return self._scorer


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point("redness", Redness)]
    monkeypatch.setattr(scorers.metadata, "entry_points", lambda group: points if group == scorers.GROUP else [])


def config(*scores: str, **more: Any) -> EvalConfig:
    return EvalConfig.model_validate(
        {"base": {"device": "cpu"}, "scores": scores or ("redness",), "statistics": {"resamples": 500}, **more}
    )


def make_run(folder: Path, redness: Mapping[str, Sequence[int]] = REDNESS, seeds: int = 2) -> Run:
    """Two pictures a prompt, one a little redder than the other."""
    pictures: dict[str, tuple[Picture, ...]] = {}
    for name, values in redness.items():
        found = []
        for prompt, value in enumerate(values):
            for index in range(seeds):
                file = folder / f"{name}-{prompt}-{index}.png"
                Image.new("RGB", (16, 16), (value + index, 0, 0)).save(file)
                found.append(Picture(prompt, index, None, file, 0.5))
        pictures[name] = tuple(found)
    systems = tuple(
        {
            "name": name,
            "kind": "adapter" if "plush" in name else "base",
            "target": f"plush:{name.removeprefix('plush-')}" if "plush" in name else "",
            "fingerprint": "f" * 64,
            "sampling": {"steps": 20},
            "training": {"seconds": 305.0, "parameters": 1000, "share": 0.01} if "plush" in name else {},
            "weights": [float(name.removeprefix("plush-"))] if "plush" in name else [],
        }
        for name in redness
    )
    return Run(folder, SUITE, systems, pictures, {"seeds": seeds, "versions": {}, "device": "cpu", "prompts": {}})


def test_a_runs_numbers_come_back_from_its_files(tmp_path: Path) -> None:
    results = score_run(make_run(tmp_path), config())
    assert read_results(tmp_path).systems.keys() == results.systems.keys()
    assert read_results(tmp_path).against("base") == results.against("base")
    assert results.values("redness", "base").tolist() == [10.5, 20.5, 30.5, 40.5]
    assert results.values("redness", "base", "held-out").tolist() == [30.5, 40.5]
    comparison = results.against("base")["plush-0.5"]
    assert comparison.difference.mean == (2 + 4 + 0 + 1) / 4
    assert (comparison.wins, comparison.ties) == (3, 1)
    assert results.against("base")["plush-1"].p_holm == 3 * 2 / 16
    overfit = results.overfit("plush-0.5", "base")
    assert overfit is not None
    assert overfit.mean == pytest.approx(3 - 0.5)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == "suite,system,prompt,category,text,redness"
    assert lines[1] == "few,base,a,object,<a> & co,10.5"
    assert len(lines) == 1 + 4 * 4
    document = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert document["comparisons"]["redness"]["bad"]["is_evidence"] is True
    assert sweeps(results) == {"plush": [(0.5, "plush-0.5"), (1.0, "plush-1")]}


def test_a_report_stands_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    results = score_run(run, config())
    text = write_report(run, results, "base").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://(?!arxiv)|<script|<link|@import|url\(""", text)
    assert "&lt;a&gt; &amp; co" in text
    assert "<a> & co" not in text
    assert "+50.00" not in text
    assert "+40.00" in text  # plush-1
    assert "1,000 (1.00%)" in text
    assert "5 min" in text
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"forest.png", "categories.png", "sweep-plush.png"}
    for file in (tmp_path / "plots").iterdir():
        with Image.open(file) as plot:
            assert min(plot.size) > 100


def test_one_system_and_one_prompt_are_reported_without_claims(tmp_path: Path) -> None:
    suite = SUITE.model_copy(update={"prompts": SUITE.prompts[:1]})
    run = make_run(tmp_path, {"base": [10], "bad": [0]})
    run = Run(run.folder, suite, run.systems, run.pictures, run.about)
    results = score_run(run, config())
    assert not results.against("base")["bad"].is_evidence
    assert "inf" not in re.sub(r"data:[^\"]+", "", write_report(run, results, "base").read_text())


def test_scores_of_pictures_prompts_and_sets_stand_side_by_side(tmp_path: Path) -> None:
    """Of one colour each, so that they are alike for the scorer."""
    reference = tmp_path / "reference"
    reference.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (50 + number, 0, 0)).save(reference / f"{number}.png")
    scores = ("redness", "clip", "r1", "diversity", "similarity", "cmmd")
    (tmp_path / "run").mkdir()
    results = score_run(make_run(tmp_path / "run"), config(*scores, reference=str(reference)))
    found = results.systems["base"].scores
    assert set(found) == set(scores)
    assert found["cmmd"].per_prompt is None
    assert not found["cmmd"].higher_is_better
    assert found["clip"].about["formula"].startswith("100 cos")
    assert found["clip"].about["truncation_rate"] == 0
    assert found["clip"].about["weights_sha256"] == results.about["scorer"]["weights_sha256"]
    assert results.systems["base"].warnings == ("8 of 8 pictures (16x16) are enlarged to 128 px",)
    assert 0 <= found["diversity"].mean < 10
    with pytest.raises(InvalidRequest, match="has no cmmd for each prompt"):
        results.values("cmmd", "base")


def test_scores_reach_prometheus_by_file_and_by_push(tmp_path: Path) -> None:
    pushed: list[tuple[str, str, str]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            pushed.append((self.command, self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        Thread(target=server.handle_request).start()
        gateway = f"http://127.0.0.1:{server.server_port}"
        settings = config("clip", metrics_file=str(tmp_path / "eval.prom"), metrics_gateway=gateway)
        results = score_run(make_run(tmp_path, seeds=1), settings)
        tell_scores(results, settings)
    text = (tmp_path / "eval.prom").read_text()
    assert pushed == [("PUT", "/metrics/job/lorafleet_eval/suite/few", text)]
    (family,) = text_string_to_metric_families(text)
    values = {(each.labels["suite"], each.labels["adapter"]): each.value for each in family.samples}
    assert family.name == "lorafleet_eval_clip_score"
    assert values[("few", "plush-1")] == pytest.approx(results.systems["plush-1"].scores["clip"].mean)
    with pytest.raises(StorageUnavailable, match="Pushgateway .* does not take the scores"):
        tell_scores(results, settings)


def test_runs_of_the_same_prompts_compare_and_no_others(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    results: dict[str, Results] = {}
    for folder, redness in zip(folders, ({"base": [1, 2, 3, 4]}, {"base": [2, 3, 4, 5]}), strict=True):
        folder.mkdir()
        results[folder.name] = score_run(make_run(folder, redness), config())
    both = merged(results)
    assert both.names == ["base", "second:base"]
    assert both.versus("second:base", "base").difference.mean == 1.0
    from dataclasses import replace

    with pytest.raises(InvalidRequest, match="first and other are of other prompts"):
        merged({"first": results["first"], "other": replace(results["second"], suite_digest="0")})
    changed = {**results["second"].about, "scorer": {**results["second"].about["scorer"], "model": "b"}}
    with pytest.raises(InvalidRequest, match="different scorers"):
        merged({"first": results["first"], "other": replace(results["second"], about=changed)})


def test_bad_files_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match=r"results.json is not there"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 9}')
    with pytest.raises(DataUnreadable, match="its format is 9"):
        read_results(tmp_path)
    with pytest.raises(ConfigError, match="there is no score beauty: known are clip, .*redness"):
        score_run(make_run(tmp_path), config("beauty"))
    with pytest.raises(ConfigError, match="the score fid needs fid_weights"):
        score_run(make_run(tmp_path), config("fid"))
    run = make_run(tmp_path)
    run.pictures["base"][3].file.write_bytes(b"no picture")
    with pytest.raises(DataUnreadable, match=re.escape(str(run.pictures["base"][3].file))):
        score_run(run, config())
