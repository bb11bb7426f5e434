"""Statistics over few seeds: pure functions on arrays of run scores.

Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice" (NeurIPS 2021), with the
semantics of their package `rliable` 1.2.0, whose recorded numbers the tests hold. (`rliable` itself does not import
with pandas 3 and brings 485 MB.)

Scores of one method are *strata*: one array per task, whose first axis is the runs (seeds) on that task. The numbers
of runs may differ between tasks; further axes (the points of a curve) are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.stats import trim_mean

Array = NDArray[np.float64]


def interquartile_mean(scores: Array, axis: int = 0) -> Array:
    """Mean of the middle half of the runs: a quarter of the runs (rounded down) is cut off at each end.

    Args:
        scores: float [..., runs, ...], the runs on `axis`. Runs of several tasks are pooled on that axis first.

    Returns:
        The same shape without `axis`. With three runs or fewer this is the plain mean.
    """
    return np.asarray(trim_mean(scores, 0.25, axis=axis), dtype=np.float64)


def resample(strata: Sequence[Array], repetitions: int, rng: np.random.Generator) -> list[Array]:
    """Stratified bootstrap samples: runs drawn with replacement within each task, never across tasks.

    Args:
        strata: per task, float [runs, ...].

    Returns:
        Per task, float [repetitions, runs, ...].
    """
    return [stratum[rng.integers(0, len(stratum), size=(repetitions, len(stratum)))] for stratum in strata]


def percentile_interval(samples: Array, confidence: float = 0.95) -> tuple[Array, Array]:
    """The central interval of bootstrap samples [repetitions, ...]: low and high, each [...].

    Ends are actual samples, not interpolated between two, so that infinite samples ("never reached") are allowed.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)


def bootstrap_interval(
    strata: Sequence[Array],
    statistic: Callable[[Array, int], Array],
    repetitions: int,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> tuple[Array, Array]:
    """Percentile interval of `statistic(pooled runs, axis)` over stratified bootstrap samples.

    Returns NaN for both ends if a task has a single run: resampling one run cannot show its spread.
    """
    if min(len(stratum) for stratum in strata) < 2:
        missing = np.full_like(statistic(np.concatenate(list(strata)), 0), np.nan)
        return missing, missing
    pooled = np.concatenate(resample(strata, repetitions, rng), axis=1)
    return percentile_interval(statistic(pooled, 1), confidence)


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


def improvement_interval(
    first: Sequence[Array], second: Sequence[Array], repetitions: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95 % interval of `probability_of_improvement`, both methods' runs resampled within each task.

    NaN for both ends if a task has a single run of either method.
    """
    if min(len(stratum) for stratum in (*first, *second)) < 2:
        return float("nan"), float("nan")
    pairs = zip(resample(first, repetitions, rng), resample(second, repetitions, rng), strict=True)
    low, high = percentile_interval(np.mean([better_share(x, y) for x, y in pairs], axis=0))
    return float(low), float(high)


def performance_profile(scores: Array, thresholds: Array, axis: int = 0) -> Array:
    """The share of runs (on `axis`) whose score is above each threshold; the thresholds become the last axis."""
    return np.asarray((np.asarray(scores)[..., None] > thresholds).mean(axis=axis))


def last_observation(steps: Array, values: Array, grid: Array) -> Array:
    """The value observed last at or before each grid point, NaN before the first observation.

    Args:
        steps: strictly increasing, float [n]; values: float [n]; grid: float [g].

    A step function invents no value between two observations, and runs evaluated at the same steps are left as they
    are. Points after the last step repeat the last value: the caller cuts the grid where the shortest run ends.
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
