"""Ratings against strengths that are known, because the votes were made from them."""

import numpy as np
import pytest

from lorafleet.core.arena.export import ratings_csv, votes_csv
from lorafleet.core.arena.ratings import MEAN_RATING, POINTS, rate, t_quantile
from lorafleet.core.arena.records import Vote

STRENGTHS = {"ink": 0.8, "plush": 0.3, "clay": -0.2, "base": -0.9}
TIE = -0.7  # eta


def simulated(
    rng: np.random.Generator, votes: int, raters: int = 20, prompts: int = 100, tastes: float = 0.0, tie: float = TIE
) -> list[Vote]:
    """Votes by Davidson's model; `tastes`: standard deviation of what raters, and prompts, add to each strength."""
    names, theta = list(STRENGTHS), np.array(list(STRENGTHS.values()))
    of_raters, of_prompts = (rng.normal(0, tastes or 1e-9, (count, len(names))) for count in (raters, prompts))
    all_prompts, all_lefts, all_lots = (rng.integers(n, size=votes) for n in (prompts, len(names), 1 << 30))
    all_rights = (all_lefts + rng.integers(1, len(names), size=votes)) % len(names)
    made = []
    for number, (prompt, left, right, lot) in enumerate(zip(all_prompts, all_lefts, all_rights, all_lots, strict=True)):
        rater = number % raters
        strengths = theta + of_raters[rater] + of_prompts[prompt]
        half = (strengths[left] - strengths[right]) / 2
        powers = np.exp([half, -half, tie])
        where = np.searchsorted(np.cumsum(powers / powers.sum())[:2], lot / (1 << 30))
        winner = (names[left], names[right], None)[where]
        clips = {name: 20 + 5 * float(strengths[at]) for at, name in enumerate(names)}
        sides = names[left], names[right]
        made.append(Vote(rater, number, "emoji", f"{prompt}", 0, *sides, winner, *(clips[each] for each in sides), 0.0))
    return made


def covered(votes: list[Vote]) -> list[bool]:
    mean = np.mean(list(STRENGTHS.values()))
    found = {each.system: each for each in rate(votes).systems}
    true = {name: MEAN_RATING + POINTS * (strength - mean) for name, strength in STRENGTHS.items()}
    return [(found[name].low or 9e9) <= true[name] <= (found[name].high or -9e9) for name in STRENGTHS]


def test_a_thousand_votes_give_the_strengths_back_within_their_intervals() -> None:
    votes = simulated(np.random.default_rng(2), 1000)
    assert all(covered(votes))
    ratings = rate(votes)
    assert [each.system for each in ratings.systems] == list(STRENGTHS)
    assert (ratings.votes, ratings.raters, ratings.prompts) == (1000, 20, 100)
    for each in ratings.systems:
        assert each.low is not None
        assert each.high is not None
        assert 10 < each.high - each.low < 160  # points; 1000 is ten times as many as says anything
        assert each.wins + each.losses + each.ties == each.votes
    assert ratings.ties == pytest.approx(np.exp(TIE) / (2 + np.exp(TIE)), abs=0.04)
    assert ratings.left_share == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("tastes", [0.0, 0.3])
def test_intervals_cover_where_votes_are_independent_and_where_raters_and_prompts_have_tastes(tastes: float) -> None:
    rng = np.random.default_rng(1)
    hits = [hit for _ in range(50) for hit in covered(simulated(rng, 200, raters=15, prompts=60, tastes=tastes))]
    assert 0.92 <= np.mean(hits) <= 0.995  # 200 of them: a standard error of 1.5 points


def test_two_systems_without_ties_get_the_odds_of_their_counts() -> None:
    votes = [Vote(n % 7, n, "emoji", f"{n}", 0, "a", "b", "a" if n % 4 else "b", None, None, 0.0) for n in range(4000)]
    better, worse = rate(votes).systems
    assert (better.system, worse.system) == ("a", "b")
    assert better.rating - worse.rating == pytest.approx(POINTS * np.log(3), rel=1e-2)
    assert (better.wins, better.losses, better.votes) == (3000, 1000, 4000)


def test_what_won_everything_and_what_was_never_compared_have_finite_ratings() -> None:
    votes = [Vote(0, n, "emoji", f"{n}", 0, "a", "b", "a", None, None, 0.0) for n in range(10)]
    votes += [Vote(1, n, "emoji", f"{n}", 0, "c", "d", None, None, None, 0.0) for n in range(10, 20)]
    found = {each.system: each for each in rate(votes).systems}
    assert found["a"].rating > found["c"].rating > found["b"].rating
    assert found["c"].rating == pytest.approx(found["d"].rating)
    assert all(np.isfinite([each.rating, each.low, each.high]).all() for each in found.values())


def test_a_single_prompt_has_no_interval_and_no_votes_no_ratings() -> None:
    (one, _) = rate([Vote(0, 0, "emoji", "p", 0, "a", "b", "a", None, None, 0.0)]).systems
    assert (one.low, one.high) == (None, None)
    assert rate([]).systems == ()


def test_clip_agrees_with_people_as_often_as_they_choose_the_higher_score() -> None:
    votes = [Vote(0, n, "emoji", f"{n}", 0, "a", "b", "b" if n < 30 else "a", 25.0, 21.0, 0.0) for n in range(100)]
    votes += [Vote(0, 100, "emoji", "tie", 0, "a", "b", None, 25.0, 21.0, 0.0)]
    votes += [Vote(0, 101, "emoji", "unscored", 0, "a", "b", "a", None, 21.0, 0.0)]
    agreement = rate(votes).clip_agreement
    assert agreement is not None
    assert (agreement.votes, agreement.rate) == (100, 0.7)
    assert (agreement.low, agreement.high) == pytest.approx((0.604, 0.781), abs=1e-3)  # Wilson, 70 of 100
    assert rate(votes[-1:]).clip_agreement is None
    assert {each.system: each.mean_clip for each in rate(votes).systems} == {"a": 25.0, "b": 21.0}


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_students_quantile_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=5e-4)


def test_csv_has_a_line_for_each() -> None:
    votes = [Vote(3, 7, "emoji", 'a "red", big\napple', 5, "a", "b", None, 25.5, None, 1.5)]
    assert votes_csv(votes) == (
        "rater,pair,pool,prompt,seed,left,right,winner,left_clip,right_clip,voted_unix_s\n"
        '3,7,emoji,"a ""red"", big\napple",5,a,b,,25.5,,1.5\n'
    )
    assert ratings_csv(rate(votes).systems).startswith("system,rating,low,high,votes,wins,losses,ties,mean_clip\n")
