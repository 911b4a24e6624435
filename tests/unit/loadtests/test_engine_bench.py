"""The bench on a model of a millisecond a step: its figures must fit each other, whatever they are."""

import json
from pathlib import Path

import engine_bench
import joins
import pytest
import report
import torch
from random_sdxl import random_base
from report import Report, Row, default_path
from workload import BANK, Variant, Workload

from lorafleet.core.errors import ConfigError
from lorafleet.sdxl.config import BaseConfig

pytestmark = pytest.mark.nightly  # a minute, most of it the bench itself

TINY = ["--base", "tiny-random", "--device", "cpu", "--steps", "2"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "result.json"
    status = engine_bench.main(
        [
            *TINY,
            "--concurrency",
            "1,3",
            "--images",
            "4",
            "--variant",
            "batched: exact=false bank.slots=3",
            "--json",
            str(path),
        ]
    )
    assert status == 0, path.read_text()
    return path


@pytest.fixture(scope="module")
def rows(kept: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(kept.read_text())["rows"]]


def test_every_part_has_its_rows(rows: list[Row]):
    assert [row.what for row in rows if row.part == "baseline"] == [
        "diffusers eager, one by one",
        "diffusers eager, 3 a batch",
    ]
    throughput = [row for row in rows if row.part == "engine" and row.img_s]
    assert [row.at_once for row in throughput] == [1, 3] * 3  # without an adapter, with one, with eight
    assert len([row for row in rows if row.part == "bank"]) == 6
    assert [row.samples for row in rows if row.part == "swap"] == [4, 3, 4, 4, 4]  # three slots


def test_the_figures_of_a_load_fit_each_other(rows: list[Row]):
    for row in [row for row in rows if row.img_s]:
        assert row.samples is not None
        assert row.samples >= 3
        assert row.samples % (row.at_once or 0) == 0  # whole rounds
        assert row.img_s * (row.seconds or 0) == pytest.approx(row.samples)
        assert 0 < (row.median_ms or 0) <= (row.p95_ms or 0)
        # Little's law: the images in flight are the rate times the latency
        in_flight = (row.img_s or 0) * (row.median_ms or 0) / 1e3
        assert (row.at_once or 0) / 3 < in_flight < (row.at_once or 0) * 3  # wide: the machine may be busy


def test_a_step_is_shorter_than_an_image(rows: list[Row]):
    step = next(row for row in rows if row.part == "bank" and row.at_once == 1)
    image = next(row for row in rows if row.part == "engine" and row.at_once == 1)
    assert (step.median_ms or 0) < (image.median_ms or 0)


def test_the_table_says_what_was_measured_and_where(kept: Path):
    table = kept.with_suffix(".md").read_text()
    about = json.loads(kept.read_text())
    assert about["machine"] in table
    assert f"torch {about['versions']['torch']}" in table
    assert "--base tiny-random" in about["command"]
    assert str(kept.parent) not in table + kept.read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(about["rows"])
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_the_table_says_how_quiet_the_machine_was(monkeypatch: pytest.MonkeyPatch):
    busy_s = iter([100.0, 103.0])
    monkeypatch.setattr(report, "_busy_elsewhere_s", lambda: next(busy_s))
    made = Report({"machine": "two cores"})
    made._start -= 2.0
    assert made.all_about() == {"machine": "two cores", "other programs": "used 1.5 cores meanwhile"}


def test_nothing_is_written_unasked(capsys: pytest.CaptureFixture[str], repo: Path):
    before = sorted((repo / "loadtests").rglob("*.json"))
    assert engine_bench.main([*TINY, "--parts", "baseline", "--concurrency", "1", "--images", "1"]) == 0
    assert sorted((repo / "loadtests").rglob("*.json")) == before
    assert "| baseline | diffusers eager, one by one |" in capsys.readouterr().out


def test_without_time_rows_are_left_out_and_said_so(capsys: pytest.CaptureFixture[str]):
    assert engine_bench.main([*TINY, "--parts", "baseline,engine", "--budget-s", "0"]) == 0
    out = capsys.readouterr().out
    assert "img/s" not in out.split("# Engine bench")[0]
    assert "skipped: " in out


def test_a_row_that_fails_leaves_the_others():
    made = Report({})
    made.attempt("engine", "one", 0, lambda: 1 / 0)
    made.attempt("engine", "other", 0, lambda: Row("engine", "other"))
    assert [row.note for row in made.rows] == ["failed: ZeroDivisionError: division by zero", ""]
    assert made.failures == 1


def test_a_variant_is_engine_and_base_settings():
    variant = Variant.parse("big: max_batch=4 bank.slots=12 base.attention=sliced")
    assert variant.name == "big"
    settings = variant.engine_settings()
    assert (settings.max_batch, settings.bank.slots, settings.bank.max_rank) == (4, 12, 16)
    assert variant.engine_settings("bank=null").bank is None
    assert variant.base_config("emojixl", "cpu").attention == "sliced"
    assert len(BANK) == 4


def test_a_setting_that_is_none_is_said_before_anything_runs(capsys: pytest.CaptureFixture[str]):
    assert engine_bench.main([*TINY, "--set", "max_bach=3"]) == 2
    assert "max_batch" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        Variant.parse("x: bank.slots=none").engine_settings()


def test_what_the_batch_loses_is_what_steps_alone_and_together_do_not_explain():
    alone, together = 0.010, 0.012
    steps = [i * alone for i in range(8)]  # until 0.070; then a step alone, 5 ms of loading, a step together
    steps += [0.080, 0.080 + 0.005 + together, 0.109]
    mine = [0.097, 0.109, 0.121]
    assert joins._lost_s(steps, 0.072, mine) == pytest.approx(0.005)


def test_the_file_is_named_by_day_and_machine():
    about = {"date": "2026-11-23", "machine": "NVIDIA H200, 150 GB (Some(R) CPU @ 2.0GHz, 16 cores)"}
    assert default_path(about).name == "2026-11-23-nvidia-h200-150-gb.json"
    about["machine"] = "Intel(R) Xeon(R) Processor, 2 cores, torch with 1 threads"
    assert default_path(about).name == "2026-11-23-intel-xeon-processor-2-cores.json"


def test_parts_and_kinds_are_checked(capsys: pytest.CaptureFixture[str]):
    for arguments in (["--parts", "engines"], ["--adapters", "all"], ["--concurrency", "0"]):
        with pytest.raises(SystemExit):
            engine_bench.main([*TINY, *arguments])
    assert "is not one of" in capsys.readouterr().err


def test_every_image_has_a_prompt_of_its_own():
    base = random_base(BaseConfig(id="tiny-random", device="cpu"))
    load = Workload(Report({}), "tiny-random", torch.device("cpu"), 20, 4, (1,), ("none",))
    jobs = [load.jobs(base, "none", steps) for steps in (2, 2)]
    assert len({make(i).request.prompt for make in jobs for i in range(50)}) == 100
