"""Who gets adapter slots, and who takes part in the next forward: earliest deadline first, nobody waits for ever."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """A job that waits for its turn. `arrival` counts up; `skipped_turns` since it was last chosen; `is_shallow`:
    whether its next step runs only the outer part of the UNet."""

    size: tuple[int, int]
    deadline: float | None
    arrival: int
    skipped_turns: int

    @property
    def is_shallow(self) -> bool: ...


C = TypeVar("C", bound=Candidate)


def choose(candidates: Sequence[C], *, max_jobs: int, max_skipped_turns: int) -> list[C]:
    """Up to `max_jobs` candidates of one size, the most urgent one's, for a step that is shallow for all or for none;
    the counts of skipped turns are updated.

    Shallow steps go first. They take a tenth of a whole one's time, and those who have done theirs are back for the
    next whole one: jobs that reuse steps and jobs that do not share it, in place of taking turns with it. As shallow
    steps follow a whole one of the same job, four at most, that holds up nobody for long.

    A candidate passed over for `max_skipped_turns` turns goes before all that have waited less, so that with n
    candidates nobody is passed over more than `max_skipped_turns + n` times in a row, whatever arrives later.
    """
    urgent = by_urgency(candidates, max_skipped_turns)
    alike = [candidate for candidate in urgent if candidate.size == urgent[0].size]
    is_overdue = urgent[0].skipped_turns >= max_skipped_turns
    is_shallow = urgent[0].is_shallow if is_overdue else any(candidate.is_shallow for candidate in alike)
    chosen = [candidate for candidate in alike if candidate.is_shallow == is_shallow][:max_jobs]
    for candidate in candidates:
        candidate.skipped_turns += 1
    for candidate in chosen:
        candidate.skipped_turns = 0
    return chosen


def seat(candidates: Sequence[C], claim: Callable[[C, bool], bool], *, max_skipped_turns: int) -> None:
    """Calls `claim(candidate, only_resident)` in order of urgency; it returns whether the candidate got its slots.

    First come those whose adapters are in slots already, so that nobody empties a slot that another one waits for;
    but behind one that was passed over for `max_skipped_turns` turns nobody gets any, so that at last the slots it
    needs are free.
    """
    ordered = by_urgency(candidates, max_skipped_turns)
    while ordered and ordered[0].skipped_turns >= max_skipped_turns:
        if not claim(ordered.pop(0), False):
            return
    for candidate in [candidate for candidate in ordered if not claim(candidate, True)]:
        if not claim(candidate, False):
            return


def by_urgency(candidates: Sequence[C], max_skipped_turns: int) -> list[C]:
    """Those passed over for `max_skipped_turns` turns, then the others, the earliest deadline first."""

    def urgency(candidate: C) -> tuple[float, float, int]:
        if candidate.skipped_turns >= max_skipped_turns:
            return (0.0, -candidate.skipped_turns, candidate.arrival)
        return (1.0, math.inf if candidate.deadline is None else candidate.deadline, candidate.arrival)

    return sorted(candidates, key=urgency)
