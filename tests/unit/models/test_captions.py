"""What the base was taught with: captions, their tokens, and the pictures that go with them."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from lorafleet.models import EMOJIXL
from lorafleet.models.build import captions, clip, config, data, loop, tokenizer
from lorafleet.models.build.render import Renderer


@pytest.fixture(scope="module")
def some() -> data.Data:
    """Twelve emoji, drawn as discs and squares of their own colours instead of the font's."""
    emoji = tuple(e for e in data.read_names() if e.name in NAMES)
    y, x = np.mgrid[:128, :128] - 64
    bitmaps = np.zeros((len(emoji), 128, 128, 4), dtype=np.uint8)
    for i, bitmap in enumerate(bitmaps):
        inside = (x**2 + y**2 < 50**2) if i % 2 else (abs(x) < 50) & (abs(y) < 50)
        bitmap[inside] = (20 * i, 255 - 20 * i, 60, 255)
    held_out = np.zeros((len(emoji), len(config.COLOURS)), dtype=bool)
    held_out[np.arange(len(emoji)), np.arange(len(emoji)) % len(config.COLOURS)] = True
    return data.Data(emoji, bitmaps, held_out)


NAMES = (
    "cat face", "cat", "dog face", "red apple", "automobile", "rocket",
    "pizza", "teacup without handle", "house", "person beard", "purple heart", "zebra",
)  # fmt: skip


def test_names_are_unicodes_with_keywords_people_type() -> None:
    known = {e.name: e for e in data.read_names()}
    assert len(known) > 1300
    assert {"kitty", "kitten"} <= set(known["cat face"].keywords)
    assert "car" in known["automobile"].keywords
    assert known["rocket"].codepoint == "1F680"


def test_a_keyword_that_names_another_emoji_is_left_to_it(some: data.Data) -> None:
    phrases = {row[0][0]: dict(row) for row in some.phrases}
    assert "cat" not in phrases["cat face"], "a cat is a cat"
    assert phrases["cat face"]["kitty"] > phrases["cat face"].get("face", 0.0), "rare keywords weigh more"
    for row in some.phrases:
        assert sum(w for _, w in row[1:]) == pytest.approx(1.0)


def test_captions_say_what_is_shown_and_never_show_what_is_held_out(some: data.Data) -> None:
    rng, grammar = random.Random(1), captions.Grammar(some)
    kinds = set()
    for _ in range(5000):
        caption, subject, second, tint, background = grammar.draw(rng)
        assert not some.held_out[subject, background]
        assert any(p in caption for p, _ in some.phrases[subject])
        if second >= 0:
            assert second != subject
            assert not some.held_out[second, background]
            assert any(p in caption for p, _ in some.phrases[second])
        if tint >= 0:
            assert captions.COLOUR_NAMES[tint] in caption
        kinds.add((second >= 0, tint >= 0, captions.COLOUR_NAMES[background] in caption))
    assert {(False, False, True), (True, False, True), (False, True, True), (False, False, False)} <= kinds


def test_a_pool_holds_the_tokens_that_the_tokenizer_gives(some: data.Data) -> None:
    published = CLIPTokenizer.from_pretrained(EMOJIXL / "tokenizer")
    pool = captions.pool(some, tokenizer.word_ids(published, some), 300, seed=5)
    rng, grammar = random.Random(5), captions.Grammar(some)
    for row in pool.tokens:
        text = grammar.draw(rng)[0]
        ids = published(text, padding="max_length", max_length=config.CONTEXT, truncation=True)["input_ids"]
        assert row.tolist() == ids, text


def test_the_second_encoder_reads_what_the_second_tokenizer_pads() -> None:
    one, two = (CLIPTokenizer.from_pretrained(EMOJIXL / name) for name in ("tokenizer", "tokenizer_2"))
    texts = ["", "a kitty", "a rocket next to a pizza on a white background", "word " * 80]
    ids = [
        torch.tensor(t(texts, padding="max_length", max_length=config.CONTEXT, truncation=True)["input_ids"])
        for t in (one, two)
    ]
    assert torch.equal(clip.pad_second(ids[0]), ids[1])


@pytest.mark.parametrize("text", ["🚀 über naïve 猫", "\x00\t\n", "Ünïcödé" * 40, "a" * 5000])
def test_any_text_has_tokens(text: str) -> None:
    published = CLIPTokenizer.from_pretrained(EMOJIXL / "tokenizer")
    ids = published(text, add_special_tokens=False)["input_ids"]
    assert len(published) == config.VOCAB
    assert all(0 <= i < config.VOCAB - 2 for i in ids), "no unknown token: bytes spell everything"


def draw(some: data.Data, rows: list[int], **columns: int) -> torch.Tensor:
    """Rows of one scene (default: emoji 1 on white), drawn with one seed."""
    scene = dict(subject=1, second=-1, tint=-1, background=0) | columns
    values = [torch.full((len(rows),), v) for v in scene.values()]
    g = loop.generator(torch.device("cpu"), "test", *rows)
    return Renderer(some, torch.device("cpu")).compose(*values, config.SQUARE, g)


def test_pictures_depend_on_the_seed_alone(some: data.Data) -> None:
    assert torch.equal(draw(some, [0, 1, 2]), draw(some, [0, 1, 2]))
    assert not torch.equal(draw(some, [0, 1, 2]), draw(some, [3, 4, 5]))


def test_each_rendering_is_another_pose_on_the_background_asked_for(some: data.Data) -> None:
    pictures = (draw(some, list(range(8)), background=2) + 1) / 2
    red = torch.tensor(config.COLOURS["red"]) / 255
    far = (pictures - red[None, :, None, None]).abs().amax(1)
    for picture, other in pairwise(pictures):
        assert (picture - other).abs().mean() > 0.02
    for share in (far > 0.05).float().mean((1, 2)):
        assert 0.1 < share < 0.75, "some subject, some background"


def test_a_pair_stands_left_and_right_and_a_tint_colours_the_subject(some: data.Data) -> None:
    pair = draw(some, [0], subject=10, second=1)[0]  # 10 is reddish, 1 is greenish
    left, right = pair[:, :, :64].mean((1, 2)), pair[:, :, 64:].mean((1, 2))
    assert left[0] > left[1]
    assert right[1] > right[0]
    blue = draw(some, [0], tint=captions.COLOUR_NAMES.index("blue"), background=1)[0]
    assert blue[2].mean() > max(blue[0].mean(), blue[1].mean())


def test_names_can_be_distilled_again(tmp_path: Path) -> None:
    """The committed list has the form that `write_names` gives it."""
    source = [
        {"label": "cat face", "hexcode": "1F431", "tags": ["Pet", "kitty", "143"], "group": 3},
        {"label": "flag: Chad", "hexcode": "1F1F9-1F1E9", "tags": [], "group": 9},
        {"label": "red heart", "hexcode": "2764-FE0F", "tags": ["red heart", "love"], "group": 0},
        {"label": "component", "hexcode": "1F3FB"},
    ]
    import json

    (tmp_path / "data.json").write_text(json.dumps(source), "utf-8")
    (tmp_path / "groups.json").write_text('{"groups": {"0": "smileys", "3": "animals", "9": "flags"}}', "utf-8")
    data.write_names(tmp_path / "data.json", tmp_path / "groups.json", tmp_path / "emoji.json")
    assert data.read_names(tmp_path / "emoji.json") == [
        data.Emoji("1F431", "cat face", ("kitty", "pet"), "animals"),
        data.Emoji("2764", "red heart", ("love",), "smileys"),
    ]
