"""How systems are spelled, what they resolve to, and folders of ready pictures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lorafleet.core.errors import AdapterNotFound, DataNotFound, DataUnreadable, InvalidRequest
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.plan import make_plan, seed_of
from lorafleet.eval.run import match_folder
from lorafleet.eval.suites import Suite
from lorafleet.eval.systems import System, SystemSpec, resolve_systems

SUITE = Suite.model_validate(
    {"name": "s", "prompts": [{"id": "apple", "text": "a red apple"}, {"id": "dog", "text": "a Dog"}]}
)


@pytest.fixture
def config(repo: Path) -> EvalConfig:
    return EvalConfig.model_validate(
        {"registry": {"url": str(repo / "models" / "registry")}, "base": {"device": "cpu"}}
    )


def test_systems_as_a_command_line_spells_them() -> None:
    parsed = {
        "base": ("base", "base", "", {}),
        "style=adapter:plush@latest:0.8+ink": ("style", "adapter", "plush@latest:0.8+ink", {}),
        "adapter:out/my run.safetensors:0.5": ("my-run", "adapter", "out/my run.safetensors:0.5", {}),
        "pipeline:stabilityai/sdxl-turbo,steps=4,guidance=0": (
            "sdxl-turbo",
            "pipeline",
            "stabilityai/sdxl-turbo",
            {"steps": "4", "guidance": "0"},
        ),
        "api=http://127.0.0.1:8000/,adapters=plush:0.8": (
            "api",
            "lorafleet",
            "http://127.0.0.1:8000",
            {"adapters": "plush:0.8"},
        ),
        "dalle=openai:https://api.openai.com,model=dall-e-3": (
            "dalle",
            "openai",
            "https://api.openai.com",
            {"model": "dall-e-3"},
        ),
        "folder:out/mini": ("mini", "folder", "out/mini", {}),
    }
    for text, (name, kind, target, options) in parsed.items():
        spec = SystemSpec.parse(text)
        assert (spec.name, spec.kind, spec.target, spec.options) == (name, kind, target, options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dalle", "no kind of system"),
        ("base:x", "base takes nothing"),
        ("adapter", "adapter needs what follows adapter:"),
        ("openai:api.openai.com", "no http address"),
    ],
)
def test_bad_spelling_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        SystemSpec.parse(text)


def test_adapters_become_versions_and_files_their_hashes(config: EvalConfig, repo: Path) -> None:
    file = next((repo / "models" / "registry" / "adapters" / "noto-spotlight").glob("*/adapter.safetensors"))
    specs = [SystemSpec.parse(text) for text in ("a=adapter:noto-spotlight:0.5", f"b=adapter:{file}:0.5", "base")]
    named, by_file, base = resolve_systems(specs, config)
    assert named.fingerprint == by_file.fingerprint != base.fingerprint
    assert named.adapters[0].sha256 == file.parent.name
    assert named.training["seconds"] > 0
    assert "seconds" not in by_file.training
    assert named.training["share"] == pytest.approx(named.training["parameters"] / 9.02e6, rel=0.01)
    (stronger,) = resolve_systems([SystemSpec.parse("a=adapter:noto-spotlight:0.6")], config)
    assert stronger.fingerprint != named.fingerprint


@pytest.mark.parametrize(
    ("texts", "error", "says"),
    [
        ([], InvalidRequest, "at least one --system"),
        (["base", "base"], InvalidRequest, "two systems are called base"),
        (["adapter:nobody"], AdapterNotFound, "nobody"),
        (["adapter:noto-spotlight:much"], InvalidRequest, "the weight a number"),
        (["x=adapter:/nowhere/x.safetensors"], DataNotFound, "system x: there is no adapter file"),
        (["x=folder:/nowhere"], DataNotFound, "system x: there is no folder"),
        (["base,steps=0"], InvalidRequest, "greater than or equal to 1"),
        (["base,scheduler=fast"], InvalidRequest, "scheduler is one of"),
    ],
)
def test_what_cannot_be_had_is_refused(config: EvalConfig, texts: list[str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        resolve_systems([SystemSpec.parse(text) for text in texts], config)


def _systems(*names: str) -> list[System]:
    return [System(name, "base", "", {"kind": "base", "base": name}) for name in names]


def test_systems_share_seeds_but_no_keys(config: EvalConfig) -> None:
    plan = make_plan(SUITE, _systems("a", "b"), config, device="cpu")
    assert [job.seed for job in plan.jobs["a"]] == [job.seed for job in plan.jobs["b"]]
    assert not {job.key for job in plan.jobs["a"]} & {job.key for job in plan.jobs["b"]}
    assert plan.jobs["a"][0].seed == seed_of("a red apple", 0, 0) != seed_of("a red apple", 1, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"steps": 3}},
        {"sampling": {"guidance_scale": 2.0}},
        {"sampling": {"scheduler": "ddim"}},
        {"sampling": {"width": 96, "height": 160}},
        {"sampling": {"seed": 1}},
        {"run": {"batch_size": 4}},
        {"base": {"dtype": "bfloat16"}},
    ],
)
def test_a_key_changes_with_all_that_decides_a_picture(change: dict[str, object]) -> None:
    keys = [
        make_plan(SUITE, _systems("a"), EvalConfig.model_validate(given), device="cpu").jobs["a"][0].key
        for given in ({}, change, {"run": {"workers": 7}, "scorer": {"definition": "hessel"}})
    ]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_batches_hold_what_is_missing(config: EvalConfig) -> None:
    plan = make_plan(SUITE, _systems("a", "b"), config, device="cpu")
    done = {plan.jobs["a"][0].key, *(job.key for job in plan.jobs["b"])}
    (batch,) = plan.batches(done)
    assert [job.text for job in batch.jobs] == ["a Dog"]
    assert batch.rows == config.run.batch_size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two", "dog-2", "dog-1"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    return tmp_path


def _matched(folder: Path, seeds: int = 2) -> list[tuple[int, str]]:
    rows = match_folder(System("mini", "folder", str(folder), {}), SUITE, seeds)
    return [(row["prompt"], Path(row["file"]).name) for row in rows]


def test_ready_pictures_are_found_by_caption_or_name(folder: Path) -> None:
    (folder / "one.txt").write_text("A red  apple\n")
    assert _matched(folder) == [(0, "one.png"), (1, "dog-1.png"), (1, "dog-2.png")]
    rows = [("one.png", ["a red apple", "fruit"]), ("two.png", "a dog")]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows))
    assert _matched(folder) == [(0, "one.png"), (1, "two.png")]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\none.png,a red apple\ntwo.png,a dog\n")
    assert _matched(folder) == [(0, "one.png"), (1, "two.png")]


def test_what_a_folder_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataUnreadable, match=r"system mini: .* has no picture for 'a red apple' \(apple\)"):
        _matched(folder)
    metadata = folder / "metadata.jsonl"
    metadata.write_text('{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(DataUnreadable, match=r"lacks gone.png"):
        _matched(folder)
    metadata.write_text('{"file_name": "../one.png", "text": "x"}')
    with pytest.raises(DataUnreadable, match="outside of its folder"):
        _matched(folder)
    metadata.write_text('{"file_name": "one.png"}\n')
    with pytest.raises(DataUnreadable, match="entry 1 needs file_name and text"):
        _matched(folder)
    metadata.write_text("{")
    with pytest.raises(DataUnreadable, match="line 1 is not JSON"):
        _matched(folder)
