"""Statistics: intervals that cover, tests that are exact where they can be, numbers worked by hand."""

import math

import numpy as np
import pytest

from lorafleet.eval.config import StatisticsConfig
from lorafleet.eval.statistics import (
    bootstrap_interval,
    by_prompt,
    compare,
    estimate,
    gap,
    holm,
    holm_over,
    prompts_needed,
    sign_flip_test,
)

CONFIG = StatisticsConfig(resamples=2000)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_of_a_known_effect_cover_it_as_often_as_they_say(method: str, skewed: bool) -> None:
    """1,000 evaluations of 60 prompts with 3 seeds each; the true difference is 0.5, prompts differ more than seeds."""
    generator = np.random.default_rng(11)
    prompt = np.repeat(np.arange(60), 3)
    covered = 0
    for trial in range(1000):
        of_prompts = generator.gamma(4.0, 1.0, 60) - 4.0 if skewed else generator.normal(0, 2.0, 60)
        differences = 0.5 + of_prompts[prompt] + generator.normal(0, 1.0, len(prompt))
        low, high = bootstrap_interval(
            by_prompt(differences, prompt, 60),
            resamples=600,
            seed=trial,
            method=method,  # type: ignore[arg-type]
        )
        covered += low <= 0.5 <= high
    assert 930 <= covered <= 970


def test_seeds_taken_for_prompts_would_cover_too_seldom() -> None:
    """Why values are averaged within the prompt: the same data, clustering ignored."""
    generator = np.random.default_rng(12)
    covered = 0
    for trial in range(300):
        values = np.repeat(generator.normal(0.5, 2.0, 60), 3) + generator.normal(0, 1.0, 180)
        low, high = bootstrap_interval(values, resamples=400, seed=trial)
        covered += low <= 0.5 <= high
    assert covered < 0.9 * 300


def test_a_skewed_sample_moves_the_corrected_interval_to_its_long_side() -> None:
    values = np.array([0.0] * 30 + [10.0] * 3)
    plain = bootstrap_interval(values, method="percentile")
    corrected = bootstrap_interval(values, method="bca")
    assert corrected[0] > plain[0]
    assert corrected[1] > plain[1]


def test_the_same_seed_gives_the_same_interval_and_others_nearly_so() -> None:
    values = np.random.default_rng(0).normal(size=50)
    first = bootstrap_interval(values, seed=3)
    assert first == bootstrap_interval(values, seed=3)
    assert first != bootstrap_interval(values, seed=4)
    assert first == pytest.approx(bootstrap_interval(values, seed=4), abs=0.03)


def test_degenerate_samples_claim_neither_too_much_nor_too_little() -> None:
    assert bootstrap_interval([2.0]) == (-math.inf, math.inf)
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="1 of 2 prompts have no finite number"):
        estimate([1.0, math.nan], CONFIG)
    with pytest.raises(ValueError, match="3 and 2 prompts cannot be paired"):
        compare([1, 2, 3], [1, 2], CONFIG)


def test_sign_flips_are_counted_exactly_for_few_prompts() -> None:
    assert sign_flip_test([1.0, 1.0, 1.0]) == 2 / 8
    assert sign_flip_test([1.0, -1.0]) == 1.0
    assert sign_flip_test([3.0, 1.0, 1.0, -1.0]) == 8 / 16  # 3 with at least two of three ones, and its mirror
    assert sign_flip_test([0.0] * 5) == 1.0


def test_random_sign_flips_agree_with_counted_ones() -> None:
    values = np.random.default_rng(5).normal(0.6, 1.0, 14)
    exact = sign_flip_test(values)
    random = sign_flip_test(np.append(values, 0.0), resamples=50_000)  # a zero changes no sum, but makes it 15
    assert random == pytest.approx(exact, abs=0.005)


def test_without_an_effect_p_is_uniform() -> None:
    generator = np.random.default_rng(7)
    ps = [
        sign_flip_test(generator.exponential(1.0, 30) - generator.exponential(1.0, 30), resamples=400)
        for _ in range(500)
    ]
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_tells_wins_spread_and_what_more_would_take() -> None:
    values, baseline = np.array([3.0, 5.0, 5.0, 9.0]), np.array([1.0, 5.0, 6.0, 4.0])
    found = compare(values, baseline, CONFIG)
    assert found.difference.mean == 1.5
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.win_rate == 2.5 / 4
    assert found.prompts_needed == prompts_needed(np.std([2, 0, -1, 5], ddof=1), 0.5)
    pair = holm_over([found, found])
    assert [each.p_holm for each in pair] == [min(1.0, 2 * found.p)] * 2


def test_the_sizes_that_the_reports_spread_would_need() -> None:
    """Differences of SDXL's CLIP scores spread by about 2.5 points."""
    assert prompts_needed(2.5, 0.5) == 197
    assert prompts_needed(2.5, 0.3) == 546
    assert prompts_needed(0.0, 0.5) == 2
    with pytest.raises(ValueError, match="above 0"):
        prompts_needed(1.0, 0.0)


def test_as_many_prompts_as_said_find_the_difference_as_often_as_said() -> None:
    generator, n = np.random.default_rng(9), prompts_needed(2.5, 1.0)
    found = sum(sign_flip_test(generator.normal(1.0, 2.5, n), resamples=400) < 0.05 for _ in range(400))
    assert found / 400 == pytest.approx(0.8, abs=0.06)


def test_a_gap_between_groups_of_prompts_is_found_only_if_there_is_one() -> None:
    generator = np.random.default_rng(3)
    trained, held_out = generator.normal(2.0, 1.0, 80), generator.normal(0.0, 1.0, 60)
    found = gap(trained, held_out, CONFIG)
    assert found.low > 1.0
    assert found.high < 3.0
    assert gap(held_out, generator.normal(0.0, 1.0, 60), CONFIG).low < 0


def test_seeds_are_averaged_within_the_prompt() -> None:
    means = by_prompt([1.0, 3.0, 10.0], [0, 0, 2], 3)
    assert means[0] == 2.0
    assert means[2] == 10.0
    assert math.isnan(means[1])
