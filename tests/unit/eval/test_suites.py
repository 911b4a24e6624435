"""Suites: the shipped ones are what they say, files and loaders, and bad ones are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.core.errors import DataNotFound, DataUnreadable, InvalidRequest
from lorafleet.eval.suites import Suite, load_suite, shipped
from lorafleet.models.build import config
from lorafleet.models.build.data import prepare
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.counting import read_counter
from lorafleet.sdxl.folder import find_base


def test_the_shipped_suites_fit_the_bases_window() -> None:
    counter = read_counter(find_base(BaseConfig()))
    assert shipped() == ["classic5", "emoji"]
    for name in shipped():
        suite = load_suite(name)
        assert suite.name == name
        assert max(max(counter.count(prompt.text)) for prompt in suite.prompts) <= counter.limits.max_prompt_tokens
    classic = load_suite("classic5")
    assert (len(classic.prompts), classic.settings.steps) == (5, 50)


def test_the_emoji_suite_holds_every_kind_of_prompt() -> None:
    suite = load_suite("emoji")
    counts = {category: sum(prompt.category == category for prompt in suite.prompts) for category in suite.categories}
    assert counts == {"object": 60, "colour": 40, "two subjects": 50, "synonyms": 40, "held-out": 60}


@pytest.mark.nightly
def test_what_the_emoji_suite_calls_held_out_training_never_showed(
    require: Callable[[str], str], tmp_path: Path
) -> None:
    """Against the very draw that emojixl's training made."""
    data = prepare(Path(require("font")), tmp_path / "data.npz")
    numbers = {emoji.name: i for i, emoji in enumerate(data.emoji)}
    checked = 0
    for prompt in load_suite("emoji").prompts:
        if prompt.trained is None:
            continue
        subject, _, colour = prompt.text.removesuffix(" background").rpartition(" on a ")
        name = subject if subject in numbers else subject.removeprefix("a ").removeprefix("an ")
        shown = not data.held_out[numbers[name], list(config.COLOURS).index(colour)]
        assert shown == prompt.trained, prompt.id
        assert prompt.trained == (prompt.category == "object")
        checked += 1
    assert checked == 120


def test_the_digest_is_of_the_prompts_alone() -> None:
    suite = load_suite("classic5")
    other = suite.model_copy(update={"description": "another", "version": 2})
    assert Suite.model_validate(other.model_dump()).digest == suite.digest
    reworded = suite.prompts[0].model_copy(update={"text": "a green apple"})
    changed = suite.model_copy(update={"prompts": (reworded, *suite.prompts[1:])})
    assert Suite.model_validate(changed.model_dump()).digest != suite.digest


def test_a_limit_takes_prompts_from_the_whole_suite() -> None:
    assert len(load_suite("emoji").limited(20).prompts) == 20
    assert len(load_suite("emoji").limited(20).categories) == 5
    assert load_suite("emoji").limited(1000) == load_suite("emoji")


def test_files_of_others(tmp_path: Path) -> None:
    coco = tmp_path / "captions.json"
    rows = [(7, 2, "second of seven "), (7, 1, "first of seven"), (3, 9, "of three"), (4, 5, "of three")]
    coco.write_text(json.dumps({"annotations": [{"image_id": i, "id": n, "caption": text} for i, n, text in rows]}))
    suite = load_suite(f"coco:{coco}")
    assert [(each.id, each.text) for each in suite.prompts] == [("3", "of three"), ("7", "first of seven")]

    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\tNote\na "bond"\tAbstract\tBasic\t\na cat\tAnimals\tBasic\tx\n')
    assert [(p.text, p.category) for p in load_suite(f"parti:{parti}").prompts] == [
        ('a "bond"', "Abstract"),
        ("a cat", "Animals"),
    ]


def test_captions_of_training_and_held_out_pictures(repo: Path) -> None:
    samples = repo / "samples" / "noto-spotlight"
    suite = load_suite(f"captions:{samples / 'train'}:{samples / 'held_out'}")
    assert {(prompt.category, prompt.trained) for prompt in suite.prompts} == {("train", True), ("held_out", False)}


BAD = {
    "prompts: []\nname: x": "the suite holds no prompts",
    "name: x\nprompts: [{id: a, text: t}, {id: a, text: u}]": "the id 'a' stands there twice",
    "name: x\nprompts: [{id: a, text: t}, {id: b, text: t}]": "the text 't' stands there twice",
    "name: x\nprompts: [{id: first, text: t}, {id: second, text: ''}]": r"prompts.1.text (second)",
    "name: x\nprompts: [{id: a, text: t, colour: red}]": "prompts.0.colour (a)",
    "name: x\nsettings: {steps: 0}\nprompts: [{id: a, text: t}]": "settings.steps",
    "- a": "must hold a suite",
    "name: [": "line 1 is not YAML",
}


@pytest.mark.parametrize(("text", "says"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_suite_is_refused_by_its_item(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(text)
    with pytest.raises(DataUnreadable) as refused:
        load_suite(str(file))
    assert str(file) in refused.value.message
    assert says in refused.value.message


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="give classic5, emoji, a .yaml file, or coco:PATH"):
        load_suite("emoij")
    with pytest.raises(DataNotFound, match="there is no suite file"):
        load_suite(str(tmp_path / "none.yaml"))
    with pytest.raises(InvalidRequest, match="needs a path"):
        load_suite("parti:")
    table = tmp_path / "a.tsv"
    table.write_text("Prompt\nx\n")
    with pytest.raises(DataUnreadable, match="no columns Prompt and Category"):
        load_suite(f"parti:{table}")
    table.write_text('{"annotations": [{"image_id": 1}]}')
    with pytest.raises(DataUnreadable, match="no COCO captions file"):
        load_suite(f"coco:{table}")
