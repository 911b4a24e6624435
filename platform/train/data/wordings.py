"""Several wordings of one caption: its parts between commas in other orders, some left out."""

import hashlib
import random

from lorafleet.train.data.config import DataConfig


def word(captions: tuple[str, ...], config: DataConfig) -> tuple[str, ...]:
    """`config.caption_variants` wordings of each caption, the first of each as it is, all behind `config.trigger`.

    The same in every process: chance is drawn from the caption itself. Wordings may be equal to each other.
    """
    return tuple(
        _triggered(_wording(caption, number, config), config.trigger)
        for caption in captions
        for number in range(config.caption_variants)
    )


def _wording(caption: str, number: int, config: DataConfig) -> str:
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    if number == 0 or len(parts) <= config.keep_parts:
        return caption
    chance = random.Random(hashlib.sha256(f"wording {number} {caption}".encode()).digest())  # noqa: S311
    kept, others = parts[: config.keep_parts], parts[config.keep_parts :]
    chance.shuffle(others)
    others = [part for part in others if chance.random() >= config.part_dropout]
    return ", ".join([*kept, *others]) or caption


def _triggered(caption: str, trigger: str) -> str:
    """Not twice, where a caption has the words already."""
    trigger = trigger.strip()
    if not trigger or caption.lower().startswith(trigger.lower()):
        return caption
    return f"{trigger} {caption}"
