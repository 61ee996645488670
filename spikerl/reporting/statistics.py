"""Returns over seeds and tasks as numbers with intervals (Agarwal et al., 2021, arXiv:2108.13264).

Shape legend   R repetitions of the bootstrap, S seeds, E evaluations, N scores of all tasks.
Scores of several tasks are a sequence of arrays, one (S,) per task; S may differ between tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]

REPETITIONS = 50_000
LEVEL = 0.95
LAST = 10  # evaluations, whose mean is a metric


def max_average(returns: Sequence[float]) -> float:
    """The papers' metric of a seed: the largest of its evaluations, each a mean over episodes."""
    return float(max(returns))


def last_ten_mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers[-LAST:]))


def sd(scores: Array) -> float | None:
    """Sample standard deviation; None for a single score."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def iqm(scores: Array) -> Array:
    """Interquartile mean over the last axis: a quarter of it, rounded down, is cut at each end."""
    ordered = np.sort(scores, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def bootstrap(
    tasks: Sequence[Array],
    statistic: Callable[[Array], Array],
    *,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> Interval | None:
    """95 % percentile interval of `statistic`, seeds resampled within each task.

    `statistic` maps (R, N) to (R,). None where a task has one seed: nothing is known of its spread.
    """
    if any(len(task) < 2 for task in tasks):
        return None
    rng = np.random.default_rng(seed)
    drawn_RN = np.concatenate([_resample(task, repetitions, rng) for task in tasks], axis=1)
    return _interval(statistic(drawn_RN))


def relative_interval(ours: Sequence[Array], theirs: Sequence[Array]) -> Interval | None:
    """95 % bootstrap interval of the interquartile mean of our scores relative to theirs, 1 + (x -
    b) / |b| with b the mean of theirs, both resampled within each task; None if a task has one
    seed, or a resampled b is 0, of which nothing can be a share.
    """
    if any(len(task) < 2 for task in (*ours, *theirs)):
        return None
    rng, drawn = np.random.default_rng(0), []
    for x, y in zip(ours, theirs, strict=True):
        mean_R1 = _resample(y, REPETITIONS, rng).mean(1, keepdims=True)
        if not mean_R1.all():
            return None
        drawn.append(1.0 + (_resample(x, REPETITIONS, rng) - mean_R1) / abs(mean_R1))
    return _interval(iqm(np.concatenate(drawn, axis=1)))


def _resample(task: Array, repetitions: int, rng: np.random.Generator) -> Array:
    return task[rng.integers(len(task), size=(repetitions, len(task)))]


def _interval(values_R: Array) -> Interval:
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_means(scores_SE: Array, *, repetitions: int) -> tuple[Array, Array] | None:
    """95 % intervals of the mean over seeds at each of E evaluations; None for a single seed."""
    count = len(scores_SE)
    if count < 2:
        return None
    times_RS = _times(count, repetitions, np.random.default_rng(0))
    low, high = np.quantile(
        times_RS @ scores_SE / count, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0
    )
    return low, high


def _times(count: int, repetitions: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each of `count` seeds is in a resample, (R, S)."""
    drawn_RS = rng.integers(count, size=(repetitions, count))
    return (drawn_RS[:, :, None] == np.arange(count)).sum(1)


def probability_of_improvement(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
    """P(ours > theirs) for a seed of each on one task, ties count half; the mean over tasks."""
    pairs = zip(ours, theirs, strict=True)
    return float(np.mean([_better(x, y).mean() for x, y in pairs]))


def improvement_interval(ours: Sequence[Array], theirs: Sequence[Array]) -> Interval | None:
    """95 % bootstrap interval of the probability of improvement, stratified by task and by side;
    None if a task has one seed on a side.
    """
    if any(len(task) < 2 for task in (*ours, *theirs)):
        return None
    rng = np.random.default_rng(0)
    values_R = np.zeros(REPETITIONS)
    for x, y in zip(ours, theirs, strict=True):
        mine, other = (_times(len(side), REPETITIONS, rng) for side in (x, y))
        values_R += ((mine @ _better(x, y)) * other).sum(1) / (len(x) * len(y))
    return _interval(values_R / len(ours))


def _better(ours: Array, theirs: Array) -> Array:
    """1 where ours is larger, a half where both are equal, for each pair."""
    return np.sign(ours[:, None] - theirs) / 2 + 0.5


def performance_profile(tasks: Sequence[Array], levels: Sequence[float]) -> Array:
    """For each level, the share of all runs whose score is above it."""
    scores_N = np.concatenate(list(tasks))
    return (scores_N[:, None] > np.asarray(levels)).mean(0)


def average_performance_gain(scores: Sequence[float], baseline: Sequence[float]) -> float | None:
    """APG of Proxy Target (arXiv:2505.24161) in percent: the mean over tasks of (s - b) / |b|.

    None where a baseline is 0, of which nothing can be a share.
    """
    if 0.0 in baseline:
        return None
    pairs = zip(scores, baseline, strict=True)
    return float(np.mean([100.0 * (s - b) / abs(b) for s, b in pairs]))
