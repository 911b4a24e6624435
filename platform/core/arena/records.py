"""The arena's nouns."""

from dataclasses import dataclass, field
from typing import Literal

Choice = Literal["left", "right", "tie"]


@dataclass(frozen=True)
class Entrant:
    """A picture that a system made of a prompt and a seed. `png`: as it came, recipe chunks and all; None where it has
    been shown already and is not to be kept. `clip_score`: 100 x cosine, None where nobody scored it."""

    system: str
    prompt: str
    seed: int
    png: bytes | None = field(default=None, repr=False)
    clip_score: float | None = None


@dataclass(frozen=True)
class Shown:
    """A pair as a rater sees it: nothing in it says which system made what. `left` and `right`: PNGs of pixels only;
    `remaining`: pairs that the session has not voted on, this one included."""

    session: str
    pair: str
    prompt: str
    left: bytes = field(repr=False)
    right: bytes = field(repr=False)
    remaining: int


@dataclass(frozen=True)
class Vote:
    """What somebody answered. `rater` and `pair` are numbers of the store's own, of no use to vote with. `winner` is
    None for a tie, else `left` or `right`, which name systems; the CLIP scores are those of these pictures."""

    rater: int
    pair: int
    pool: str
    prompt: str
    seed: int
    left: str
    right: str
    winner: str | None
    left_clip: float | None
    right_clip: float | None
    voted_unix_s: float


@dataclass(frozen=True)
class Rating:
    """One system. `rating`, `low` and `high` (95 %) are Elo points around the systems' mean of 1000; the bounds are
    None where there are too few votes to say. `mean_clip`: of its pictures that were voted on, each once."""

    system: str
    rating: float
    low: float | None
    high: float | None
    votes: int
    wins: int
    losses: int
    ties: int
    mean_clip: float | None


@dataclass(frozen=True)
class Agreement:
    """How often the picture with the higher CLIP score won. `votes`: those that decided between two scored pictures
    whose scores differ; low and high (95 %) are Wilson's of prompts: votes on one prompt count as one."""

    votes: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratings:
    """`systems`: the best first. `ties`: share of ties that two systems of equal strength would have, None without
    votes. `left_share`: of the decided votes, those for the left picture; sides are drawn by lot, so that 0.5 is fair.
    """

    systems: tuple[Rating, ...]
    votes: int
    raters: int
    prompts: int
    ties: float | None
    left_share: float | None
    clip_agreement: Agreement | None
