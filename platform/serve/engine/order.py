"""Who takes part in the next forward: earliest deadline first, and nobody waits for ever."""

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """A job that could take its next step. `arrival` counts up; `skipped_turns` since it was last chosen."""

    size: tuple[int, int]
    deadline: float | None
    arrival: int
    skipped_turns: int


C = TypeVar("C", bound=Candidate)


def choose(candidates: Sequence[C], *, max_jobs: int, max_skipped_turns: int) -> list[C]:
    """Up to `max_jobs` candidates of one size, the most urgent one's; the counts of skipped turns are updated.

    A candidate passed over for `max_skipped_turns` turns goes before all that have waited less, so that with n
    candidates nobody is passed over more than `max_skipped_turns + n` times in a row, whatever arrives later.
    """

    def urgency(candidate: C) -> tuple[float, float, int]:
        if candidate.skipped_turns >= max_skipped_turns:
            return (0.0, -candidate.skipped_turns, candidate.arrival)
        return (1.0, math.inf if candidate.deadline is None else candidate.deadline, candidate.arrival)

    by_urgency = sorted(candidates, key=urgency)
    chosen = [candidate for candidate in by_urgency if candidate.size == by_urgency[0].size][:max_jobs]
    for candidate in candidates:
        candidate.skipped_turns += 1
    for candidate in chosen:
        candidate.skipped_turns = 0
    return chosen
