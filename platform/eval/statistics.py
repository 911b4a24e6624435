"""What a difference is worth: intervals, tests and sample sizes over prompts. Pure functions of arrays; numpy only.

Pictures of one prompt are not independent, so everything is clustered by prompt: several seeds are averaged within the
prompt first, and prompts are what is resampled. `values[n]` below is one number a prompt, float64; NaN is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lorafleet.eval.config import IntervalMethod, StatisticsConfig

Array = npt.NDArray[np.float64]
MAX_EXACT: Final = 14
"""Prompts up to which all 2^n sign flips are counted."""
CHUNK: Final = 1 << 22
"""Numbers drawn at once."""
_NORMAL: Final = NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts. `std`: of prompts, not of the mean. A single prompt's interval is infinite."""

    n: int
    mean: float
    std: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """JSON, where an infinite end is None."""
        return {**asdict(self), "low": finite(self.low), "high": finite(self.high)}


@dataclass(frozen=True)
class Comparison:
    """A system against another on the same prompts.

    `difference`: of the means, `std` of the prompts' differences. `p`: two-sided, of no difference at all, by sign
    flips; `p_holm`: the same with all comparisons of a report taken together. `win_rate`: share of prompts on which the
    first is better, ties counting half. `prompts_needed`: to find a wanted difference with this spread.
    """

    difference: Estimate
    p: float
    p_holm: float
    win_rate: float
    wins: int
    ties: int
    losses: int
    prompts_needed: int

    @property
    def is_evidence(self) -> bool:
        """The interval leaves zero out."""
        return self.difference.low > 0 or self.difference.high < 0

    def as_dict(self) -> dict[str, Any]:
        """JSON."""
        return {**asdict(self), "difference": self.difference.as_dict(), "is_evidence": self.is_evidence}


def finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def by_prompt(values: npt.ArrayLike, prompt: npt.ArrayLike, prompts: int) -> Array:
    """values[images], prompt[images] (which prompt each is of) -> means [prompts]; NaN where a prompt has none."""
    numbers, index = np.asarray(values, dtype=np.float64), np.asarray(prompt, dtype=np.int64)
    counts = np.bincount(index, minlength=prompts)
    sums = np.bincount(index, weights=numbers, minlength=prompts)
    means: Array = np.divide(sums, counts, out=np.full(prompts, np.nan), where=counts > 0)
    return means


def estimate(values: npt.ArrayLike, config: StatisticsConfig) -> Estimate:
    """Mean of values[n] with its bootstrap interval; of a single prompt the interval is infinite."""
    numbers = _checked(values)
    low, high = bootstrap_interval(
        numbers,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
        method=config.interval,
    )
    std = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
    return Estimate(len(numbers), float(numbers.mean()), std, low, high)


def compare(values: npt.ArrayLike, baseline: npt.ArrayLike, config: StatisticsConfig) -> Comparison:
    """values[n] against baseline[n], paired by prompt. `p_holm` is `p` until `holm_over` has seen all comparisons."""
    first, second = _checked(values), _checked(baseline)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} prompts cannot be paired")
    differences = first - second
    difference = estimate(differences, config)
    p = sign_flip_test(differences, resamples=config.resamples, seed=config.seed)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    ties = len(differences) - wins - losses
    needed = prompts_needed(
        difference.std, config.wanted_difference, power=config.power, significance=1 - config.confidence
    )
    return Comparison(difference, p, p, (wins + ties / 2) / len(differences), wins, ties, losses, needed)


def holm_over(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same, each with its `p_holm` among all of them."""
    adjusted = holm([each.p for each in comparisons])
    return [Comparison(**{**each.__dict__, "p_holm": p}) for each, p in zip(comparisons, adjusted, strict=True)]


def bootstrap_interval(
    values: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    method: IntervalMethod = "bca",
) -> tuple[float, float]:
    """Of the mean of values[n], by resampling prompts.

    `bca`: bias-corrected and accelerated, Efron 1987 (JASA 82, 171-185), second-order exact for skewed values.
    `percentile`: the resampled means' own quantiles. Both are widened by sqrt(n / (n - 1)) about the mean: resampling n
    values gives a spread that is too small by that factor (Hesterberg 2015, section 3.2). The same seed gives the same
    interval.
    """
    numbers = _checked(values)
    n = len(numbers)
    mean = float(numbers.mean())
    if n == 1:
        return -math.inf, math.inf
    if np.ptp(numbers) == 0:
        return mean, mean
    means = np.sort(_resampled_means(numbers, resamples, seed))
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        tails = _bca_tails(numbers, means, tails)
    low, high = np.quantile(means, tails)
    widening = math.sqrt(n / (n - 1))
    return mean + widening * (float(low) - mean), mean + widening * (float(high) - mean)


def sign_flip_test(differences: npt.ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of differences[n] having no direction: each prompt's sign is as likely the other one.

    Exact up to `MAX_EXACT` prompts; above, by random flips with (hits + 1) / (resamples + 1), which is valid too
    (Phipson and Smyth 2010).
    """
    numbers = _checked(differences)
    observed = abs(numbers.sum())
    slack = 1e-12 * np.abs(numbers).sum()  # the same sum in another order
    n = len(numbers)
    if n <= MAX_EXACT:
        signs = 1 - 2 * ((np.arange(1 << n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ numbers) >= observed - slack).mean())
    generator, hits, left = np.random.default_rng([seed, 1]), 0, resamples
    while left:
        count = min(left, max(1, CHUNK // n))
        signs = generator.integers(0, 2, size=(count, n), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ numbers) >= observed - slack).sum())
        left -= count
    return (hits + 1) / (resamples + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """p values [k] -> adjusted ones [k], Holm 1979: any of them below alpha is wrong with probability alpha at most."""
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, at in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[at]))
        adjusted[at] = highest
    return adjusted


def prompts_needed(std: float, difference: float, *, power: float = 0.8, significance: float = 0.05) -> int:
    """Prompts for a two-sided paired test to find `difference` with chance `power`, where differences spread by `std`.

    n = ((z[1 - significance / 2] + z[power]) std / difference)^2, at least 2.
    """
    if difference <= 0:
        raise ValueError(f"a wanted difference is above 0, not {difference}")
    z = _NORMAL.inv_cdf(1 - significance / 2) + _NORMAL.inv_cdf(power)
    return max(2, math.ceil((z * std / difference) ** 2))


def gap(first: npt.ArrayLike, second: npt.ArrayLike, config: StatisticsConfig) -> Estimate:
    """Mean of first[n] less mean of second[m], of different prompts, each resampled alone; a percentile interval.

    Of an adapter's gains on prompts that training showed and on held-out ones it is the check for overfitting: above
    zero, what was gained is partly learnt by heart.
    """
    one, other = _checked(first), _checked(second)
    drawn = [
        numbers.mean()
        + (_resampled_means(numbers, config.resamples, config.seed + i) - numbers.mean())
        * math.sqrt(len(numbers) / max(1, len(numbers) - 1))
        for i, numbers in enumerate((one, other))
    ]
    tails = [(1 - config.confidence) / 2, (1 + config.confidence) / 2]
    low, high = np.quantile(drawn[0] - drawn[1], tails) if min(len(one), len(other)) > 1 else (-math.inf, math.inf)
    variance = sum(numbers.var(ddof=1) for numbers in (one, other) if len(numbers) > 1)
    return Estimate(
        len(one) + len(other), float(one.mean() - other.mean()), math.sqrt(float(variance)), float(low), float(high)
    )


def _resampled_means(numbers: Array, resamples: int, seed: int) -> Array:
    generator = np.random.default_rng([seed, 0])
    count = max(1, CHUNK // len(numbers))
    parts = [min(count, resamples - at) for at in range(0, resamples, count)]
    return np.concatenate(
        [numbers[generator.integers(0, len(numbers), (part, len(numbers)))].mean(1) for part in parts]
    )


def _bca_tails(numbers: Array, means: Array, tails: Array) -> Array:
    """Where in the sorted resampled means the interval ends."""
    below = (means < numbers.mean()).mean() + (means == numbers.mean()).mean() / 2
    bias = _NORMAL.inv_cdf(min(max(float(below), 1 / (len(means) + 1)), 1 - 1 / (len(means) + 1)))
    off = numbers.mean() - numbers  # the mean without one prompt, less their mean: proportional to this
    acceleration = -float((off**3).sum()) / (6 * float((off**2).sum()) ** 1.5)
    ends = [bias + _NORMAL.inv_cdf(float(tail)) for tail in tails]
    return np.array([_NORMAL.cdf(bias + z / max(1e-9, 1 - acceleration * z)) for z in ends])


def _checked(values: npt.ArrayLike) -> Array:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(f"statistics take one number a prompt, at least one, not an array of shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{int((~np.isfinite(numbers)).sum())} of {len(numbers)} prompts have no finite number")
    return numbers
