from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.text import encode_negative, encode_prompt

LONG = "a red apple on a blue background " * 8 + "and the very end"


@pytest.fixture(params=["tiny", "emojixl"])
def base(request: pytest.FixtureRequest) -> Base:
    found: Base = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("prompt", ["red apple", LONG, "日本 🍎 \t zażółć", "x"])
@pytest.mark.parametrize("negative", ["", "blurry", LONG])
def test_equals_diffusers_bit_for_bit(base: Base, prompt: str, negative: str) -> None:
    expected = base.pipeline.encode_prompt(prompt, device=base.device, negative_prompt=negative or None)
    positive = encode_prompt(base, prompt)
    other = encode_negative(base, negative, positive)
    for ours, theirs in zip((positive.hidden, other.hidden, positive.pooled, other.pooled), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_told_in_the_words_of_the_prompt(tiny: Base) -> None:
    assert encode_prompt(tiny, "Red Apple").dropped_text == ""
    # One token a letter; 24 less the start and end tokens keep 22 letters (spaces are none).
    assert (
        encode_prompt(tiny, "abcdefghijk LMNOPQRSTUV dropped: Ünd Æpple").dropped_text.strip() == "dropped: Ünd Æpple"
    )


def test_a_prompt_that_just_fits_is_whole(tiny: Base) -> None:
    assert encode_prompt(tiny, "abcdefghijk LMNOPQRSTUV").dropped_text == ""


def test_threads_may_share_a_base(tiny: Base) -> None:
    prompts = [f"apple number {i}" * (1 + i % 5) for i in range(64)]
    alone = [encode_prompt(tiny, prompt).pooled for prompt in prompts]
    with ThreadPoolExecutor(max_workers=8) as pool:
        together = list(pool.map(lambda prompt: encode_prompt(tiny, prompt).pooled, prompts))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
