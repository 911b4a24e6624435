"""Wordings: parts in other orders, the same in every process."""

import pytest

from lorafleet.core.config import load_settings
from lorafleet.core.errors import ConfigError
from lorafleet.train.data import DataConfig
from lorafleet.train.data.wordings import word

TAGS = "a cat, red, round, small, on a mat, smiling"


def test_the_first_wording_is_the_caption() -> None:
    assert word(("a cat", "a kitty"), DataConfig()) == ("a cat", "a kitty")


def test_others_are_shuffled_behind_the_parts_that_stay() -> None:
    words = word((TAGS,), DataConfig(caption_variants=6, keep_parts=2))
    assert words[0] == TAGS
    assert len(set(words)) > 3
    for wording in words:
        parts = wording.split(", ")
        assert parts[:2] == ["a cat", "red"]
        assert sorted(parts) == sorted(TAGS.split(", "))
    assert words == word((TAGS,), DataConfig(caption_variants=6, keep_parts=2, crops=2))


def test_parts_are_dropped_by_chance_but_never_all() -> None:
    words = word((TAGS,), DataConfig(caption_variants=64, keep_parts=0, part_dropout=0.5))
    counts = [len(wording.split(", ")) for wording in words[1:]]
    assert 2.5 <= sum(counts) / len(counts) <= 3.5
    assert min(counts) >= 1


def test_a_trigger_stands_in_front_once() -> None:
    assert word(("a cat", "pixel art of a dog"), DataConfig(trigger="Pixel art of ")) == (
        "Pixel art of a cat",
        "pixel art of a dog",
    )


def test_dropping_parts_needs_other_wordings() -> None:
    with pytest.raises(ConfigError, match=r"data\.part_dropout needs further wordings: set data\.caption_variants"):
        load_settings(DataConfig, overrides=["part_dropout=0.5"])
