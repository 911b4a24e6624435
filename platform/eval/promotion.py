"""The gate between training and production.

A candidate is promoted if its pictures follow their prompts as well as before (the lower bound of the paired
difference in CLIP score is above -epsilon) and come nearer to the reference pictures (that of the similarity is above
0). Before is the version in production, or the base alone where there is none. All draw the same prompts from the same
noise.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from lorafleet.core.errors import AdapterNotFound, ConfigError, InvalidRequest
from lorafleet.core.evaluation import Decision, Evaluation, Measured
from lorafleet.core.manifest import PRODUCTION, Manifest, Shares
from lorafleet.core.registry import Registry
from lorafleet.eval.canary import Limits, Source, Tally, facts_of, watch
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.results import Results, score_run
from lorafleet.eval.run import OnProgress, run_suite
from lorafleet.eval.statistics import Comparison
from lorafleet.eval.suites import Suite
from lorafleet.eval.systems import SystemSpec

logger = logging.getLogger(__name__)

BASE: Final = "base"
CANDIDATE: Final = "candidate"
CLIP: Final = "clip"
SIMILARITY: Final = "similarity"
VERSION_DIGITS: Final = 12


@dataclass(frozen=True)
class Rollout:
    """How the requests move over to a candidate. `open_source`: begins to count an adapter's requests by version."""

    share: float
    limits: Limits
    open_source: Callable[[str], Source]
    every_s: float = 5.0


@dataclass(frozen=True)
class Contest:
    """Who is compared: `before` is the version in production, None for the base alone."""

    candidate: Manifest
    before: Manifest | None
    weight: float = 1.0

    @property
    def opponent(self) -> str:
        """The system that the candidate is compared with."""
        return BASE if self.before is None else PRODUCTION

    def specs(self) -> list[SystemSpec]:
        specs = [SystemSpec(BASE, "base"), SystemSpec(CANDIDATE, "adapter", self._target(self.candidate))]
        if self.before is not None:
            specs.append(SystemSpec(PRODUCTION, "adapter", self._target(self.before)))
        return specs

    def _target(self, manifest: Manifest) -> str:
        return f"{manifest.name}@{manifest.version}:{self.weight!r}"


@dataclass(frozen=True)
class Verdict:
    is_passed: bool
    reasons: tuple[str, ...]
    differences: Mapping[str, Comparison]


def contest_of(registry: Registry, reference: str, weight: float = 1.0) -> Contest:
    """The candidate, and what is in production now; of a split, what has the largest share beside the candidate.

    Raises AdapterNotFound, and InvalidRequest where the candidate is in production alone.
    """
    candidate = registry.resolve(reference, draw=0.0).manifest
    in_production: Shares = {}
    with suppress(AdapterNotFound):
        choices = registry.choices(f"{candidate.name}@{PRODUCTION}")
        in_production = {choice.manifest.version: choice.share for choice in choices}
    others = {version: share for version, share in in_production.items() if version != candidate.version}
    if in_production and not others:
        raise InvalidRequest(
            f"{spelled(candidate)} is in production already: name another version, as NAME@ and its first digits.",
            param="name",
        )
    before = None
    if others:
        version = max(others, key=lambda each: (others[each], each))
        before = registry.resolve(f"{candidate.name}@{version}").manifest
    return Contest(candidate, before, weight)


def compare(
    contest: Contest,
    suite: Suite,
    config: EvalConfig,
    *,
    on_progress: OnProgress = lambda system, done, total: None,
) -> Results:
    """Draws and scores the suite for all of them. Raises ConfigError without reference pictures."""
    if config.reference is None:
        raise ConfigError(
            "promotion needs pictures of what the adapter is to look like, kept out of its training: "
            "give --reference FOLDER.",
            param="reference",
        )
    settled = config.model_copy(update={"scores": tuple(dict.fromkeys((CLIP, SIMILARITY, *config.scores)))})
    return score_run(run_suite(suite, contest.specs(), settled, on_progress=on_progress), settled)


def judge(results: Results, contest: Contest, epsilon: float) -> Verdict:
    """`epsilon`: points of CLIP score that may be lost."""
    opponent = contest.opponent
    clip = results.versus(CANDIDATE, opponent, CLIP)
    style = results.versus(CANDIDATE, opponent, SIMILARITY)
    follows, improves = clip.difference.low > -epsilon, style.difference.low > 0
    reasons = (
        f"CLIP score {_interval(clip)} against {opponent}: the lower bound is "
        f"{'above' if follows else 'not above'} -{epsilon:g}",
        f"similarity to the reference {_interval(style)} against {opponent}: the lower bound is "
        f"{'above' if improves else 'not above'} 0",
    )
    return Verdict(follows and improves, reasons, {CLIP: clip, SIMILARITY: style})


def decide(
    registry: Registry,
    contest: Contest,
    results: Results,
    *,
    epsilon: float,
    rollout: Rollout | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    on_look: Callable[[Tally, Tally], None] = lambda stable, canary: None,
) -> Evaluation:
    """Moves `production` if the candidate passes the gate and, where one is asked for, the rollout; keeps what was
    found beside the candidate's manifest either way.

    Raises StorageUnavailable; `production` is then what it was.
    """
    verdict = judge(results, contest, epsilon)
    reasons, canary = verdict.reasons, None
    decision: Decision = "refused"
    if verdict.is_passed and rollout is not None and contest.before is not None:
        decision, why, canary = _roll_out(registry, contest, contest.before, rollout, clock, sleep, on_look)
        reasons = (*reasons, why)
    elif verdict.is_passed:
        registry.alias(contest.candidate.name, PRODUCTION, contest.candidate.version)
        decision = "promoted"
    evaluation = Evaluation(
        decision=decision,
        reasons=reasons,
        decided_at=datetime.now(UTC),
        suite=results.suite.name,
        suite_digest=results.suite_digest,
        prompts=len(results.suite.prompts),
        seeds=results.seeds,
        weight=contest.weight,
        sampling=dict(results.about["sampling"][CANDIDATE]),
        scorer=dict(results.about["scorer"]),
        against=None if contest.before is None else contest.before.version,
        scores={name: _scores(results, name) for name in results.names},
        differences={name: _measured(each.difference) for name, each in verdict.differences.items()},
        canary=canary,
    )
    registry.add_evaluation(contest.candidate, evaluation)
    return evaluation


def spelled(manifest: Manifest) -> str:
    return f"{manifest.name}@{manifest.version[:VERSION_DIGITS]}"


def _roll_out(
    registry: Registry,
    contest: Contest,
    before: Manifest,
    rollout: Rollout,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    on_look: Callable[[Tally, Tally], None],
) -> tuple[Decision, str, Any]:
    """Whatever happens on the way, a Ctrl-C too, production is the version before again unless the candidate passed."""
    name, candidate = contest.candidate.name, contest.candidate.version
    source = rollout.open_source(name)
    split = {before.version: 1 - rollout.share, candidate: rollout.share}
    registry.alias(name, PRODUCTION, split)
    settled = before.version
    try:
        judgement, stable, canary, seconds = watch(
            source,
            before.version[:VERSION_DIGITS],
            candidate[:VERSION_DIGITS],
            rollout.limits,
            every_s=rollout.every_s,
            clock=clock,
            sleep=sleep,
            on_look=on_look,
        )
        if judgement.state == "passed":
            settled = candidate
    finally:
        is_ours = _is_still(registry, name, split)
        if is_ours:
            registry.alias(name, PRODUCTION, settled)
    facts = facts_of(rollout.share, seconds, stable, canary)
    if not is_ours:
        return "refused", "somebody else changed production meanwhile, and it was left so", facts
    if settled == candidate:
        return "promoted", f"as canary: {judgement.reason}", facts
    return "rolled_back", f"as canary: {judgement.reason}", facts


def _is_still(registry: Registry, name: str, split: Shares) -> bool:
    shares = registry.record(name).aliases.get(PRODUCTION, {})
    return set(shares) == set(split)


def _scores(results: Results, system: str) -> dict[str, Measured]:
    found = results.systems[system].scores
    return {
        name: Measured(mean=each.mean, low=each.low, high=each.high)
        for name, each in found.items()
        if each.low is not None and each.high is not None
    }


def _measured(estimate: Any) -> Measured:
    return Measured(mean=estimate.mean, low=estimate.low, high=estimate.high)


def _interval(comparison: Comparison) -> str:
    found = comparison.difference
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
