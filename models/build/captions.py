"""The caption grammar, and pools of captions with what each one shows."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorafleet.models.build import config
from lorafleet.models.build.data import Data

SINGLE = (
    "{x} on a {c} background",
    "{x} on a {c} background",
    "{x} on a {c} background",
    "an emoji of {x} on a {c} background",
    "a picture of {x} on a {c} background",
    "{x}, {c} background",
    "a {c} background with {x}",
    "{x} on {c}",
)
PAIR = (
    "{x} next to {y} on a {c} background",
    "{x} next to {y} on a {c} background",
    "{x} and {y} on a {c} background",
    "{x} beside {y} on a {c} background",
    "{x} next to {y}, {c} background",
    "an emoji of {x} next to {y} on a {c} background",
)
NO_BACKGROUND = ("{x}", "{x}", "an emoji of {x}", "a picture of {x}")
TINT_SHARE, NO_BACKGROUND_SHARE, KEYWORD_SHARE = 0.08, 0.08, 0.35
COLOUR_NAMES = tuple(config.COLOURS)


@dataclass(frozen=True)
class Captions:
    """Captions as arrays, one row each.

    `subject`, `second` (-1: none), `tint` (-1: none, else index into COLOURS), `background`: int16 [M];
    `tokens`: int16 [M, CONTEXT], padded with the end marker as CLIPTokenizer does.
    """

    subject: np.ndarray
    second: np.ndarray
    tint: np.ndarray
    background: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.subject)


def with_article(phrase: str, rng: random.Random) -> str:
    """A noun phrase as people type it: mostly with an article, sometimes bare."""
    return phrase if rng.random() < 0.4 else indefinite(phrase)


def indefinite(phrase: str) -> str:
    """The phrase with "a" or "an" where it takes one."""
    first = phrase.split()[0]
    if first in ("a", "an", "the") or first.endswith("s") or first.isdigit():
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def canonical(name: str, colour: str) -> str:
    """The caption that figures are measured with."""
    return f"{indefinite(name)} on a {colour} background"


def canonical_pair(left: str, right: str, colour: str) -> str:
    """The two-subject caption that figures are measured with."""
    return f"{indefinite(left)} next to {indefinite(right)} on a {colour} background"


class Grammar:
    """Draws captions; never one that shows a held-out (emoji, background) pair."""

    def __init__(self, data: Data, pair_share: float = config.PAIR_SHARE) -> None:
        self.held_out, self.pair_share = data.held_out, pair_share
        self.phrases = [([p for p, _ in row[1:]], [w for _, w in row[1:]], row[0][0]) for row in data.phrases]

    def phrase(self, emoji: int, rng: random.Random) -> str:
        keywords, weights, name = self.phrases[emoji]
        return rng.choices(keywords, weights)[0] if keywords and rng.random() < KEYWORD_SHARE else name

    def draw(self, rng: random.Random) -> tuple[str, int, int, int, int]:
        """(caption, subject, second, tint, background)"""
        while True:
            x, c = rng.randrange(len(self.phrases)), rng.randrange(len(COLOUR_NAMES))
            if not self.held_out[x, c]:
                break
        phrase, colour, kind = self.phrase(x, rng), COLOUR_NAMES[c], rng.random()
        if kind < self.pair_share:
            y = rng.randrange(len(self.phrases))
            while y == x or self.held_out[y, c]:
                y = rng.randrange(len(self.phrases))
            second = with_article(self.phrase(y, rng), rng)
            return rng.choice(PAIR).format(x=with_article(phrase, rng), y=second, c=colour), x, y, -1, c
        if kind < self.pair_share + NO_BACKGROUND_SHARE:
            return rng.choice(NO_BACKGROUND).format(x=with_article(phrase, rng)), x, -1, -1, c
        tint = -1
        if kind > 1 - TINT_SHARE and not set(phrase.split()) & set(COLOUR_NAMES):
            name = rng.choice([t for t in config.TINTS if t != colour])
            tint, phrase = COLOUR_NAMES.index(name), f"{name} {phrase}"
        return rng.choice(SINGLE).format(x=with_article(phrase, rng), c=colour), x, -1, tint, c


def corpus(data: Data, count: int = 200_000) -> list[str]:
    """Text to learn the vocabulary from: drawn captions, and each phrase once."""
    rng, grammar = random.Random(config.SEED), Grammar(data)
    return [grammar.draw(rng)[0] for _ in range(count)] + [p for row in data.phrases for p, _ in row]


def all_words(data: Data) -> set[str]:
    """Every word of every caption that the grammar can draw."""
    texts = [p for row in data.phrases for p, _ in row] + [*SINGLE, *PAIR, *NO_BACKGROUND, *COLOUR_NAMES, "an a"]
    return {w for t in texts for w in t.replace(",", " ,").split() if "{" not in w}


def pool(
    data: Data, words: Mapping[str, list[int]], count: int, seed: int, pair_share: float = config.PAIR_SHARE
) -> Captions:
    """`count` captions. `words` has the token ids of every word that one can hold: BPE treats words alone."""
    rng, grammar = random.Random(seed), Grammar(data, pair_share)
    columns = np.empty((count, 4), dtype=np.int16)
    tokens = np.empty((count, config.CONTEXT), dtype=np.int16)
    for row in range(count):
        caption, *columns[row] = grammar.draw(rng)
        tokens[row] = pad([t for word in caption.replace(",", " ,").split() for t in words[word]])
    subject, second, tint, background = columns.T
    return Captions(subject, second, tint, background, tokens)


def pad(ids: list[int]) -> list[int]:
    """Markers around and the end marker to the right, cut to CONTEXT."""
    begin, end = config.VOCAB - 2, config.VOCAB - 1
    ids = [begin, *ids[: config.CONTEXT - 2], end]
    return ids + [end] * (config.CONTEXT - len(ids))
