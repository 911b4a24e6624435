"""`generate --local` and `doctor` with the embedded base, inside this process: real pictures, no service."""

import json
import socket
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lorafleet.cli.main import app
from lorafleet.core.errors import AdapterNotFound, BaseNotFound, LorafleetError, RecipeMismatch
from lorafleet.core.recipe import embed, extract
from lorafleet.sdxl.adapter_file import base_targets
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter

runner = CliRunner()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image made with `--local`."""
    file = tmp_path_factory.mktemp("local") / "apple.png"
    arguments = [
        "a red apple",
        "--seed",
        "3",
        "--steps",
        "2",
        "--scheduler",
        "ddim",
        "--step-reuse",
        "2",
        "--negative-prompt",
        "blurry 🍏",
    ]
    done = runner.invoke(app, ["generate", *arguments, "--local", "-o", str(file)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{file}  seed 3\n"
    return file


def test_the_picture_holds_what_was_asked(picture: Path) -> None:
    recipe = extract(picture)
    assert (recipe.prompt, recipe.negative_prompt, recipe.steps) == ("a red apple", "blurry 🍏", 2)
    assert (recipe.seed, recipe.scheduler, recipe.step_reuse, recipe.base.id) == (3, "ddim", 2, "emojixl")
    with Image.open(picture) as image:
        assert image.size == (recipe.width, recipe.height)


def test_its_recipe_makes_it_again_and_can_be_varied(picture: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again.png", tmp_path / "other.png"
    recipe = ["generate", "--local", "--recipe", str(picture)]
    assert runner.invoke(app, [*recipe, "-o", str(again)]).exit_code == 0
    assert again.read_bytes() == picture.read_bytes()
    assert runner.invoke(app, [*recipe, "-o", str(other), "--seed", "4"]).exit_code == 0
    assert other.read_bytes() != picture.read_bytes()
    assert extract(other) == extract(picture).model_copy(update={"seed": 4})


def test_an_adapter_by_name_and_weight(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))
    file, out = tmp_path / "bold.safetensors", tmp_path / "bold.png"
    write_adapter(
        random_adapter(base_targets(BaseConfig()), 5, ranks=(4,), modules=r"unet\..+attn[12].+", strength=2.0), file
    )
    assert runner.invoke(app, ["adapters", "push", "bold", str(file)]).exit_code == 0
    recipe = ["generate", "--local", "--recipe", str(picture), "-o", str(out)]
    assert runner.invoke(app, [*recipe, "--adapter", "bold:0.5"]).exit_code == 0
    (use,) = extract(out).adapters
    assert (use.name.partition("@")[0], use.weight) == ("bold", 0.5)
    with Image.open(out) as bold, Image.open(picture) as plain:
        assert bold.tobytes() != plain.tobytes()
    assert isinstance(failing("x", "--local", "--adapter", "bald", "-o", str(out)), AdapterNotFound)
    done = runner.invoke(app, ["generate", "x", "--adapter", "bold:much"])
    assert (done.exit_code, "should be NAME or NAME:WEIGHT" in done.output.replace("\n", " ")) == (2, True)


def test_several_images_are_numbered_and_reported_as_json(tmp_path: Path) -> None:
    out = tmp_path / "pair.png"
    done = runner.invoke(app, ["generate", "x", "-n", "2", "--steps", "1", "--local", "--json", "-o", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    files = [tmp_path / "pair-1.png", tmp_path / "pair-2.png"]
    assert [entry["file"] for entry in report["images"]] == [str(file) for file in files]
    assert [entry["seed"] for entry in report["images"]] == [extract(file).seed for file in files]
    assert report["timings"]["total_s"] > 0
    assert not out.exists()


def failing(*arguments: str) -> BaseException | None:
    return runner.invoke(app, ["generate", *arguments]).exception


def test_another_base_is_refused_and_nothing_is_written(picture: Path, tmp_path: Path) -> None:
    recipe = extract(picture)
    foreign = recipe.model_copy(update={"base": recipe.base.model_copy(update={"fingerprint": "0" * 64})})
    with Image.open(picture) as image:
        (tmp_path / "foreign.png").write_bytes(embed(image, foreign))
    error = failing("--recipe", str(tmp_path / "foreign.png"), "--local", "-o", str(tmp_path / "out.png"))
    assert isinstance(error, RecipeMismatch)
    error = failing("x", "--local", "--set", f"base.id={tmp_path}/none", "-o", str(tmp_path / "out.png"))
    assert isinstance(error, BaseNotFound)
    error = failing("x", "--local", "--width", "65", "-o", str(tmp_path / "out.png"))
    assert isinstance(error, LorafleetError)
    assert error.param == "width"
    assert not (tmp_path / "out.png").exists()


def test_doctor_finds_this_machine_fit() -> None:
    done = runner.invoke(app, ["doctor", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["ok"]
    found = {check["name"]: check for check in report["checks"]}
    assert {found[name]["state"] for name in ("python", "torch", "ray", "base model", "home")} == {"ok"}
    assert all(check["remedy"] for check in report["checks"] if check["state"] == "fail")


def test_doctor_names_what_is_wrong_and_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path / "file"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = runner.invoke(app, ["doctor", "--set", f"port={port}", "--set", f"base.id={tmp_path}/none"])
    lines = done.stdout.splitlines()
    assert done.exit_code == 1
    assert [line for line in lines if line.startswith(f"warn  port            port {port} is in use")]
    for start, cure in [("fail  base model", "set base.id"), ("fail  home", "set LORAFLEET_HOME")]:
        at = next(i for i, line in enumerate(lines) if line.startswith(start))
        assert cure in lines[at + 1]
