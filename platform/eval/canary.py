"""A candidate that gets a share of the requests, and whether it errs or lingers more than the version before it.

What is counted comes from the service's own metrics: `lorafleet_gateway_adapter_uses_total` and, where an alias names
several versions, `lorafleet_gateway_adapter_seconds`.

Errors and slow requests are rates with Wilson's interval (Wilson 1927), so that a candidate which fails every time is
found after a few requests, and one that failed once is not. A request is slow where it took longer than `latency_ratio`
times what 95 % of the stable version's requests took at most, rounded up to a bucket of the histogram; 5 % may be.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Final, Literal, Protocol

from lorafleet.core.evaluation import CanaryFacts

LEAST: Final = 5  # requests of each version before anything is a breach
SLOW_SHARE: Final = 0.05
CONFIDENCE: Final = 0.95

State = Literal["watching", "passed", "breached"]


@dataclass(frozen=True)
class Tally:
    """Requests of one version since the watch began. `seconds`: of those that ended well, by a bucket's upper bound
    (the last one infinite), not cumulative. Cached and cancelled ones are left out."""

    requests: int = 0
    errors: int = 0
    seconds: Mapping[float, int] = field(default_factory=dict)

    @property
    def p95_s(self) -> float | None:
        """Upper bound of the bucket that holds the 95th percentile; None without requests."""
        total, below = sum(self.seconds.values()), 0
        for bound in sorted(self.seconds):
            below += self.seconds[bound]
            if total and below >= (1 - SLOW_SHARE) * total:
                return bound
        return None

    def facts(self) -> dict[str, float | int | None]:
        p95_s = self.p95_s
        finite = None if p95_s is None or math.isinf(p95_s) else p95_s
        return {"requests": self.requests, "errors": self.errors, "p95_s": finite}


@dataclass(frozen=True)
class Limits:
    """What a candidate may do. `error_rate`: by how much its rate of errors may be above the stable version's, 0 to 1.
    `requests`: that both must have answered to pass."""

    watch_s: float
    requests: int = 50
    error_rate: float = 0.02
    latency_ratio: float = 1.5


@dataclass(frozen=True)
class Judgement:
    state: State
    reason: str


class Source(Protocol):
    """Where tallies come from."""

    def read(self) -> Mapping[str, Tally]:
        """By version, its first 12 digits; since the source was opened. Raises StorageUnavailable."""


def judge(stable: Tally, canary: Tally, limits: Limits, *, is_over: bool) -> Judgement:
    """`is_over`: the time is up, so that too few requests are a breach too."""
    if canary.requests >= LEAST and stable.requests >= LEAST:
        allowed = stable.errors / stable.requests + limits.error_rate
        if wilson(canary.errors, canary.requests)[0] > allowed:
            return Judgement(
                "breached",
                f"{canary.errors} of {canary.requests} requests failed, of the version before {stable.errors} of "
                f"{stable.requests}",
            )
        answered = sum(canary.seconds.values())
        bound = _slow_above(stable, limits.latency_ratio)
        if bound is not None and answered >= LEAST:
            slow = sum(number for upper, number in canary.seconds.items() if upper > bound)
            if wilson(slow, answered)[0] > SLOW_SHARE:
                return Judgement(
                    "breached",
                    f"{slow} of {answered} requests took longer than {bound:g} s; of the version before, 95 % took at "
                    f"most {stable.p95_s:g} s",
                )
    if not is_over:
        return Judgement("watching", "")
    fewest = min(stable.requests, canary.requests)
    if fewest < limits.requests:
        which = "the candidate" if canary.requests == fewest else "the version before"
        return Judgement(
            "breached",
            f"{which} had {fewest} of the {limits.requests} requests that are needed to say anything: watch longer, "
            "give it a larger share, or ask for fewer",
        )
    return Judgement(
        "passed",
        f"{canary.errors} of {canary.requests} requests failed, of the version before {stable.errors} of "
        f"{stable.requests}; 95 % took at most {canary.p95_s or 0:g} s, before {stable.p95_s or 0:g} s",
    )


def watch(
    source: Source,
    stable: str,
    canary: str,
    limits: Limits,
    *,
    every_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    on_look: Callable[[Tally, Tally], None] = lambda stable, canary: None,
) -> tuple[Judgement, Tally, Tally, float]:
    """Looks until there is a breach or the time is up: the judgement, both tallies, and the seconds that it took.

    `stable` and `canary`: first digits of versions as the source has them.
    """
    begun_s = clock()
    while True:
        found = source.read()
        tallies = found.get(stable, Tally()), found.get(canary, Tally())
        on_look(*tallies)
        seconds = clock() - begun_s
        judgement = judge(*tallies, limits, is_over=seconds >= limits.watch_s)
        if judgement.state != "watching":
            return judgement, *tallies, seconds
        sleep(min(every_s, limits.watch_s - seconds))


def facts_of(share: float, seconds: float, stable: Tally, canary: Tally) -> CanaryFacts:
    return CanaryFacts(share=share, seconds=seconds, candidate=dict(canary.facts()), stable=dict(stable.facts()))


def wilson(hits: int, of: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a rate: `hits` of `of`, `of` > 0."""
    z, rate = NormalDist().inv_cdf(0.5 + confidence / 2), hits / of
    middle = (rate + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * math.sqrt(rate * (1 - rate) / of + z**2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _slow_above(stable: Tally, ratio: float) -> float | None:
    """The bucket's bound above which a request is slow; None where there is nothing to compare with."""
    p95_s = stable.p95_s
    if p95_s is None or math.isinf(p95_s) or sum(stable.seconds.values()) < LEAST:
        return None
    return ratio * p95_s
