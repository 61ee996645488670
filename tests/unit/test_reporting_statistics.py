"""Statistics against numbers that were worked by hand, or published."""

from __future__ import annotations

import numpy as np
import pytest

from spikerl.reporting import statistics as s


def array(*values: float) -> s.Array:
    return np.array(values, dtype=np.float64)


def mean(scores: s.Array) -> s.Array:
    return scores.mean(-1)


def test_of_one_seed() -> None:
    returns = [9.0, *range(1, 13)]
    assert s.max_average(returns) == 12.0
    assert s.last_ten_mean(returns) == 7.5  # of 3 to 12
    assert s.last_ten_mean([1.0, 2.0]) == 1.5
    assert s.sd(array(1.0, 2.0, 3.0, 4.0)) == pytest.approx(np.sqrt(5.0 / 3.0))
    assert s.sd(array(1.0)) is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 2.0, 30.0], 11.0),  # a quarter of three values rounds to none
        ([100.0, 1.0, 2.0, -50.0], 1.5),
        ([0.0, 10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 99.0], 3.5),  # the mean of 2, 3, 4, 5
    ],
)
def test_iqm(scores: list[float], expected: float) -> None:
    assert s.iqm(array(*scores)) == expected
    assert s.iqm(np.array([scores, scores])).tolist() == [expected, expected]


def test_bootstrap_is_the_binomial() -> None:
    """Ten draws from 0 and 1: P(at most 1) = 0.011 and P(at most 2) = 0.055, so 0.2 to 0.8."""
    scores = array(*[0.0] * 5, *[1.0] * 5)
    assert s.bootstrap([scores], mean) == (0.2, 0.8)
    assert s.bootstrap([scores * 100 + 7], mean) == (27.0, 87.0)


def test_bootstrap_draws_within_a_task() -> None:
    zeros, ones = array(0.0, 0.0, 0.0), array(1.0, 1.0, 1.0)
    assert s.bootstrap([zeros, ones], mean) == (0.5, 0.5)
    low, high = s.bootstrap([np.concatenate([zeros, ones])], mean) or (0.0, 0.0)
    assert [low, high] == pytest.approx([1 / 6, 5 / 6])  # pooled scores vary


def test_bootstrap_is_seeded() -> None:
    scores = np.random.default_rng(3).normal(size=7)
    first = s.bootstrap([scores], s.iqm)
    np.random.seed(5)  # the global generator is not used
    assert s.bootstrap([scores], s.iqm) == first
    assert s.bootstrap([scores], s.iqm, repetitions=1000, seed=1) != s.bootstrap(
        [scores], s.iqm, repetitions=1000, seed=2
    )


def test_one_seed_has_no_interval() -> None:
    one = [array(3.0), array(4.0)]
    assert s.bootstrap(one, mean) is None
    assert s.improvement_interval(one, one) is None
    assert s.bootstrap_means(np.ones((1, 5)), repetitions=10) is None


def test_one_seed_among_several_leaves_no_interval() -> None:
    """Bootstrapping a single seed always draws the same score, as if it were certain."""
    two, one = array(1.0, 2.0), array(3.0)
    assert s.bootstrap([two, one], mean) is None
    assert s.improvement_interval([two, one], [two, two]) is None
    assert s.improvement_interval([two, two], [two, one]) is None
    assert s.improvement_interval([two], [two]) is not None


def test_intervals_of_curves() -> None:
    scores = np.array([[0.0, 2.0]] * 5 + [[1.0, 2.0]] * 5)
    low, high = s.bootstrap_means(scores, repetitions=s.REPETITIONS) or (None, None)
    assert low is not None
    assert high is not None
    assert (low.tolist(), high.tolist()) == ([0.2, 2.0], [0.8, 2.0])


def test_probability_of_improvement() -> None:
    ours, theirs = array(1.0, 3.0), array(0.0, 1.0, 2.0)
    # 1 beats 0 and ties with 1: 1.5 of 3. 3 beats all 3. Together 4.5 of 6.
    assert s.probability_of_improvement([ours], [theirs]) == 0.75
    assert s.probability_of_improvement([theirs], [ours]) == 0.25
    assert s.probability_of_improvement([ours, array(0.0)], [theirs, array(9.0)]) == 0.375
    low, high = s.improvement_interval([ours], [theirs]) or (0.0, 0.0)
    # Both of ours are 1 in a quarter of the draws, all of theirs at least 1 in 8 of 27.
    assert 0.0 < low < 0.5
    assert high == 1.0


def test_performance_profile() -> None:
    tasks = [array(0.1, 0.5), array(0.5, 0.9)]
    assert s.performance_profile(tasks, [0.0, 0.1, 0.5, 0.8, 0.9]).tolist() == [
        1.0, 0.75, 0.25, 0.25, 0.0,
    ]  # fmt: skip


# Returns of Proxy Target, Table 1: InvertedDoublePendulum, Ant, HalfCheetah, Hopper, Walker2d.
ANN = [7503, 4770, 10857, 3410, 4340]


@pytest.mark.parametrize(
    ("scores", "published", "without_first"),
    [
        ([9348, 5383, 10103, 3385, 4314], 5.84, 1.14),
        ([9351, 5014, 9663, 3526, 4564], 5.46, 0.67),
        ([9350, 5400, 9347, 3507, 4277], 5.06, 0.17),
        ([9351, 4590, 9594, 2772, 3307], -6.66, -14.5),
        (ANN, 0.0, 0.0),
    ],
)
def test_average_performance_gain(
    scores: list[float], published: float, without_first: float
) -> None:
    assert s.average_performance_gain(scores, ANN) == pytest.approx(published, abs=0.011)
    gain = s.average_performance_gain(scores[1:], ANN[1:])
    assert gain == pytest.approx(without_first, abs=0.05)


def test_gain_over_a_negative_baseline() -> None:
    assert s.average_performance_gain([-50.0], [-100.0]) == 50.0


def test_no_gain_over_a_baseline_of_zero() -> None:
    assert s.average_performance_gain([1.0, 2.0], [1.0, 0.0]) is None


def test_an_interval_has_95_percent() -> None:
    """Eight draws from 0 and 1: P(0) = 0.004, P(at most 1) = 0.035; 90 % would begin at 2 / 8."""
    assert s.bootstrap([array(*[0.0] * 4, *[1.0] * 4)], mean) == (0.125, 0.875)


def test_the_baselines_mean_is_drawn_anew() -> None:
    """Draws from 1 and 3 have the mean 1, 2 or 3 with probabilities 1/4, 1/2, 1/4; 2 relative to it
    is 2 / 1, 2 / 2 or 2 / 3. Below 0, -2 is better than -3 by a third, and worse than -1 by 1.
    """
    both, low = array(2.0, 2.0), 1.0 - 1.0 / 3.0
    assert s.relative_interval([both], [array(1.0, 3.0)]) == pytest.approx((low, 2.0))
    below = s.relative_interval([-both], [array(-1.0, -3.0)])
    assert below == pytest.approx((0.0, 1.0 + 1.0 / 3.0))
    assert s.relative_interval([both], [array(1.0)]) is None


def test_no_interval_over_a_mean_that_may_be_zero() -> None:
    """Both draws from 0 and 4 are 0 with probability 1/4, and nothing can be relative to 0."""
    assert s.relative_interval([array(1.0, 2.0)], [array(0.0, 4.0)]) is None
    assert s.relative_interval([array(1.0, 2.0)], [array(-1.0, 1.0)]) is None
    both = [array(1.0, 2.0)] * 2
    assert s.relative_interval(both, [array(1.0, 3.0), array(0.0, 4.0)]) is None
