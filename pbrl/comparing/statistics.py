"""Statistics over few seeds: pure functions on arrays of run scores.

Point estimates are those of Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice"
(NeurIPS 2021), with the semantics of their package `rliable` 1.2.0, whose recorded numbers the tests hold. (`rliable`
itself does not import with pandas 3 and brings 485 MB.) Its bootstrap intervals are for ten runs and more; below that
they cover far less than they say, and Student's t and score intervals take their place (see `Estimator`).

Scores of one method are *strata*: one array per task, whose first axis is the runs (seeds) on that task. The numbers
of runs may differ between tasks; further axes (the points of a curve) are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.optimize import brentq
from scipy.stats import norm, trim_mean
from scipy.stats import t as student_t

Array = NDArray[np.float64]
CONFIDENCE = 0.95  # of every interval
FEW = 10  # runs of a method on a task, below which a bootstrap is not to be trusted


def interquartile_mean(scores: Array, axis: int = 0) -> Array:
    """Mean of the middle half of the runs: a quarter of the runs (rounded down) is cut off at each end.

    Args:
        scores: float [..., runs, ...], the runs on `axis`. Runs of several tasks are pooled on that axis first.

    Returns:
        The same shape without `axis`. With three runs or fewer this is the plain mean.
    """
    return np.asarray(trim_mean(scores, 0.25, axis=axis), dtype=np.float64)


def mean(scores: Array, axis: int = 0) -> Array:
    """Mean over the runs, which are on `axis`."""
    return np.asarray(np.mean(scores, axis=axis), dtype=np.float64)


def student_interval(strata: Sequence[Array]) -> tuple[Array, Array]:
    """95 % interval of the mean of all runs, from Student's t: low and high, each [...].

        m ± t √v,   v = Σ_k v_k,   v_k = w_k² s_k² / n_k,   w_k = n_k / Σ n,   degrees of freedom v²/Σ_k v_k²/(n_k − 1)

    s_k is the standard deviation of the n_k runs on task k (Welch 1947; with one task it is the interval of every
    textbook). With three runs of a normal score it covers the truth 95 times in 100; a bootstrap's percentiles do 74
    times.

    NaN where a task has a single run, and where all runs are equal: what they have not shown cannot be estimated.
    """
    total = sum(len(stratum) for stratum in strata)
    pooled = np.concatenate(list(strata))
    missing = np.full(pooled.shape[1:], np.nan)
    if min(len(stratum) for stratum in strata) < 2:
        return missing, missing
    parts = np.stack([len(x) / total**2 * x.var(axis=0, ddof=1) for x in strata])
    degrees = np.array([len(x) - 1 for x in strata]).reshape(-1, *[1] * (parts.ndim - 1))
    variance = parts.sum(axis=0)
    spread = variance > 1e-24 * np.maximum(pooled.mean(axis=0) ** 2, np.finfo(np.float64).tiny)  # else: rounding
    freedom = np.divide(variance**2, (parts**2 / degrees).sum(axis=0), out=missing.copy(), where=spread)
    half = np.where(spread, student_t.ppf(0.5 + CONFIDENCE / 2, freedom) * np.sqrt(variance), np.nan)
    return pooled.mean(axis=0) - half, pooled.mean(axis=0) + half


def bootstrap_interval(strata: Sequence[Array], repetitions: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """95 % percentile interval of the interquartile mean of all runs over stratified bootstrap samples.

    For ten runs a task and more: with three it covers the truth 74 times in 100. NaN if a task has a single run.
    """
    if min(len(stratum) for stratum in strata) < 2:
        missing = np.full_like(interquartile_mean(np.concatenate(list(strata))), np.nan)
        return missing, missing
    samples = interquartile_mean(np.concatenate(resample(strata, repetitions, rng), axis=1), axis=1)
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)


def resample(strata: Sequence[Array], repetitions: int, rng: np.random.Generator) -> list[Array]:
    """Stratified bootstrap samples: runs drawn with replacement within each task, never across tasks.

    Args:
        strata: per task, float [runs, ...].

    Returns:
        Per task, float [repetitions, runs, ...].
    """
    return [stratum[rng.integers(0, len(stratum), size=(repetitions, len(stratum)))] for stratum in strata]


@dataclass(frozen=True)
class Estimator:
    """What stands for a method's runs, and its interval: decided once per comparison, by its fewest runs.

    Attributes:
        many: FEW runs or more of every method on every task: the interquartile mean and a bootstrap (Agarwal et al.);
            else the mean and Student's t, for a bootstrap of so few runs covers too little.
    """

    many: bool
    repetitions: int = 2000

    @property
    def name(self) -> str:
        return "interquartile mean, bootstrap" if self.many else "mean, Student's t"

    def point(self, scores: Array, axis: int = 0) -> Array:
        """One value for the runs on `axis`."""
        return interquartile_mean(scores, axis) if self.many else mean(scores, axis)

    def interval(self, strata: Sequence[Array], rng: np.random.Generator) -> tuple[Array, Array]:
        """Low and high end of its 95 % interval; NaN where there is none."""
        return bootstrap_interval(strata, self.repetitions, rng) if self.many else student_interval(strata)


def better_share(first: Array, second: Array) -> Array:
    """P(first > second) + P(first = second) / 2 over all pairs of runs: the Mann–Whitney U statistic over n·m.

    Args:
        first: float [..., n]; second: float [..., m], with the same leading axes.

    Returns:
        float [...], between 0 and 1.
    """
    first, second = first[..., :, None], second[..., None, :]
    return np.asarray(((first > second) + 0.5 * (first == second)).mean(axis=(-2, -1)))


def probability_of_improvement(first: Sequence[Array], second: Sequence[Array]) -> float:
    """How likely a run of the first method beats one of the second on a task drawn at random.

    Args:
        first, second: per task (the same tasks in the same order), float [runs].

    Raises:
        ValueError: if the numbers of tasks differ.
    """
    return float(np.mean([better_share(x, y) for x, y in zip(first, second, strict=True)]))


def improvement_interval(first: Sequence[Array], second: Sequence[Array]) -> tuple[float, float]:
    """95 % interval of `probability_of_improvement`, by inverting a score test.

        |θ̂ − θ| = t √(Σ_k V_k(θ)) / K,   V_k(θ) = θ(1−θ) [1 + N_k ((1−θ)/(2−θ) + θ/(1+θ))] / (n_k m_k)

    with n_k and m_k runs on task k of K and N_k = (n_k + m_k)/2 − 1 (Newcombe 2006, Statistics in Medicine 25:559,
    method 5; the sum over tasks and Student's t with Σ (n_k + m_k − 2) degrees of freedom in the place of z are ours).
    It holds where resampling cannot: three runs that all beat three others give [0.34, 1], which contains the 0.5 that
    a permutation test with its p of 0.1 does not exclude; a bootstrap gives [1, 1].

    NaN for both ends if a task has a single run of either method.
    """
    sizes = [(len(x), len(y)) for x, y in zip(first, second, strict=True)]
    if min(min(pair) for pair in sizes) < 2:
        return math.nan, math.nan
    point = probability_of_improvement(first, second)
    quantile = float(student_t.ppf(0.5 + CONFIDENCE / 2, sum(n + m - 2 for n, m in sizes)))

    def excess(theta: float) -> float:
        shape = (1 - theta) / (2 - theta) + theta / (1 + theta)
        variance = sum(theta * (1 - theta) * (1 + ((n + m) / 2 - 1) * shape) / (n * m) for n, m in sizes)
        return abs(point - theta) - quantile * math.sqrt(variance) / len(sizes)

    low = 0.0 if point == 0 else float(brentq(excess, 0, min(point, 1 - 1e-12)))
    high = 1.0 if point == 1 else float(brentq(excess, max(point, 1e-12), 1))
    return low, high


def share_interval(share: Array, count: int) -> tuple[Array, Array]:
    """95 % interval of a share of `count` runs (Wilson 1927), each [...]; it has a width also at 0 and 1."""
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def performance_profile(scores: Array, thresholds: Array, axis: int = 0) -> Array:
    """The share of runs (on `axis`) whose score is above each threshold; the thresholds become the last axis."""
    return np.asarray((np.asarray(scores)[..., None] > thresholds).mean(axis=axis))


def last_observation(steps: Array, values: Array, grid: Array) -> Array:
    """The value observed last at or before each grid point, NaN before the first observation.

    Args:
        steps: strictly increasing, float [n]; values: float [n]; grid: float [g].

    A step function invents no value between two observations, and runs evaluated at the same steps are left as they
    are. Points after the last step repeat the last value: the caller cuts the grid where that is not meant.
    """
    index = np.searchsorted(steps, grid, side="right") - 1
    return np.where(index >= 0, values[np.maximum(index, 0)], np.nan)


def common_grid(axes: Sequence[Array]) -> Array:
    """All points of the given axes that every one of them covers: from the latest start to the earliest end.

    Empty if they do not overlap.
    """
    low, high = max(axis[0] for axis in axes), min(axis[-1] for axis in axes)
    points = np.unique(np.concatenate(list(axes)))
    return points[(points >= low) & (points <= high)]


def area_under_curve(steps: Array, values: Array) -> Array:
    """Mean height of the curve over its steps: the trapezoidal area divided by the width, in the unit of `values`.

    Args:
        steps: increasing, float [n]; values: float [..., n].

    Returns:
        float [...]. With a single point, its height.
    """
    if len(steps) == 1:
        return np.asarray(values[..., 0])
    return np.asarray(trapezoid(values, steps, axis=-1) / (steps[-1] - steps[0]))


def first_reached(steps: Array, values: Array, level: float) -> Array:
    """The first of `steps` [n] at which `values` [..., n] is at least `level`; infinity where it never is."""
    reached = values >= level
    return np.where(reached.any(axis=-1), steps[reached.argmax(axis=-1)], np.inf)
