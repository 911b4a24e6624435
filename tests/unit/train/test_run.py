"""A run from pictures to the registry, in this process."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorafleet.core.errors import AdapterNotFound, AdapterUnreadable, ConfigError, InvalidRequest
from lorafleet.core.registry import open_registry
from lorafleet.sdxl.adapter_file import adapter_facts, base_targets
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.train.config import TrainConfig
from lorafleet.train.merge import merge_in_registry
from lorafleet.train.run import Result, train
from lorafleet.train.watch import read_progress


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def config(**sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, Any] = {
        "base": {"device": "cpu"},
        "data": {"validation_share": 0.34, "trigger": "in crayon"},
        "loop": {"steps": 2, "batch_size": 2},
        "optimizer": {"warmup_steps": 1},
        "validation": {"prompts": ["a dog", "a <cat>"], "sample_steps": 2},
    }
    return TrainConfig.model_validate({**values, **sections})


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(4):
        Image.linear_gradient("L").rotate(90 * number).resize((128, 128)).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a grey thing, number {number}")
    return folder


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Result]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFLEET_HOME", str(folder / "home"))
        yield train(config(), str(pictures(folder / "pictures")), "crayon", exports_kohya=True)


def test_the_adapter_is_published_with_how_it_was_made(result: Result) -> None:
    manifest = result.manifest
    assert manifest is not None
    assert manifest.training is not None
    assert manifest.trigger_words == ("in crayon",)
    assert (manifest.rank, manifest.alpha, manifest.modules) == (8, 16.0, {"unet": 56})
    training = manifest.training
    assert (training.steps, training.base_id) == (2, "emojixl")
    assert training.settings["adapter"]["alpha"] == 16
    assert training.validation_loss is not None
    assert training.clip_score is not None
    found = open_registry(config().registry).resolve("crayon").manifest
    assert found == manifest  # as it is read back
    targets = base_targets(config().base)
    kohya = read_adapter(result.folder / "adapter-kohya.safetensors", targets)
    assert kohya.digest() == read_adapter(result.adapter, targets).digest()


def test_the_report_stands_alone_and_says_what_matters(result: Result) -> None:
    page = (result.folder / "report.html").read_text("utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") == 4  # before and after, two prompts
    assert "a &lt;cat&gt;" in page
    assert result.summary["data_fingerprint"] in page
    assert result.manifest is not None
    assert result.manifest.version in page
    assert "143,360" in page
    assert page.count("<svg") == 1


def test_the_trackers_files_are_there(result: Result) -> None:
    assert list((result.folder / "tensorboard").glob("events.out.tfevents.*"))
    steps = read_progress(result.folder / "progress.jsonl", "step")
    assert [step["step"] for step in steps] == [1, 2]
    assert [step["lr"] for step in steps] == pytest.approx([5e-5, 1e-4])
    json.loads((result.folder / "summary.json").read_text())


def test_the_same_run_again_is_the_same_version(result: Result, tmp_path: Path) -> None:
    again = train(config(), str(pictures(tmp_path / "again")), "crayon")
    assert again.manifest is not None
    assert result.manifest is not None
    assert again.manifest.version == result.manifest.version


def test_adapters_of_the_registry_are_merged_into_it(result: Result) -> None:
    manifest = merge_in_registry(config(), [("crayon", 0.5), ("crayon@latest", 0.5)], "twice")
    assert manifest.trigger_words == ("in crayon",)
    with pytest.raises(AdapterNotFound):
        merge_in_registry(config(), [("crayon", 0.5), ("nobody", 0.5)], "thrice")


def test_what_cannot_be_trained_leaves_nothing(own_home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match=r"empty.*no pictures|no pictures|no images|holds no") as caught:
        train(config(), str(tmp_path / "empty"), "nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="name must match"):
        train(config(), str(tmp_path), "../up")
    with pytest.raises(ConfigError, match="there is no checkpoint of nothing"):
        train(config(), str(tmp_path / "empty"), "nothing", resumes=True)
    assert not open_registry(config().registry).entries()


def test_a_dora_is_a_file_that_the_registry_refuses_by_its_name(own_home: Path, tmp_path: Path) -> None:
    settings = TrainConfig.model_validate(
        {**config(validation={}).model_dump(), "adapter": {"dora": True, "dropout": 0}, "publish": False}
    )
    with pytest.raises(ConfigError, match=r"kohya's format is written of LoRAs only"):
        train(settings, str(tmp_path), "magnitudes", exports_kohya=True)
    made = train(settings, str(pictures(tmp_path / "pictures")), "magnitudes")
    assert made.manifest is None
    assert (made.folder / "report.html").is_file()
    targets = base_targets(settings.base)
    with pytest.raises(AdapterUnreadable, match="a DoRA, which is not supported .*: train a LoRA"):
        open_registry(settings.registry).push("magnitudes", made.adapter, lambda file: adapter_facts(file, targets))
    assert not open_registry(settings.registry).entries()


def test_a_missing_library_is_named_before_anything_is_trained(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # where it is installed, too
    with pytest.raises(ConfigError, match=r"watch\.wandb_project needs the package wandb: pip install"):
        train(config(watch={"wandb_project": "p"}), str(pictures(tmp_path / "pictures")), "w")
