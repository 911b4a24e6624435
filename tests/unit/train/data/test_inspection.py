"""`lorafleet train inspect` on sets with everything wrong, as a person types it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from lorafleet.cli.train_inspect import inspect
from lorafleet.core.errors import ConfigError, DataNotFound, LorafleetError

app = typer.Typer()
app.command()(inspect)


@pytest.fixture
def samples(repo: Path) -> Path:
    return repo / "samples"


@pytest.fixture
def messy(make_pictures: Callable[..., Path], samples: Path) -> Path:
    """Thirteen pictures, each with a fault of its own but the first four."""
    folder = make_pictures([(128, 128)] * 2)
    names = sorted((samples / "noto-sticker" / "train").glob("[a-z]*.png"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for file in names[:2]:
        shutil.copy(file, folder)
    shutil.copy(names[0], folder / "same.png")
    with Image.open(names[1]) as image:
        image.convert("RGB").save(folder / "alike.jpg", quality=70)
        image.resize((60, 60)).save(folder / "small.png")
        Image.merge("RGB", [*image.split()[1:], image.split()[0]]).save(folder / "other-colours.png")
    (folder / "cut-short.png").write_bytes(names[3].read_bytes()[:2000])
    Image.new("1", (5000, 5000)).save(folder / "huge.png")
    Image.new("P", (9, 9)).save(folder / "moving.gif")
    Image.linear_gradient("L").resize((400, 100)).save(folder / "wide.png")
    Image.linear_gradient("L").rotate(90).resize((100, 300)).save(folder / "long-caption.png")
    known = {row["file_name"] for row in rows}
    for file in folder.iterdir():
        if file.name not in known and file.suffix != ".jsonl":
            text = "a word and " * 30 if file.stem == "long-caption" else f"a {file.stem}"
            rows.append({"file_name": file.name, "text": text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_everything_is_found(messy: Path, samples: Path, tmp_path: Path) -> None:
    code, out = run(messy, "--json", "--sheet", tmp_path / "sheet.png")
    assert code == 1  # there are bad ones
    report: dict[str, Any] = json.loads(out)
    first, second = (file.name for file in sorted((samples / "noto-sticker" / "train").glob("[a-z]*.png"))[:2])
    assert (report["pictures"], report["usable"], report["held_out"]) == (13, 10, 1)
    assert report["buckets"] == {"128x128": 8, "160x96": 1, "96x160": 1}
    assert {each["picture"] for each in report["bad"]} == {"cut-short.png", "huge.png", "moving.gif"}
    reasons = {each["picture"]: each["reason"] for each in report["bad"]}
    assert reasons["huge.png"].startswith("the picture huge.png must have at most 16000000 pixels, got 5000x5000")
    assert report["equal"] == [sorted([first, "same.png"])]
    assert report["alike"] == [sorted(["alike.jpg", "small.png", second])]
    assert report["enlarged"] == ["small.png"]
    assert report["cut_by_a_fifth"] == ["long-caption.png", "wide.png"]
    (cut,) = report["captions"]["truncated"]
    assert cut["picture"] == "long-caption.png"
    assert min(cut["tokens"]) > report["captions"]["window"] == 40
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 176, 36 + 2 * 236)
        left, top = 2 * 176 + 8 + 16, 36 + 16  # alike.jpg, the third, in the middle of its cell
        tile = sheet.crop((left, top, left + 128, top + 128))
        with Image.open(messy / "alike.jpg") as image:
            inner = (1, 1, 127, 127)  # the frame is drawn over the edge
            assert tile.crop(inner).tobytes() == image.convert("RGB").crop(inner).tobytes()


def test_a_person_reads_lines(messy: Path, tmp_path: Path) -> None:
    code, out = run(messy, "--sheet", tmp_path / "sheet.png", "--set", "data.validation_share=0")
    assert code == 1
    lines = out.splitlines()
    assert lines[:2] == ["13 pictures, 10 usable", "0 of them held out for validation"]
    assert "bad: 3" in lines
    assert "  the picture cut-short.png must be a whole PNG, JPEG or WebP picture: replace it or take it out." in lines
    assert lines[-1] == f"contact sheet: {tmp_path / 'sheet.png'}"


@pytest.mark.parametrize("name", ["noto-sticker", "noto-spotlight"])
def test_the_sample_sets_are_sound(name: str, samples: Path, tmp_path: Path) -> None:
    """And what is held out to measure the style is none of what it is learnt from."""
    contents = []
    for part in ("train", "held_out"):
        code, out = run(samples / name / part, "--json", "--sheet", tmp_path / "sheet.png")
        report = json.loads(out)
        assert code == 0
        assert not report["bad"] + report["equal"] + report["alike"] + report["captions"]["truncated"]
        assert report["buckets"] == {"128x128": report["pictures"]}
        contents.append({file.name for file in (samples / name / part).glob("*.png")})
    assert len(contents[0]) >= 40
    assert len(contents[1]) >= 20
    assert not contents[0] & contents[1]


def test_a_training_file_s_other_settings_are_passed_over(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("loop: {steps: 5}\ndata: {validation_share: 0.5}\n")
    place = ("--sheet", tmp_path / "sheet.png")
    _, out = run(samples / "noto-spotlight" / "held_out", "--json", *place, "--config", tmp_path / "train.yaml")
    assert json.loads(out)["held_out"] == 16


def test_bad_usage_is_one_sentence(samples: Path, tmp_path: Path) -> None:
    data, place = samples / "noto-spotlight" / "held_out", ("--sheet", tmp_path / "sheet.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFound, match=r"holds no pictures"):
        run(tmp_path / "empty", *place)
    with pytest.raises(ConfigError, match=r"inspect takes settings of base and data, such as .*, not loop\.steps=1"):
        run(data, *place, "--set", "loop.steps=1")
    with pytest.raises(ConfigError, match=r"unknown setting data\.crop .*; did you mean data\.crops"):
        run(data, *place, "--set", "data.crop=2")
    with pytest.raises(LorafleetError, match=r"cannot write .*: No such file or directory"):
        run(data, "--sheet", tmp_path / "nowhere" / "sheet.png")
