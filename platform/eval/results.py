"""Scores of a run, and every system against the baseline: what `results.json` and `results.csv` hold.

results = score_run(run, config)
results.values("clip", "base")          # one number a prompt
results.versus("plush", "base", "clip") # a Comparison
"""

import csv
import io
import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from lorafleet.core.errors import DataNotFound, DataUnreadable, InvalidRequest
from lorafleet.eval.config import EvalConfig, StatisticsConfig
from lorafleet.eval.features import FeatureModel
from lorafleet.eval.images import write_atomically
from lorafleet.eval.run import Run
from lorafleet.eval.scorers import Context, Measured, Samples, make_scorers
from lorafleet.eval.statistics import Array, Comparison, Estimate, compare, estimate, finite, gap, holm_over
from lorafleet.eval.suites import Suite
from lorafleet.eval.systems import adapters_of

logger = logging.getLogger(__name__)

RESULTS_FILE: Final = "results.json"
TABLE_FILE: Final = "results.csv"
FORMAT: Final = 1


@dataclass(frozen=True)
class Score:
    """One score of one system. `per_prompt`: a number a prompt, None for a score of the whole set, which has but `mean`
    and its interval."""

    name: str
    mean: float
    std: float | None
    low: float | None
    high: float | None
    higher_is_better: bool
    per_prompt: tuple[float, ...] | None
    about: Mapping[str, Any]


@dataclass(frozen=True)
class SystemResult:
    """One system. `latency_s`: mean seconds a picture, None for ready ones."""

    name: str
    kind: str
    target: str
    fingerprint: str
    pictures: int
    latency_s: float | None
    training: Mapping[str, Any]
    weights: tuple[float, ...]
    scores: Mapping[str, Score]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """All numbers of a run. `primary`: the score that decides."""

    suite: Suite
    suite_digest: str
    seeds: int
    statistics: StatisticsConfig
    primary: str
    systems: Mapping[str, SystemResult]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.systems)

    def values(self, score: str, system: str, category: str | None = None) -> Array:
        """One number a prompt, of all or of a category's, in the suite's order. Raises InvalidRequest."""
        if system not in self.systems:
            raise InvalidRequest(f"there is no system {system}: there are {', '.join(self.systems)}.", param="system")
        found = self.systems[system].scores.get(score)
        if found is None or found.per_prompt is None:
            known = [name for name, each in self.systems[system].scores.items() if each.per_prompt is not None]
            raise InvalidRequest(
                f"{system} has no {score} for each prompt: it has {', '.join(known) or 'none'}.", param="score"
            )
        values = np.array(found.per_prompt)
        return values if category is None else values[self.rows(category)]

    def rows(self, category: str) -> list[int]:
        """Numbers of the category's prompts."""
        return [i for i, prompt in enumerate(self.suite.prompts) if prompt.category == category]

    def versus(self, system: str, baseline: str, score: str | None = None, category: str | None = None) -> Comparison:
        """Paired by prompt. A score of which less is better is turned round, so that wins are wins. Its `p_holm` is its
        `p`; `against` takes all systems together."""
        name = score or self.primary
        sign = 1 if self.systems[system].scores[name].higher_is_better else -1
        first, second = self.values(name, system, category), self.values(name, baseline, category)
        return compare(sign * first, sign * second, self.statistics)

    def against(self, baseline: str, score: str | None = None) -> dict[str, Comparison]:
        """Every other system against the baseline, with Holm's correction over all of them."""
        others = [name for name in self.systems if name != baseline]
        return dict(zip(others, holm_over([self.versus(name, baseline, score) for name in others]), strict=True))

    def category_estimates(self, system: str, score: str | None = None) -> dict[str, Estimate]:
        return {
            category: estimate(self.values(score or self.primary, system, category), self.statistics)
            for category in self.suite.categories
        }

    def overfit(self, system: str, baseline: str, score: str | None = None) -> Estimate | None:
        """The gain over the baseline on prompts that training showed, less that on held-out ones; None where the suite
        does not tell them apart. An interval above zero: part of the gain is learnt by heart."""
        name = score or self.primary
        gains = self.values(name, system) - self.values(name, baseline)
        trained = np.array([prompt.trained is True for prompt in self.suite.prompts])
        held_out = np.array([prompt.trained is False for prompt in self.suite.prompts])
        if not trained.any() or not held_out.any():
            return None
        return gap(gains[trained], gains[held_out], self.statistics)


def score_run(run: Run, config: EvalConfig, *, write: bool = True) -> Results:
    """Scores all pictures of a run, and writes `results.json` and `results.csv` into its folder.

    Raises ConfigError, BaseNotFound or BaseUnreadable for a scorer that cannot be had, DataUnreadable for a picture.
    """
    context = Context(config, run.suite, FeatureModel.load(config))
    if context.truncation:
        logger.warning(
            "the scorer reads %d tokens: %d of %d prompts are cut off, such as %s",
            context.features.about["window_tokens"],
            len(context.truncation),
            len(run.suite.prompts),
            context.truncation[0],
        )
    scorers = make_scorers(context)
    systems: dict[str, SystemResult] = {}
    for system in run.systems:
        name = str(system["name"])
        samples = Samples(context, run.pictures[name])
        found = {score: scorer.measure(samples) for score, scorer in scorers.items()}
        scores = {
            score: _score(score, measured, samples, config.statistics)
            for score, measured in found.items()
            if measured is not None
        }
        seconds = [each.seconds for each in samples.pictures if each.seconds is not None]
        warnings = context.features.size_warnings(samples.sizes)
        for warning in warnings:
            logger.warning("system %s: %s before %s sees them", name, warning, context.features.about["model"])
        systems[name] = SystemResult(
            name=name,
            kind=str(system["kind"]),
            target=str(system["target"]),
            fingerprint=str(system["fingerprint"]),
            pictures=len(samples.pictures),
            latency_s=float(np.mean(seconds)) if seconds else None,
            training=system["training"],
            weights=tuple(system["weights"]),
            scores=scores,
            warnings=tuple(warnings),
        )
    about = {
        "scorer": context.features.about,
        "sampling": {str(system["name"]): system["sampling"] for system in run.systems},
        **{key: run.about[key] for key in ("versions", "device", "prompts")},
    }
    primary = _primary(config, systems)
    results = Results(run.suite, run.suite.digest, int(run.about["seeds"]), config.statistics, primary, systems, about)
    if write:
        write_results(results, run.folder)
    return results


def baseline_of(results: Results, wanted: str | None) -> str:
    """The system that others are compared with: the one wanted, else the first one. Raises InvalidRequest."""
    if wanted is None:
        return results.names[0]
    if wanted not in results.systems:
        raise InvalidRequest(
            f"--baseline {wanted} is no system of this run: there are {', '.join(results.names)}.", param="baseline"
        )
    return wanted


def write_results(results: Results, folder: Path, baseline: str | None = None) -> None:
    """`results.json`, whole or not at all, then `results.csv`."""
    document = {
        "format": FORMAT,
        "suite": results.suite.model_dump(mode="json"),
        "suite_digest": results.suite_digest,
        "seeds": results.seeds,
        "statistics": results.statistics.model_dump(mode="json"),
        "primary": results.primary,
        "systems": [asdict(each) for each in results.systems.values()],
        "about": dict(results.about),
        "comparisons": comparisons(results, baseline_of(results, baseline)),
    }
    write_atomically(
        folder / RESULTS_FILE, json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False).encode()
    )
    write_atomically(folder / TABLE_FILE, table_csv(results).encode())


def read_results(folder: Path) -> Results:
    """What `write_results` wrote. Raises DataNotFound or DataUnreadable."""
    path = folder / RESULTS_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise DataNotFound(f"{path} is not there: lorafleet eval score {folder} makes it.")
    try:
        tree = json.loads(path.read_bytes())
        if tree["format"] != FORMAT:
            raise ValueError(f"its format is {tree['format']}, this version reads {FORMAT}")
        systems = {each["name"]: _system(each) for each in tree["systems"]}
        return Results(
            suite=Suite.model_validate(tree["suite"]),
            suite_digest=tree["suite_digest"],
            seeds=tree["seeds"],
            statistics=StatisticsConfig.model_validate(tree["statistics"]),
            primary=tree["primary"],
            systems=systems,
            about=tree["about"],
        )
    except (ValueError, LookupError, TypeError) as error:
        raise DataUnreadable(f"{path} holds no results of an evaluation: {error}.") from error


def comparisons(results: Results, baseline: str) -> dict[str, Any]:
    """Every system against the baseline by every score that has a number a prompt, for machines."""
    found: dict[str, Any] = {"baseline": baseline}
    for score, about in results.systems[baseline].scores.items():
        if about.per_prompt is not None and all(score in each.scores for each in results.systems.values()):
            against = results.against(baseline, score)
            found[score] = {name: comparison.as_dict() for name, comparison in against.items()}
    overfit = {name: results.overfit(name, baseline) for name in results.names if name != baseline}
    found["overfit"] = {name: None if each is None else each.as_dict() for name, each in overfit.items()}
    return found


def table_csv(results: Results) -> str:
    """A line for each picture's prompt and system: suite, system, prompt, category, and every score by prompt."""
    scores = sorted(
        {name for each in results.systems.values() for name, score in each.scores.items() if score.per_prompt}
    )
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["suite", "system", "prompt", "category", "text", *scores])
    for system in results.systems.values():
        for number, prompt in enumerate(results.suite.prompts):
            cells = [
                system.scores[name].per_prompt[number]  # type: ignore[index]
                if name in system.scores and system.scores[name].per_prompt
                else ""
                for name in scores
            ]
            writer.writerow([results.suite.name, system.name, prompt.id, prompt.category, prompt.text, *cells])
    return stream.getvalue()


def _score(name: str, measured: Measured, samples: Samples, statistics: StatisticsConfig) -> Score:
    values = measured.by_prompt(samples)
    if values is None:
        if measured.value is None:
            raise DataUnreadable(f"the scorer {name} found neither numbers a picture or prompt nor one for all.")
        return Score(
            name, measured.value, None, measured.low, measured.high, measured.higher_is_better, None, measured.about
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        prompts = ", ".join(samples.suite.prompts[int(i)].id for i in bad[:3])
        raise DataUnreadable(f"the scorer {name} gives no finite number for {len(bad)} prompts, such as {prompts}.")
    found = estimate(values, statistics)
    return Score(
        name,
        found.mean,
        found.std,
        finite(found.low),
        finite(found.high),
        measured.higher_is_better,
        tuple(values.tolist()),
        measured.about,
    )


def _primary(config: EvalConfig, systems: Mapping[str, SystemResult]) -> str:
    """The first score that all systems have for each prompt."""
    for name in config.scores:
        if all(name in each.scores and each.scores[name].per_prompt is not None for each in systems.values()):
            return name
    raise InvalidRequest(
        f"none of the scores {', '.join(config.scores)} has a number a prompt to compare by: add clip.", param="scores"
    )


def _system(tree: Mapping[str, Any]) -> SystemResult:
    scores = {
        name: Score(**{**each, "per_prompt": None if each["per_prompt"] is None else tuple(each["per_prompt"])})
        for name, each in tree["scores"].items()
    }
    return SystemResult(
        **{**tree, "scores": scores, "weights": tuple(tree["weights"]), "warnings": tuple(tree["warnings"])}
    )


def spelled(comparison: Comparison) -> str:
    """`+0.5 [+0.2, +0.8] p=0.003`"""
    found = comparison.difference
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}] p={comparison.p_holm:.4f}"


def sweeps(results: Results) -> dict[str, list[tuple[float, str]]]:
    """Adapters that stand in the run at several weights: by what they are, (weight, system's name) by weight."""
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for system in results.systems.values():
        if system.kind == "adapter" and len(set(system.weights)) == 1:
            parts = "+".join(reference for reference, _ in adapters_of(system.target))
            found[parts].append((system.weights[0], system.name))
    return {
        re.sub(r"[^A-Za-z0-9.@_+-]", "-", Path(parts).name): sorted(each)
        for parts, each in found.items()
        if len(each) > 1
    }


def merged(runs: Mapping[str, Results]) -> Results:
    """Systems of several runs of the same prompts and scorer as one; a name that comes twice gets its run's name before
    it. Raises InvalidRequest for runs that do not compare.
    """
    (name, first), *others = runs.items()
    systems = dict(first.systems)
    for other_name, other in others:
        if other.suite_digest != first.suite_digest:
            raise InvalidRequest(f"{name} and {other_name} are of other prompts: only runs of one suite compare.")
        for what in ("model", "weights_sha256", "dtype"):
            ours, theirs = first.about["scorer"][what], other.about["scorer"][what]
            if ours != theirs:
                raise InvalidRequest(
                    f"{name} and {other_name} were scored by different scorers ({what} {ours}, {theirs}): "
                    "score one again."
                )
        for system in other.systems.values():
            free = system.name if system.name not in systems else f"{other_name}:{system.name}"
            systems[free] = replace(system, name=free)
    return replace(first, systems=systems)
