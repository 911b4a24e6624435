from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.text import encode_negative, encode_prompt
from lorafleet.serve.engine.prompts import PromptCache


def test_a_known_prompt_is_not_encoded_again(emojixl: Base) -> None:
    cache = PromptCache(emojixl, entries=2)
    first, negative = cache.pair("red apple", "green")
    again, _ = cache.pair("red apple", "blue")
    assert again is first
    assert (cache.hits, cache.misses) == (1, 3)
    assert torch.equal(first.hidden, encode_prompt(emojixl, "red apple").hidden)
    assert torch.equal(negative.pooled, encode_prompt(emojixl, "green").pooled)


@pytest.mark.parametrize("zeros", [True, False])
def test_no_negative_prompt_is_what_the_base_was_trained_with(
    emojixl: Base, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FrozenDict({**emojixl.pipeline.config, "force_zeros_for_empty_prompt": zeros})
    monkeypatch.setattr(emojixl.pipeline, "_internal_dict", config)
    positive, negative = PromptCache(emojixl, entries=2).pair("red apple", "")
    expected = encode_negative(emojixl, "", positive)
    assert torch.equal(negative.hidden, expected.hidden)
    assert bool(negative.hidden.any()) is not zeros


def test_the_prompt_used_longest_ago_is_forgotten_first(emojixl: Base) -> None:
    cache = PromptCache(emojixl, entries=2)
    cache.pair("a", "b")
    cache.pair("a", "c")
    assert (cache.hits, cache.misses) == (1, 3)
    cache.pair("a", "c")
    assert (cache.hits, cache.misses) == (3, 3)
    cache.pair("c", "b")
    assert (cache.hits, cache.misses) == (4, 4)


def test_none_are_kept_with_no_entries(emojixl: Base) -> None:
    cache = PromptCache(emojixl, entries=0)
    cache.pair("a", "a")
    assert (cache.hits, cache.misses) == (0, 2)


def test_several_threads_may_ask(emojixl: Base) -> None:
    cache = PromptCache(emojixl, entries=3)
    prompts = [f"prompt {i % 5}" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: cache.pair(prompt, prompt)[0], prompts))
    assert cache.hits + cache.misses == 2 * len(prompts)
    for prompt, embedding in zip(prompts[:5], found, strict=False):
        assert torch.equal(embedding.pooled, encode_prompt(emojixl, prompt).pooled)
