"""A run's pictures become pairs, and their votes ratings, by the command line."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lorafleet.cli.main import app
from lorafleet.core.arena.config import ArenaConfig
from lorafleet.core.arena.store import open_store
from lorafleet.core.errors import DataNotFound
from lorafleet.eval.arena import entrants_of, spelled
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.run import Run, run_suite
from lorafleet.eval.suites import Prompt, Suite
from lorafleet.eval.systems import SystemSpec

PROMPTS = ("a cat", "a dog")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two folders of ready pictures as systems."""
    for system, colour in (("ours", "red"), ("theirs", "blue")):
        folder = tmp_path / system
        folder.mkdir()
        for prompt in PROMPTS:
            Image.new("RGB", (64, 64), colour).save(folder / f"{prompt}.png")
            (folder / f"{prompt}.txt").write_text(prompt)
    suite = Suite(name="pets", prompts=tuple(Prompt(id=text[2:], text=text) for text in PROMPTS))
    specs = [SystemSpec(name, "folder", str(tmp_path / name)) for name in ("ours", "theirs")]
    return run_suite(suite, specs, EvalConfig(), folder=tmp_path / "run")


def test_a_run_is_voted_on_by_the_command_line(run: Run, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/arena.sqlite"

    def call(*arguments: str) -> str:
        found = CliRunner().invoke(app, ["eval", "arena", *arguments, "--store", store], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.stdout

    assert json.loads(call("import", str(run.folder), "--json")) == {"pool": "pets", "pictures": 4, "pairs": 2}
    assert call("import", str(run.folder)) == "0 new pictures, 0 new pairs in the pool pets\n"
    assert json.loads(call("ratings", "--json"))["votes"] == 0
    opened = open_store(ArenaConfig(url=store))
    shown = opened.draw()
    opened.vote(shown.session, shown.pair, "left")
    opened.close()
    header, *lines = call("ratings").splitlines()
    assert header.split() == ["SYSTEM", "RATING", "95", "%", "VOTES", "WON", "LOST", "TIED", "CLIP"]
    assert sorted(line.split()[0] for line in lines) == ["ours", "theirs"]
    call("export", "-o", str(tmp_path / "votes.csv"))
    (row,) = csv.DictReader(io.StringIO((tmp_path / "votes.csv").read_text()))
    assert {row["left"], row["right"]} == {"ours", "theirs"}
    assert row["winner"] == row["left"]
    with pytest.raises(DataNotFound, match="holds no evaluation"):
        call("import", str(tmp_path))


def test_ready_pictures_meet_those_of_their_prompt_and_number(run: Run) -> None:
    entrants = list(entrants_of(run))
    assert {(each.system, each.prompt, each.seed) for each in entrants} == {
        (system, prompt, 0) for system in ("ours", "theirs") for prompt in PROMPTS
    }


def test_adapters_of_the_registry_are_called_by_their_version() -> None:
    def system(target: str, *adapters: tuple[str, float]) -> dict[str, object]:
        return {"name": "mine", "kind": "adapter", "target": target, "identity": {"adapters": adapters}}

    assert spelled(system("plush@latest:0.5+ink", ("a" * 64, 0.5), ("b" * 64, 1.0))) == (
        f"plush@{'a' * 12}:0.5+ink@{'b' * 12}"
    )
    assert spelled(system("style.safetensors:0.5", ("a" * 64, 0.5))) == "mine"
    assert spelled({"name": "base", "kind": "base"}) == "base"
