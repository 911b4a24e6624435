"""Whole evaluations on emojixl: killed and gone on, on Ray, against a running service, and of a damaged adapter."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lorafleet.cli.main import app, main
from lorafleet.core.errors import DataUnreadable, EvaluationFailed, LorafleetError, NotReady
from lorafleet.eval import run as runs
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.draw import Studio
from lorafleet.eval.images import ImageStore
from lorafleet.eval.plan import Batch, Job, Sampling, make_plan
from lorafleet.eval.results import Results, score_run
from lorafleet.eval.run import open_run, run_suite
from lorafleet.eval.suites import load_suite
from lorafleet.eval.systems import SystemSpec, resolve_systems
from lorafleet.models import EMOJIXL
from lorafleet.sdxl.adapter_file import base_targets
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora import Adapter, LowRank
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_write import write_adapter

LORAFLEET = Path(sys.executable).with_name("lorafleet")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def sample(repo: Path) -> Path:
    """An adapter's file that travels with the repository."""
    return sorted((repo / "models" / "registry" / "adapters").glob("*/*/adapter.safetensors"))[0]


@pytest.fixture(scope="module")
def damaged(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, each tensor with six times as much noise as it has spread."""
    adapter = read_adapter(sample, base_targets(BaseConfig()))
    generator = torch.Generator().manual_seed(0)

    def noisy(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor + 6 * torch.randn(tensor.shape, generator=generator) * tensor.float().std()).to(tensor.dtype)

    modules = {name: LowRank(noisy(each.a), noisy(each.b), each.alpha) for name, each in adapter.modules.items()}
    path = tmp_path_factory.mktemp("damaged") / "damaged.safetensors"
    write_adapter(Adapter(modules, "damaged", base_fingerprint=adapter.base_fingerprint), path)
    return path


def config(**settings: Any) -> EvalConfig:
    sampling = {"steps": 2, "limit": 8, **settings.pop("sampling", {})}
    run = {"workers": 1, "batch_size": 2, **settings.pop("run", {})}
    given = {"base": {"device": "cpu"}, "sampling": sampling, "run": run, "scores": ["clip", "r1"], **settings}
    return EvalConfig.model_validate(given)


def evaluated(settings: EvalConfig, *systems: str) -> Results:
    specs = [SystemSpec.parse(text) for text in systems]
    return score_run(run_suite(load_suite("emoji"), specs, settings), settings)


def pictures(home: Path) -> dict[Path, tuple[int, int]]:
    """Every finished picture with its inode and time: another one in its place would have others."""
    found = {}
    for file in (home / "eval" / "images").glob("*/*.png"):
        stat = file.stat()
        found[file.relative_to(home)] = (stat.st_ino, stat.st_mtime_ns)
    return found


def test_killed_half_way_it_goes_on_to_the_same_numbers_and_makes_nothing_twice(
    home: Path, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(sampling={"steps": 1})
    systems = ["base", f"styled=adapter:{sample}:0.5"]
    command = [str(LORAFLEET), "eval", "run", *itertools.chain(*(("--system", each) for each in systems))]
    for setting in ("base.device=cpu", "sampling.steps=1", "sampling.limit=8", "run.batch_size=2"):
        command += ["--set", setting]
    process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(pictures(home)) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = pictures(home)
    assert 5 <= len(before) < 16

    drawn = _counted(monkeypatch)
    gone_on = evaluated(settings, *systems)
    after = pictures(home)
    assert len(after) == 16
    assert {file: after[file] for file in before} == before
    assert sorted(drawn) == sorted(file.stem for file in after.keys() - before.keys())

    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path / "fresh"))
    at_once = evaluated(settings, *systems)
    assert {name: each.scores for name, each in gone_on.systems.items()} == {
        name: each.scores for name, each in at_once.systems.items()
    }
    assert gone_on.against("base") == at_once.against("base")


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of all pictures that are drawn from now on."""
    drawn: list[str] = []
    put = ImageStore.put

    def counting(self: ImageStore, key: str, *more: Any) -> None:
        drawn.append(key)
        put(self, key, *more)

    monkeypatch.setattr(ImageStore, "put", counting)
    return drawn


def test_a_pictures_bits_depend_on_the_rows_of_its_batch_but_not_on_place_and_neighbours(home: Path) -> None:
    """What lets a run that goes on fill its batches with whatever is missing."""
    settings = config(run={"batch_size": 4})
    (base,) = resolve_systems([SystemSpec.parse("base")], settings)
    jobs = make_plan(load_suite("emoji"), [base], settings, device="cpu").jobs["base"]
    studio = Studio(settings)

    def drawn(*wanted: Job) -> list[bytes]:
        batch = Batch(base, Sampling(3, 5.0, "euler", None, None), wanted, 4)
        return [each.image.tobytes() for each in studio.draw(batch)]

    first = drawn(*jobs[:4])
    assert drawn(*reversed(jobs[:4])) == first[::-1]
    assert drawn(jobs[2]) == [first[2]]
    assert drawn(jobs[7], jobs[2], jobs[5])[1] == first[2]
    assert len(set(first)) == 4


def test_another_pipeline_gets_the_same_prompts_and_noise(home: Path) -> None:
    """emojixl again, as a stranger's folder: with its own scheduler, which is the suite's."""
    results = evaluated(config(sampling={"limit": 2, "steps": 3}), "base", f"again=pipeline:{EMOJIXL}")
    assert results.values("clip", "again") == pytest.approx(results.values("clip", "base"), abs=0.05)


@pytest.mark.nightly
def test_a_damaged_adapter_is_found_out(home: Path, sample: Path, damaged: Path) -> None:
    settings = config(sampling={"steps": 6, "limit": 8}, run={"batch_size": 8})
    results = evaluated(settings, "base", f"good=adapter:{sample}", f"bad=adapter:{damaged}")
    means = {name: each.scores["clip"].mean for name, each in results.systems.items()}
    assert means["base"] > 60
    assert means["bad"] < means["good"] - 5
    assert results.against("base")["bad"].difference.high < 0
    assert results.versus("bad", "good").difference.high < 0


def test_a_running_lorafleet_draws_what_the_base_draws(home: Path, service_url: str) -> None:
    """The engine against diffusers: the same prompts, seeds and initial noise through HTTP."""
    settings = config(sampling={"limit": 3, "steps": 3}, run={"endpoint_threads": 1, "batch_size": 1})
    results = evaluated(settings, "base", f"api={service_url}")
    for score in ("clip", "r1"):
        ours, theirs = (results.values(score, name) for name in ("base", "api"))
        assert theirs == pytest.approx(ours, abs=0.5)
    assert results.systems["api"].latency_s is not None


def test_what_an_endpoint_answered_before_it_failed_is_kept(
    home: Path, service_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafleet.eval.endpoint import Endpoint

    settings = config(sampling={"limit": 4, "steps": 1}, run={"endpoint_threads": 1, "endpoint_retries": 0})
    ask, asked = Endpoint.draw, []

    def failing(self: Endpoint, job: Job, sampling: Sampling) -> Any:
        asked.append(job)
        if len(asked) == 3:
            raise NotReady(f"system api, prompt {job.text!r}: cannot be reached")
        return ask(self, job, sampling)

    monkeypatch.setattr(Endpoint, "draw", failing)
    with pytest.raises(NotReady, match="system api, prompt"):
        evaluated(settings, f"api={service_url}")
    assert len(pictures(home)) in (2, 3)  # the fourth may have been asked for already
    assert evaluated(settings, f"api={service_url}").systems["api"].pictures == 4
    assert len(asked) == 3 + 2


def test_an_endpoint_that_is_not_there_is_named(home: Path, free_port: Any) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(NotReady, match=rf"system api, prompt .*{address} cannot be reached"):
        evaluated(config(run={"endpoint_retries": 0}), f"api={address}")


@pytest.mark.nightly
def test_a_ray_actor_that_dies_costs_only_its_batch(
    home: Path, service_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the Ray that the service of this session runs on."""
    import ray

    from lorafleet.eval.ray_crew import Actors

    crews: list[Actors] = []
    start = Actors.__init__

    def watched(self: Actors, *given: Any, **more: Any) -> None:
        start(self, *given, **more)
        crews.append(self)

    monkeypatch.setattr(Actors, "__init__", watched)
    drawn = _counted(monkeypatch)
    killed: list[int] = []

    def kill_once(system: str, done: int, total: int) -> None:
        if done == 2 and not killed:
            killed.append(done)
            ray.kill(crews[0]._actors[0])

    settings = config(sampling={"limit": 6, "steps": 1}, run={"ray": True})
    finished = run_suite(load_suite("emoji"), [SystemSpec.parse("base")], settings, on_progress=kill_once)
    assert killed == [2]
    assert len(drawn) == len(set(drawn)) == 6
    assert len(finished.pictures["base"]) == 6


def test_missing_pictures_and_unfit_adapters_are_refused_by_name(home: Path, tmp_path: Path) -> None:
    settings = config(sampling={"limit": 2, "steps": 1})
    finished = run_suite(load_suite("emoji"), [SystemSpec.parse("base")], settings)
    finished.pictures["base"][1].file.unlink()
    with pytest.raises(EvaluationFailed, match="1 of 2 pictures of base are gone"):
        open_run(finished.folder)
    again = run_suite(load_suite("emoji"), [SystemSpec.parse("base")], settings)
    assert again.folder == finished.folder
    (finished.folder / runs.RUN_FILE).write_text("{}")
    with pytest.raises(DataUnreadable, match="is no evaluation's"):
        open_run(finished.folder)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\0" * 100)
    with pytest.raises(LorafleetError, match=r"bad\.safetensors"):
        run_suite(load_suite("emoji"), [SystemSpec.parse(f"adapter:{bad}")], settings)


def test_the_commands_do_what_they_say(home: Path, sample: Path, tmp_path: Path) -> None:
    """run with a sweep, score by another definition, compare, report; JSON on stdout."""
    out = tmp_path / "run"
    few = ["--set", "sampling.limit=4", "--set", "sampling.steps=1", "--workers", "1", "--set", "run.batch_size=4"]
    systems = ["--system", "base", "--system", f"a=adapter:{sample}"]
    found = _json("run", *systems, "--sweep", "0,0.5", *few, "--out", str(out))
    assert list(found["systems"]) == ["base", "a-0", "a-0.5"]
    assert found["comparisons"]["a-0"]["difference"]["mean"] == pytest.approx(0, abs=1e-6)  # weight 0 is no adapter
    assert (out / "plots").is_dir()
    again = _json("score", str(out), "--set", "scorer.definition=hessel", "--baseline", "a-0.5")
    assert again["systems"]["base"]["clip"] == pytest.approx(found["systems"]["base"]["clip"] / 40, rel=1e-4)
    compared = _json("compare", str(out), "--baseline", "base", "--score", "r1")
    assert compared["score"] == "r1"
    place = _command("report", str(out), "--baseline", "a-0").strip()
    assert "every system is compared with <b>a-0</b>" in Path(place).read_text()


def _json(*arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_command(*arguments, "--json"))
    return document


def _command(*arguments: str) -> str:
    """What it prints to stdout."""
    done = CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run"], 2, "give at least one --system"),
        (["run", "--system", "dalle"], 2, "no kind of system"),
        (["run", "--system", "base", "--baseline", "x"], 2, "--baseline x is none of the systems: base"),
        (["run", "--system", "base", "--sweep", "1"], 2, "--sweep needs a system that is an adapter"),
        (["score", "/nowhere"], 1, "holds no evaluation"),
    ],
)
def test_bad_usage_is_said_in_a_sentence(
    arguments: Sequence[str], code: int, says: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafleet", "eval", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code
    assert says in capsys.readouterr().err


@pytest.mark.nightly
def test_the_whole_emoji_suite_on_two_workers_within_ten_minutes(home: Path, sample: Path, damaged: Path) -> None:
    settings = config(sampling={"steps": None, "limit": None}, run={"workers": 2, "batch_size": 8})
    start = time.monotonic()
    results = evaluated(settings, "base", f"good=adapter:{sample}:0.5", f"bad=adapter:{damaged}:0.5")
    seconds = time.monotonic() - start
    against = results.against("base")
    assert against["bad"].difference.high < 0
    assert against["bad"].p_holm < 0.001
    assert against["bad"].difference.mean < against["good"].difference.mean
    assert seconds < 600 * max(1, 2 / len(os.sched_getaffinity(0)))
