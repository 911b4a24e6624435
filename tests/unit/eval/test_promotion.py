"""The gate, the rollout, and what is kept of them, on a real registry and results whose numbers are chosen."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from lorafleet.core.adapter_cache import AdapterCache
from lorafleet.core.errors import AdapterNotFound, ConfigError, InvalidRequest, StorageUnavailable
from lorafleet.core.manifest import AdapterFacts, Manifest
from lorafleet.core.registry import Registry
from lorafleet.core.storage import open_storage
from lorafleet.eval.canary import Limits, Source, Tally
from lorafleet.eval.config import EvalConfig, StatisticsConfig
from lorafleet.eval.promotion import Contest, Rollout, compare, contest_of, decide
from lorafleet.eval.results import Results, Score, SystemResult
from lorafleet.eval.suites import Prompt, Suite

PROMPTS = 40
SUITE = Suite(name="small", prompts=tuple(Prompt(id=f"p{i}", text=f"prompt {i}") for i in range(PROMPTS)))
STATISTICS = StatisticsConfig(resamples=500)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    storage = open_storage(str(tmp_path / "registry"), endpoint_url=None)
    return Registry(storage, AdapterCache(tmp_path / "cache", 1 << 20))


def pushed(registry: Registry, content: str, tmp_path: Path) -> Manifest:
    file = tmp_path / "a.safetensors"
    file.write_text(content)
    facts = AdapterFacts(format="diffusers", rank=2, modules={"unet": 1}, fits_fingerprint="f")
    return registry.push("plush", file, lambda _: facts)


def results(**means: tuple[float, float]) -> Results:
    """Systems with these mean CLIP scores and similarities; prompts differ much, systems on a prompt little."""
    rng = np.random.default_rng(0)
    of_prompts = rng.normal(0, 10, PROMPTS)
    systems = {}
    for name, (clip, similarity) in means.items():
        values = {"clip": clip + of_prompts, "similarity": similarity + of_prompts}
        scores = {
            score: Score(score, float(each.mean()), 1.0, 0.0, 99.0, True, tuple(each + rng.normal(0, 1, PROMPTS)), {})
            for score, each in values.items()
        }
        systems[name] = SystemResult(name, "adapter", "", "f", PROMPTS, 1.0, {}, (1.0,), scores)
    about = {"scorer": {"model": "base"}, "sampling": {name: {"steps": 20} for name in means}}
    return Results(SUITE, SUITE.digest, 1, STATISTICS, "clip", systems, about)


GOOD = results(base=(80, 30), candidate=(80.3, 33), production=(80, 31))


class Metrics:
    """Every look, ten requests more of each, of which so many of the candidate's fail."""

    def __init__(self, stable: Manifest, canary: Manifest, errors: int = 0) -> None:
        self._versions = stable.version[:12], canary.version[:12]
        self._errors = errors
        self._looks = 0

    def read(self) -> Mapping[str, Tally]:
        self._looks += 1
        stable, canary = self._versions
        requests = 10 * self._looks
        return {stable: Tally(requests, 0, {1.0: requests}), canary: Tally(requests, self._errors * self._looks)}


def rollout(source: Source) -> Rollout:
    return Rollout(0.1, Limits(watch_s=100, requests=50), lambda _: source, every_s=10)


class Time:
    """A clock that sleeping moves on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(
    ("found", "decision", "reason"),
    [
        (GOOD, "promoted", "above -0.5"),
        (results(base=(80, 30), candidate=(60, 33)), "refused", "against base: the lower bound is not above -0.5"),
        (results(base=(80, 30), candidate=(81, 30)), "refused", "the lower bound is not above 0"),
        (results(base=(80, 20), candidate=(80, 33), production=(80, 35)), "refused", "against production"),
    ],
)
def test_the_gate_wants_prompts_followed_and_style_improved(
    registry: Registry, tmp_path: Path, found: Results, decision: str, reason: str
) -> None:
    old = pushed(registry, "old", tmp_path)
    if "production" in found.systems:
        registry.promote(f"plush@{old.version}")
    candidate = pushed(registry, "new", tmp_path)
    before = registry.record("plush").aliases.get("production")
    contest = contest_of(registry, "plush@latest")
    assert [spec.name for spec in contest.specs()] == [
        "base",
        "candidate",
        *(["production"] if "production" in found.systems else []),
    ]
    evaluation = decide(registry, contest, found, epsilon=0.5)
    assert evaluation.decision == decision
    assert reason in " ".join(evaluation.reasons)
    after = registry.record("plush").aliases.get("production")
    assert after == ({candidate.version: 1.0} if decision == "promoted" else before)
    (kept,) = registry.evaluations(candidate).values()
    assert kept == evaluation
    assert (kept.suite_digest, kept.prompts, kept.scorer) == (SUITE.digest, PROMPTS, {"model": "base"})
    assert kept.scores.keys() == found.systems.keys()
    assert kept.against == (old.version if "production" in found.systems else None)


@pytest.mark.parametrize(
    ("errors", "decision", "seconds"), [(0, "promoted", 100.0), (10, "rolled_back", 0.0), (1, "rolled_back", 10.0)]
)
def test_a_canary_is_promoted_or_taken_back(
    registry: Registry, tmp_path: Path, errors: int, decision: str, seconds: float
) -> None:
    old = pushed(registry, "old", tmp_path)
    registry.promote("plush@latest")
    candidate = pushed(registry, "new", tmp_path)
    looks: list[dict[str, float]] = []
    time = Time()
    evaluation = decide(
        registry,
        contest_of(registry, f"plush@{candidate.version[:8]}"),
        GOOD,
        epsilon=0.5,
        rollout=rollout(Metrics(old, candidate, errors)),
        clock=time,
        sleep=time.sleep,
        on_look=lambda *_: looks.append(dict(registry.record("plush").aliases["production"])),
    )
    assert looks[0] == pytest.approx({old.version: 0.9, candidate.version: 0.1})
    winner = candidate if decision == "promoted" else old
    assert (evaluation.decision, registry.resolve("plush").manifest) == (decision, winner)
    assert len(registry.choices("plush")) == 1
    assert "as canary" in evaluation.reasons[-1]
    assert evaluation.canary is not None
    assert (evaluation.canary.seconds, evaluation.canary.candidate["errors"]) == (seconds, errors * len(looks))


def test_what_stops_the_watch_takes_the_canary_back(registry: Registry, tmp_path: Path) -> None:
    class Broken:
        def read(self) -> Mapping[str, Tally]:
            raise StorageUnavailable("the metrics cannot be read")

    old = pushed(registry, "old", tmp_path)
    registry.promote("plush@latest")
    pushed(registry, "new", tmp_path)
    with pytest.raises(StorageUnavailable):
        decide(registry, contest_of(registry, "plush@latest"), GOOD, epsilon=0.5, rollout=rollout(Broken()))
    assert registry.choices("plush")[0].manifest == old


def test_what_somebody_else_made_production_meanwhile_stays(registry: Registry, tmp_path: Path) -> None:
    old = pushed(registry, "old", tmp_path)
    registry.promote("plush@latest")
    third = pushed(registry, "third", tmp_path)
    candidate = pushed(registry, "new", tmp_path)
    evaluation = decide(
        registry,
        contest_of(registry, "plush@latest"),
        GOOD,
        epsilon=0.5,
        rollout=rollout(Metrics(old, candidate, errors=10)),
        on_look=lambda *_: registry.promote(f"plush@{third.version}") and None,
    )
    assert evaluation.decision == "refused"
    assert "somebody else" in evaluation.reasons[-1]
    assert registry.resolve("plush").manifest == third


def test_a_split_that_an_interrupted_canary_left_is_taken_up_again(registry: Registry, tmp_path: Path) -> None:
    old, new = pushed(registry, "old", tmp_path), pushed(registry, "new", tmp_path)
    registry.alias("plush", "production", {old.version: 0.9, new.version: 0.1})
    assert contest_of(registry, "plush@latest") == Contest(new, old)


def test_what_cannot_be_promoted_is_said(registry: Registry, tmp_path: Path) -> None:
    pushed(registry, "old", tmp_path)
    registry.promote("plush@latest")
    with pytest.raises(InvalidRequest, match="is in production already"):
        contest_of(registry, "plush@latest")
    with pytest.raises(AdapterNotFound, match="did you mean plush"):
        contest_of(registry, "plish@latest")
    pushed(registry, "new", tmp_path)
    with pytest.raises(ConfigError, match="--reference FOLDER"):
        compare(contest_of(registry, "plush@latest"), SUITE, EvalConfig())


def test_evaluations_go_with_their_version(registry: Registry, tmp_path: Path) -> None:
    old, new = pushed(registry, "old", tmp_path), pushed(registry, "new", tmp_path)
    for candidate in (old, new):
        decide(registry, Contest(candidate, None), GOOD, epsilon=0.5)
    assert [len(registry.evaluations(each)) for each in (old, new)] == [1, 1]
    registry.delete(f"plush@{old.version}")
    assert list((tmp_path / "registry" / "adapters" / "plush").glob("*/evaluations/*")) == [
        tmp_path
        / "registry"
        / "adapters"
        / "plush"
        / new.version
        / "evaluations"
        / f"{next(iter(registry.evaluations(new)))}.json"
    ]
    left = tmp_path / "registry" / "adapters" / "plush" / old.version / "evaluations" / "left.json"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text(json.dumps({}))
    assert left.name in " ".join(registry.gc(older_than_s=-60).removed)
    assert len(registry.evaluations(new)) == 1
