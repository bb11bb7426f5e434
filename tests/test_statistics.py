"""Statistics against values worked out by hand and values recorded from rliable 1.2.0."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from pbrl.comparing import statistics as st

# Five runs on three tasks (rows: runs). rliable 1.2.0 (numpy 2, pandas 2, arch 7.2) gave the RLIABLE numbers below,
# with 50,000 bootstrap repetitions for the interquartile mean and 20,000 for the rest.
FIRST = np.array([[0.5, 0.9, 0.78], [0.23, 0.3, 0.87], [0.01, 0.82, 0.8], [0.47, 0.3, 0.28], [0.25, 0.45, 0.5]])
SECOND = np.array([[0.44, 0.8, 0.63], [0.5, 0.79, 0.17], [0.13, 0.49, 0.04], [0.03, 0.41, 0.37], [0.73, 0.5, 0.41]])
RLIABLE_IQM = {"first": (0.48666667, 0.34777778, 0.64555556), "second": (0.43555556, 0.30222222, 0.56333333)}
RLIABLE_IMPROVEMENT = (0.56666667, 0.36, 0.77333333)
RLIABLE_PROFILE = [1.0, 0.8, 0.33333333, 0.33333333, 0.0]  # of FIRST, above 0, 0.25, 0.5, 0.75, 1
RLIABLE_PROFILE_LOW = [1.0, 0.66666667, 0.13333333, 0.13333333, 0.0]
RLIABLE_PROFILE_HIGH = [1.0, 0.93333333, 0.53333333, 0.53333333, 0.0]
THRESHOLDS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])


def strata(scores: np.ndarray) -> list[np.ndarray]:
    return list(scores.T)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_interquartile_mean_cuts_a_quarter_of_the_runs_at_each_end() -> None:
    assert st.interquartile_mean(np.array([100.0, 1.0, 2.0, 3.0, -50.0])) == 2.0  # one of five at each end
    assert st.interquartile_mean(np.array([0.0, 1.0, 2.0, 9.0])) == 1.5
    assert st.interquartile_mean(np.array([0.0, 1.0, 5.0])) == 2.0  # three: nothing to cut, the mean
    np.testing.assert_array_equal(st.interquartile_mean(np.array([[1.0, 5.0], [3.0, 7.0]])), [2.0, 6.0])
    np.testing.assert_array_equal(st.interquartile_mean(np.array([[1.0, 5.0], [3.0, 7.0]]), axis=1), [3.0, 5.0])


@pytest.mark.parametrize("name, scores", [("first", FIRST), ("second", SECOND)])
def test_interquartile_mean_and_its_interval_are_those_of_rliable(name: str, scores: np.ndarray) -> None:
    point, low, high = RLIABLE_IQM[name]
    assert st.interquartile_mean(scores.ravel()) == pytest.approx(point)
    interval = st.bootstrap_interval(strata(scores), st.interquartile_mean, 20_000, rng())
    np.testing.assert_allclose(interval, (low, high), atol=0.006)


def test_probability_of_improvement_and_its_interval_are_those_of_rliable() -> None:
    point, low, high = RLIABLE_IMPROVEMENT
    assert st.probability_of_improvement(strata(FIRST), strata(SECOND)) == pytest.approx(point)
    interval = st.improvement_interval(strata(FIRST), strata(SECOND), 20_000, rng())
    np.testing.assert_allclose(interval, (low, high), atol=0.014)  # one of 75 pairs


def test_performance_profile_and_its_interval_are_those_of_rliable() -> None:
    np.testing.assert_allclose(st.performance_profile(FIRST.ravel(), THRESHOLDS), RLIABLE_PROFILE)
    low, high = st.bootstrap_interval(
        strata(FIRST), lambda scores, axis: st.performance_profile(scores, THRESHOLDS, axis), 20_000, rng()
    )
    np.testing.assert_allclose(low, RLIABLE_PROFILE_LOW, atol=0.001)
    np.testing.assert_allclose(high, RLIABLE_PROFILE_HIGH, atol=0.001)


def test_bootstrap_of_two_runs_has_the_exact_distribution() -> None:
    """Two runs 0 and 1, drawn twice with replacement, have the mean 0, ½ or 1 with chance ¼, ½ and ¼."""
    samples = st.resample([np.array([0.0, 1.0])], 40_000, rng())[0].mean(axis=1)
    values, counts = np.unique(samples, return_counts=True)
    np.testing.assert_array_equal(values, [0.0, 0.5, 1.0])
    np.testing.assert_allclose(counts / 40_000, [0.25, 0.5, 0.25], atol=0.01)


def test_bootstrap_draws_runs_of_a_task_only_from_that_task() -> None:
    drawn = st.resample([np.array([1.0, 2.0]), np.array([[10.0], [20.0], [30.0]])], 500, rng())
    assert [sample.shape for sample in drawn] == [(500, 2), (500, 3, 1)]
    assert set(drawn[0].ravel()) == {1.0, 2.0} and set(drawn[1].ravel()) == {10.0, 20.0, 30.0}
    assert len(np.unique(drawn[0], axis=0)) == len(list(product(range(2), repeat=2)))  # all combinations occur


def test_a_single_run_has_no_interval() -> None:
    low, high = st.bootstrap_interval([np.ones((1, 4)), np.ones((5, 4))], st.interquartile_mean, 100, rng())
    assert np.isnan(low).all() and np.isnan(high).all() and low.shape == (4,)
    low, _ = st.bootstrap_interval([np.ones(1)], lambda x, axis: st.performance_profile(x, THRESHOLDS, axis), 10, rng())
    assert np.isnan(low).all() and low.shape == THRESHOLDS.shape  # the shape of the statistic, not of the scores
    assert np.isnan(st.improvement_interval([np.ones(1)], [np.ones(3)], 100, rng())).all()


def test_intervals_of_samples_that_never_got_there_are_infinite_and_not_undefined() -> None:
    assert st.percentile_interval(np.array([1.0] * 50 + [np.inf] * 50)) == (1.0, np.inf)
    assert st.percentile_interval(np.full(10, np.inf)) == (np.inf, np.inf)


def test_better_share_is_mann_whitney_with_ties_half() -> None:
    assert st.better_share(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == (0.5 + 1 + 1 + 1) / 4
    for column in range(3):
        u = mannwhitneyu(FIRST[:, column], SECOND[:, column]).statistic
        assert st.better_share(FIRST[:, column], SECOND[:, column]) == pytest.approx(u / 25)


def test_probability_of_improvement_weighs_tasks_not_runs() -> None:
    first = [np.array([1.0]), np.zeros(10)]
    second = [np.array([0.0]), np.ones(10)]
    assert st.probability_of_improvement(first, second) == 0.5


def test_performance_profile_counts_runs_strictly_above() -> None:
    np.testing.assert_array_equal(
        st.performance_profile(np.array([0.0, 0.5, 1.0, 1.0]), np.array([0.5, 1.0])), [0.5, 0]
    )


def test_between_two_observations_the_last_one_holds() -> None:
    values = st.last_observation(np.array([10.0, 20.0]), np.array([1.0, 2.0]), np.array([5.0, 10.0, 19.0, 20.0, 99.0]))
    np.testing.assert_array_equal(values, [np.nan, 1.0, 1.0, 2.0, 2.0])


def test_common_grid_ends_where_the_shortest_run_ends() -> None:
    grid = st.common_grid([np.array([0.0, 10.0, 20.0, 30.0]), np.array([5.0, 15.0, 20.0])])
    np.testing.assert_array_equal(grid, [5.0, 10.0, 15.0, 20.0])
    assert len(st.common_grid([np.array([0.0, 1.0]), np.array([2.0, 3.0])])) == 0


def test_area_under_curve_is_the_mean_height() -> None:
    assert st.area_under_curve(np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 2.0])) == pytest.approx(5 / 3)
    np.testing.assert_array_equal(st.area_under_curve(np.array([7.0]), np.array([[3.0], [4.0]])), [3.0, 4.0])


def test_first_reached_is_the_first_point_at_or_above_the_level() -> None:
    curves = np.array([[0.0, 0.5, 0.4, 0.9], [0.0, 0.1, 0.2, 0.3]])
    np.testing.assert_array_equal(st.first_reached(np.array([0.0, 1.0, 2.0, 3.0]), curves, 0.5), [1.0, np.inf])
