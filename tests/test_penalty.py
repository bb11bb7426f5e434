"""The penalty method on robots: PEBBLE where sigma is 0, right where the truth is known, and never unsafe."""

import math

import numpy as np
import pytest
import torch

from pbrl.bilevel.params import combine, cosine, flatten, norm
from pbrl.reward import RewardEnsemble
from pbrl.second_term.fresh import cut
from pbrl.second_term.penalty import bracket, climb, discounted_steps, divergence_from, draw
from tests.conftest import finish, option, tiny_loop
from tests.gaussian_problem import ALPHA, STEPS, B, GaussianSession, assert_unbiased, exact_terms, quadratic_reward

FEW = {"fit": {"epochs": 3, "least_steps": 0}}
SHORT = {"steps": 5, "trajectory_length": STEPS, "states": 4, "rollout_steps": 64}


def penalty(**changes):
    return option("updater", "penalty", **changes)


def pebble(**changes):
    return option("updater", "pebble", **changes)


def weights_after(updater, sessions=1):
    reward = RewardEnsemble(2, 1, members=3, hidden=(8, 8), activation="silu")
    session = GaussianSession(0)
    for _ in range(sessions):
        metrics = updater.update(reward, session.preferences(), session)
    return flatten(dict(reward.named_parameters())), metrics, session


def test_with_sigma_0_it_equals_pebble_bit_for_bit():
    ours, metrics, session = weights_after(penalty(**FEW, sigma=0.0))
    theirs, *_ = weights_after(pebble(**FEW, pairs="fresh"))
    np.testing.assert_array_equal(ours, theirs)
    assert session.rolled == 0 and not any(key.startswith("penalty/") for key in metrics)


@pytest.mark.parametrize("twin", [True, False])
def test_its_rollouts_take_the_steps_that_were_asked_for(twin):
    walk = SHORT | {"steps": 2, "twin": twin}
    _, metrics, session = weights_after(penalty(**FEW, walk=walk, gate="off"))
    assert session.rolled == 64
    assert metrics["penalty/applied"] == 1 and metrics["penalty/scale"] > 0


@pytest.mark.parametrize("side", ["penalised", "present"])
def test_the_bracket_is_the_difference_of_the_values_gradients_over_sigma(side):
    """For policies fixed in advance: ∂V/∂A_h = E a_h, ∂V/∂B_h = −½ E a_h²."""
    sigma, reward = 0.5, quadratic_reward()

    def moments(theta):
        mean, variance = theta["mean"].numpy(), np.exp(2 * theta["log_std"].numpy())
        return np.concatenate([mean, -0.5 * (mean**2 + variance)])

    samples = []
    for seed in range(30):
        session = GaussianSession(seed)
        theta = session.policy.theta
        moved = {name: value + 0.5 for name, value in theta.items()}
        here, there = (cut(session.rollout(t, 400), STEPS) for t in (theta, moved))
        rows = bracket(here, there, 0, 1.0, sigma) if side == "penalised" else bracket(there, here, 0, 1.0, sigma)
        assert rows.weights[1].abs().sum() == 0
        samples.append(flatten(rows.gradients(reward, rows.weights[0])))
    truth = (moments(moved) - moments(theta)) / sigma
    assert_unbiased(samples, truth if side == "penalised" else -truth)


def test_a_constant_reward_has_no_bracket_however_the_episodes_were_cut():
    long, short = GaussianSession(0), GaussianSession(1)
    whole, halves = cut(long.fresh(), STEPS), cut(short.fresh(), 1)
    rows = bracket(whole, halves, 1, 0.9, 0.3)
    assert float(rows.weights.sum()) == pytest.approx(0.0, abs=1e-4)
    assert discounted_steps(0.9, 2) == pytest.approx(1.9)


@pytest.mark.slow
def test_the_second_actor_finds_the_penalised_optimum_and_the_hypergradient_with_it():
    """G's score function by quadrature-sized data; the bracket's error is O(sigma), 0.2 here, plus the walk's.

    Both walks take the same steps, so what remains is: cosine to the exact Term 2 above 0.9.
    """
    session, reward, sigma = GaussianSession(0, 20_000), quadratic_reward(), 0.2
    walk = SHORT | {"steps": 300, "scale": 0.2, "states": 256}
    updater = penalty(sigma=sigma, walk=walk)
    found = {}

    def keep(policies, half, session):
        found[half] = policies
        return [cut(session.fresh()[:4], STEPS)] * 2

    updater._roll = keep
    updater.second_term(reward, session.preferences(), session)

    def value_gradient(theta):
        mean, variance = theta["mean"], (2 * theta["log_std"]).exp()
        return torch.cat([mean, -0.5 * (mean**2 + variance)]).numpy()

    _, truth = exact_terms("preference")
    for half in (0, 1):
        twin, theta_sigma = found[half]
        term = (value_gradient(theta_sigma) - value_gradient(twin)) / sigma
        assert term @ truth.numpy() / (np.linalg.norm(term) * np.linalg.norm(truth)) > 0.9


def test_twins_of_one_walk_without_an_upper_objective_are_the_same():
    session, walk = GaussianSession(0), penalty(walk=SHORT).walk
    draws = draw(walk, session, 1, torch.device("cpu"))
    first, second = (climb(walk, session.policy, draws, None) for _ in range(2))
    assert norm(combine(first, second, -1.0)) == 0
    assert norm(combine(first, session.policy.theta, -1.0)) > 0


def test_a_divergence_holds_the_second_actor_near_its_reference():
    session, walk = GaussianSession(0), penalty(walk=SHORT).walk
    reference, draws = session.policy.parameters(), draw(walk, session, 1, torch.device("cpu"))

    def upper(theta):
        return 10 * theta["mean"].sum()

    def drift(divergence):
        return norm(combine(climb(walk, session.policy, draws, upper, divergence), reference, -1.0))

    assert drift(divergence_from(reference, session.policy, 1e3)) < drift(None)


def test_the_divergence_is_the_gaussians_kl():
    """Equal widths: ½ (difference of means)² / variance, here with variance alpha / B."""
    session = GaussianSession(0)
    theta, policy = session.policy.parameters(), session.policy
    moved = {**theta, "mean": theta["mean"] + 0.3}
    value = divergence_from(theta, policy, 2.0)(moved, torch.eye(STEPS))
    assert float(value) == pytest.approx(2.0 * float((0.5 * 0.3**2 * B / ALPHA).mean()), rel=1e-5)


@pytest.mark.parametrize("reference", ["initial", "pretrained"])
def test_its_state_resumes_exactly(reference, tmp_path):
    options = {**FEW, "walk": SHORT, "reference": reference, "gate": "off", "sigma_decay": 0.5}
    straight, cut_short, resumed = (penalty(**options) for _ in range(3))
    for updater in (straight, cut_short):
        updater.start(GaussianSession(9))
    expected, metrics, _ = weights_after(straight, sessions=3)
    reward = RewardEnsemble(2, 1, members=3, hidden=(8, 8), activation="silu")
    session = GaussianSession(0)
    for _ in range(2):
        cut_short.update(reward, session.preferences(), session)
    torch.save(cut_short.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.update(reward, session.preferences(), session) == pytest.approx(metrics, nan_ok=True)
    np.testing.assert_array_equal(flatten(dict(reward.named_parameters())), expected)
    assert metrics["penalty/sigma"] == 0.25


def test_a_walk_that_meets_nan_falls_back_to_term_1_and_is_counted(monkeypatch):
    updater = penalty(**FEW, walk=SHORT, gate="off", clip=math.inf)

    def poisoned(self, theta, obs, noise):
        return theta["mean"].sum() * math.nan

    monkeypatch.setattr("tests.gaussian_problem.GaussianPolicy.objective", poisoned)
    ours, metrics, _ = weights_after(updater)
    assert metrics["penalty/fallbacks"] == 1 and np.isfinite(ours).all()


@pytest.mark.parametrize("wrong", [{"reference": "mine"}, {"sigma": -1.0}, {"sigma_decay": 0.0}, {"upper": "x"}])
def test_options_that_cannot_work_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        penalty(**wrong)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"scale": 0.0}, {"rollout_steps": 1}])
def test_a_walk_that_cannot_work_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        penalty(walk=wrong)


def test_the_halves_are_estimated_from_different_labels():
    """Two walks on disjoint labels do not end at the same policy."""
    session, reward = GaussianSession(0), quadratic_reward()
    updater, found = penalty(walk=SHORT, sigma=10.0), {}
    roll = updater._roll

    def keep(policies, half, session):
        found[half] = policies[-1]
        return roll(policies, half, session)

    updater._roll = keep
    updater.second_term(reward, session.preferences(), session)
    moves = [combine(found[half], session.policy.theta, -1.0) for half in (0, 1)]
    assert abs(cosine(*moves)) < 0.999


@pytest.mark.parametrize(
    "overrides",
    [[], pytest.param(["updater.gate=off", "updater.clip=.inf"], marks=pytest.mark.slow)],
    ids=["default", "raw"],
)
def test_it_runs_end_to_end(overrides, tmp_path):
    small = ["feedback.fresh_steps=200", "updater.walk.rollout_steps=100", "checkpoint_every=150"]
    loop = tiny_loop(tmp_path / "run", "updater=penalty", *small, *overrides)
    summary = finish(loop)
    assert summary["complete"] and "penalty/fallbacks" in summary
    assert all(p.isfinite().all() for p in loop.parts.reward.parameters())
