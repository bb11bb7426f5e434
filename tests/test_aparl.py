"""A-PARL on robots: PEBBLE where its Term 2 is off, right where the truth is known, and never unsafe."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.second_term.opening import cosines
from pbrl.bilevel.params import flatten, norm
from pbrl.preferences import Preferences
from pbrl.reed import DynamicsAwareReward
from pbrl.reward import RewardEnsemble
from pbrl.second_term import estimators
from pbrl.second_term.fresh import cut, divide, training_rows
from pbrl.second_term.gate import Gate, as_gate, as_limit
from pbrl.second_term.guard import Estimate, Safeguard, SecondTerm, WeightedRows, groups
from pbrl.second_term.upper import pair_scores
from pbrl.types import Answer, Query, Segments
from tests.conftest import PaidMean, finish, option, tiny_loop
from tests.gaussian_problem import GaussianSession, assert_unbiased, exact_terms, quadratic_reward

FEW = {"fit": {"epochs": 3, "least_steps": 0}}
ONCE = {"fit": {"epochs": 1, "least_steps": 0}}
EXACT = {"trajectory_length": 2, "damping": 0.0, "tol": 1e-4}
OFF = {"estimator": "off"}


def aparl(**changes):
    return option("updater", "aparl", **changes)


def pebble(**changes):
    return option("updater", "pebble", **changes)


def ensemble(seed=0):
    return RewardEnsemble(2, 1, members=3, hidden=(8, 8), activation="silu", seed=seed)


def weights_after(updater, seed=0, sessions=1):
    """The reward's parameters after updates on one data set, float64 [D]; and the last metrics."""
    reward = ensemble()
    session = GaussianSession(seed)
    for _ in range(sessions):
        metrics = updater.update(reward, session.preferences(), session)
    return flatten(dict(reward.named_parameters())), metrics


# ------------------------------------------------------------------------------------------------ PEBBLE


def test_with_its_second_term_off_it_equals_pebble_bit_for_bit():
    ours, _ = weights_after(aparl(**FEW, implicit=OFF))
    theirs, _ = weights_after(pebble(**FEW, pairs="fresh"))
    np.testing.assert_array_equal(ours, theirs)


def test_behind_a_closed_gate_it_equals_pebble_bit_for_bit():
    ours, metrics = weights_after(aparl(**FEW, implicit=EXACT, gate={"error": 1e-6}))
    theirs, _ = weights_after(pebble(**FEW, pairs="fresh"))
    np.testing.assert_array_equal(ours, theirs)
    assert metrics["aparl/usable"] == 1 and metrics["aparl/applied"] == 0


def test_with_the_gate_off_its_second_term_changes_the_reward():
    ours, metrics = weights_after(aparl(**FEW, implicit=EXACT, gate="off"))
    theirs, _ = weights_after(pebble(**FEW, pairs="fresh"))
    assert metrics["aparl/applied"] == 1 and not np.array_equal(ours, theirs)


def test_earlier_answers_stay_in_the_data_with_the_share_asked_for():
    rng = np.random.default_rng(0)
    new = torch.arange(100) >= 80
    np.testing.assert_array_equal(training_rows(new, None, rng), np.arange(100))
    np.testing.assert_array_equal(training_rows(new, 0.0, rng), np.arange(80, 100))
    rows = training_rows(new, 0.5, rng)
    assert len(set(rows)) == 40 and (rows >= 80).sum() == 20
    assert len(training_rows(torch.arange(25) >= 5, 0.5, rng)) == 25  # as many as there are


# ------------------------------------------------------------------------------------------------ the truth


def second_term(reward, updater, session):
    """The whole Term 2 in (A, B)."""
    estimate = updater.second_term(reward, session.preferences(), session)
    assert estimate.converged and estimate.rows is not None
    return flatten(estimate.rows.gradients(reward, estimate.rows.weights.mean(0)))


@pytest.mark.parametrize(
    ("upper", "implicit", "episodes"),
    [
        ("preference", EXACT, 600),
        ("preference", {"estimator": "covariance"} | EXACT, 600),
        ("win_rate", EXACT, 600),
    ],
    ids=["fisher", "covariance", "win-rate"],
)
def test_the_estimates_are_unbiased_at_the_soft_optimum(upper, implicit, episodes):
    updater, reward = aparl(upper=upper, implicit=implicit), quadratic_reward()
    _, truth = exact_terms(upper)
    samples = [second_term(reward, updater, GaussianSession(seed, episodes)) for seed in range(30)]
    assert_unbiased(samples, truth.numpy())


def test_the_full_hessian_agrees_with_the_fisher_matrix_at_the_soft_optimum():
    """Their expectations are equal there; 4000 episodes leave an error of some per cent (4 parameters)."""
    reward, session = quadratic_reward(), GaussianSession(0, 4000)
    found = {
        name: second_term(reward, aparl(implicit=EXACT | {"estimator": name, "states": 10**6, "tol": 1e-3}), session)
        for name in ("fisher", "full")
    }
    assert np.linalg.norm(found["full"] - found["fisher"]) < 0.3 * np.linalg.norm(found["fisher"])


@pytest.mark.slow
def test_the_two_halves_are_independent():
    """Their covariance over data sets is zero within 4.5 standard errors; shared scores would make it positive."""
    updater, reward = aparl(implicit=EXACT), quadratic_reward()
    halves = []
    for seed in range(60):
        session = GaussianSession(seed, 64)
        rows = updater.second_term(reward, session.preferences(), session).rows
        halves.append([flatten(rows.gradients(reward, w)) for w in rows.weights])
    first, second = np.moveaxis(np.array(halves), 1, 0)
    products = ((first - first.mean(0)) * (second - second.mean(0))).sum(1)
    assert abs(products.mean()) < 4.5 * products.std(ddof=1) / math.sqrt(len(products))


def test_a_utility_joins_the_upper_objective():
    """U = the number of steps, a constant, has no gradient; U = r_phi's return has PARL's direct term."""
    reward, session = quadratic_reward(), GaussianSession(1)
    plain = second_term(reward, aparl(implicit=EXACT), session)
    constant = aparl(implicit=EXACT, utility=lambda trajectories, rewards: trajectories.mask.sum(1).float())
    np.testing.assert_allclose(second_term(reward, constant, session), plain, rtol=1e-4, atol=1e-6)
    grown = quadratic_reward()
    aparl(**ONCE, implicit=OFF, utility=lambda trajectories, rewards: 1e6 * rewards.sum(1)).update(
        grown, session.preferences(), session
    )
    assert grown.returns(session.episodes).mean() > reward.returns(session.episodes).mean()


def test_a_regulariser_holds_the_reward_back():
    session = GaussianSession(2)

    def size(updater):
        reward = ensemble()
        updater.update(reward, session.preferences(), session)
        return norm(dict(reward.named_parameters()))

    def weight_decay(reward):
        return -1e3 * sum(parameter.square().sum() for parameter in reward.parameters())

    assert size(aparl(**FEW, implicit=OFF, regulariser=weight_decay)) < size(aparl(**FEW, implicit=OFF))


# ------------------------------------------------------------------------------------------------ rollouts


def test_episodes_are_cut_into_pieces_with_masks():
    episodes = [ramp(5, 0), ramp(3, 100)]
    pieces = cut(episodes, 2)
    assert pieces.mask.tolist() == [[True, True], [True, True], [True, False], [True, True], [True, False]]
    assert pieces.obs[pieces.mask][:, 0].tolist() == [0, 1, 2, 3, 4, 100, 101, 102]


def session_of(episode, pairs, length=2):
    """Preferences about segments of one episode, given by the first steps of each pair's two."""
    segments = [Segments.cat([episode.steps(pair[side], pair[side] + length) for pair in pairs]) for side in (0, 1)]
    stored = Preferences()
    stored.add(
        Query(*segments, torch.zeros(len(pairs), 2, length), fresh=torch.ones(len(pairs), dtype=torch.bool)),
        Answer(torch.arange(len(pairs)) / len(pairs), torch.ones(len(pairs), dtype=torch.bool)),
        0,
    )
    return stored


def test_pairs_that_share_a_step_share_a_half_and_no_piece_holds_a_step_of_theirs():
    # 0 and 1 touch; 2 touches nothing: the other half; 3 touches both halves: neither; 4 touches the second
    pairs = [(0, 4), (5, 10), (20, 24), (11, 25), (30, 21)]
    fresh = divide(session_of(ramp(40, 0), pairs), [ramp(40, 0)], 2)
    assert fresh.chosen.tolist() == [0, 1, 2, 4] and fresh.pairs.half.tolist() == [0, 0, 1, 1]
    labelled = {0, 1, 4, 5, 6, 10, 11, 20, 21, 22, 24, 25, 30, 31}
    pieces = fresh.pieces
    assert set(pieces.obs[pieces.mask][:, 0].tolist()) == set(range(40)) - labelled
    assert fresh.pairs.segments.obs[:4, 0, 0].tolist() == [0, 5, 20, 30]


def test_at_most_half_of_the_steps_lend_their_scores():
    fresh = divide(session_of(ramp(12, 0), [(0, 2), (4, 6), (8, 10)]), [ramp(12, 0)], 2)
    assert fresh.chosen.tolist() == [0] and not fresh.enough()  # a second pair would make 8 of 12
    whole = divide(session_of(ramp(12, 0), [(0, 2), (4, 6), (8, 10)]), [ramp(12, 0)], 2, 1.0)
    assert len(whole.chosen) == 3 and len(whole.pieces) == 0 and whole.enough(pieces=False)


def test_segments_from_elsewhere_are_dealt_out_pair_by_pair():
    session, other = GaussianSession(3, 16), GaussianSession(4, 16)
    fresh = divide(session.preferences(), other.fresh(), 2)
    assert fresh.pairs.half.tolist() == [0, 1] * 4 and len(fresh.pieces) == 16


@pytest.mark.parametrize("upper", ["preference", "win_rate"])
def test_one_label_has_no_say_in_the_other_half(upper):
    """Change the answers of one half's pairs: the other half's scores stay."""
    session, reward = GaussianSession(3, 16, pairs=4), quadratic_reward()
    pairs = divide(session.preferences(), session.fresh(), 2).pairs
    flipped = replace(pairs, prefers_first=torch.where(pairs.half == 0, 1 - pairs.prefers_first, pairs.prefers_first))
    before, after = (pair_scores(upper, reward, p).weights for p in (pairs, flipped))
    assert torch.equal(before[2:], after[2:]) and not torch.equal(before[:2], after[:2])


@pytest.mark.slow
@pytest.mark.parametrize("upper", ["preference", "win_rate"])
def test_the_halves_of_the_score_gradient_are_uncorrelated(upper):
    """One state, 8,000 draws of 5 pairs, the larger action preferred: a correlation of 0.05 is 4.5 standard errors.

    Labels and centring in both halves gave −0.07 and −0.30.
    """
    rng, reward, halves = np.random.default_rng(0), quadratic_reward(), []
    theta = GaussianSession(0, 2).policy.theta
    mean, deviation = float(theta["mean"][0]), float(theta["log_std"][0].exp())
    obs = torch.eye(2)[:1].expand(20, 1, 2)
    for _ in range(8000):
        raw = torch.from_numpy(mean + deviation * rng.standard_normal((20, 1, 1), dtype=np.float32))
        episodes = [Segments(obs[:1], raw[i : i + 1], raw[i : i + 1], torch.tensor([i])) for i in range(20)]
        index = rng.choice(20, (2, 5), replace=False)
        first, second = (Segments(obs[:5], raw[side], raw[side], torch.from_numpy(side)) for side in index)
        stored = Preferences()
        labels = (first.actions > second.actions).float()[:, 0, 0]
        every = torch.ones(5, dtype=torch.bool)
        stored.add(Query(first, second, torch.zeros(5, 2, 1), fresh=every), Answer(labels, every), 0)
        scores = pair_scores(upper, reward, divide(stored, episodes, 1).pairs)
        score = (scores.raw_actions[:, 0] - mean) / deviation**2
        halves.append([float(scores.half(half) @ score) for half in (0, 1)])
    correlation = np.corrcoef(np.array(halves).T)[0, 1]
    assert abs(correlation) < 4.5 / math.sqrt(len(halves)), correlation


def ramp(steps, start):
    values = torch.arange(start, start + steps, dtype=torch.float32)[None, :, None]
    return Segments(values, values / 1000, values / 1000, torch.tensor([start]))


# ------------------------------------------------------------------------------------------------ gate and clip


def test_the_gate_opens_on_evidence_and_closes_on_one_disagreement():
    gate = Gate(error=0.3, stake=0.5)
    # 1.5, 2.25, 3.375 → 10/3; the cap makes one disagreement enough, and one agreement enough to come back
    assert [gate.observe(c) for c in (1.0, 1.0, 1.0, -0.2, math.nan, 1.0)] == [False, False, True, False, False, True]
    assert gate.evidence == pytest.approx(10 / 3)


def share_opened(cosines):
    gates = [Gate() for _ in cosines]
    return np.mean([any(gate.observe(float(c)) for c in run) for gate, run in zip(gates, cosines, strict=True)])


@pytest.mark.parametrize("dimensions", [1, 3, 30])
def test_on_noise_the_gate_opens_in_no_more_runs_than_its_error(dimensions):
    """200 updates, 1000 runs; 0.05 and 4.5 standard errors. The rule that it replaces opened in 60 % of such runs."""
    found = cosines(np.random.default_rng(dimensions), 1000, 200, dimensions, 0.0)
    assert share_opened(found) < 0.05 + 4.5 * math.sqrt(0.05 * 0.95 / 1000)


def test_the_gates_power():
    """A true cosine of 0.6 opens it within 10 updates, one of 0.3 within 30, in four of five runs (noise in 8 axes)."""
    for cosine, signal, updates in ((0.3, 1.87, 30), (0.6, 3.39, 10)):
        found = cosines(np.random.default_rng(0), 500, updates, 8, signal)
        assert found.mean() == pytest.approx(cosine, abs=0.02)
        assert share_opened(found) > 0.8


@pytest.mark.parametrize("bad", [{"error": 0.0}, {"stake": 1.0}])
def test_a_gate_that_cannot_work_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        aparl(gate=bad)


def test_off_and_inf_are_understood_as_text_too():
    assert as_gate("off") is None and as_gate(False) is None
    assert as_limit(".inf") == math.inf and as_limit(0.5) == 0.5
    for wrong in (0.0, -1.0, "much", math.nan):
        with pytest.raises(ValueError, match="clip"):
            as_limit(wrong)
    with pytest.raises(ValueError, match="gate"):
        as_gate("shut")


def rows_for(reward, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    obs, actions = torch.randn(20, 2, generator=generator), torch.rand(20, 1, generator=generator)
    return WeightedRows(obs, actions, scale * torch.randn(2, 20, generator=generator))


def test_a_term_follows_the_reward_as_it_is_paid():
    """By finite differences of what each member alone would be paid, (exp(2 r) − 1) / 2."""
    reward = RewardEnsemble(2, 1, members=3, hidden=(8, 8), activation="silu", convexity=2.0).double()
    rows = rows_for(reward)
    rows = WeightedRows(rows.obs.double(), rows.actions.double(), rows.weights.double())
    found = rows.gradients(reward, rows.weights[0])

    def value():
        with torch.no_grad():
            return float((rows.weights[0] * ((2 * reward(rows.obs, rows.actions)).exp() - 1) / 2).sum())

    generator = torch.Generator().manual_seed(1)
    for name, parameter in reward.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for shift in (1e-5, -1e-5):
            parameter.data += shift * direction
            ends.append(value())
            parameter.data -= shift * direction
        assert float((found[name] * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("estimator", ["full", "paper"])
def test_a_curvature_of_rewards_is_that_of_the_pay(estimator):
    settings = aparl(implicit=EXACT | {"estimator": estimator}).implicit
    found = []
    for make, convexity in ((RewardEnsemble, 2.0), (PaidMean, 0.0), (RewardEnsemble, 0.0)):
        reward = make(2, 1, members=3, hidden=(8, 8), activation="silu", convexity=convexity)
        session = GaussianSession(0)
        rows = estimators.estimate(settings, "preference", None, reward, session.preferences(), session).rows
        found.append(rows.weights)
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


@pytest.mark.parametrize("clip", [0.1, math.inf])
def test_each_member_gets_at_most_clip_times_its_first_term(clip):
    reward = ensemble()
    rows = rows_for(reward, 100.0)
    reward(rows.obs, rows.actions).sum().backward()
    before = [{n: p.grad.clone() for n, p in member.named_parameters()} for member in reward.members]
    term = SecondTerm(reward, rows, rows.gradients(reward, rows.weights.mean(0)), True, clip)
    term()
    for m, member in enumerate(reward.members):
        added = {f"members.{m}.{n}": p.grad - before[m][n] for n, p in member.named_parameters()}
        whole = rows.gradient(reward, groups(reward)[m], rows.weights.mean(0))
        expected = norm(whole) if clip == math.inf else clip * norm(before[m])
        assert norm(added) == pytest.approx(expected, rel=1e-4)
        cosine = flatten(added) @ flatten(whole) / (norm(added) * norm(whole))
        assert cosine == pytest.approx(-1.0, abs=1e-5)  # the optimiser descends


def test_a_shared_encoder_gets_its_share_and_is_clipped_with_the_heads():
    reward = DynamicsAwareReward(2, 1, members=2, hidden=(8,), activation="tanh")
    rows = rows_for(reward)
    (group,) = groups(reward)
    found = rows.gradient(reward, group, rows.weights[0])
    value = (rows.weights[0] * reward(rows.obs, rows.actions).sum(0)).sum()
    expected = torch.autograd.grad(value, list(group.parameters.values()))
    assert "joint.0.weight" in found and not any(name.startswith("predictor") for name in found)
    for name, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)
    reward(rows.obs, rows.actions).sum().backward()
    before = {n: p.grad.clone() for n, p in group.parameters.items()}
    SecondTerm(reward, rows, rows.gradients(reward, rows.weights.mean(0)), True, 0.1)()
    added = {n: p.grad - before[n] for n, p in group.parameters.items()}
    assert norm(added) == pytest.approx(min(0.1 * norm(before), norm(found) * 10), rel=1e-4)
    assert norm({"joint": added["joint.0.weight"]}) > 0


def test_what_is_not_finite_or_not_converged_falls_back_to_term_1_and_is_counted():
    reward = ensemble()
    bad = rows_for(reward)
    bad.weights[0, 3] = math.nan
    for estimate in (Estimate(bad), Estimate(rows_for(reward), converged=False), Estimate(None)):
        guard = Safeguard(None, 0.1)
        term, metrics = guard.admit(reward, estimate)
        assert term is None or not term.admitted
        assert metrics["fallbacks"] == 1 and metrics["usable"] == 0


def test_a_term_that_stops_being_finite_during_training_is_left_out_and_counted():
    reward, guard = ensemble(), Safeguard(None, math.inf)
    rows = rows_for(reward)
    poisoned = WeightedRows(rows.obs.clone(), rows.actions, rows.weights)

    def fit(extra):
        reward(rows.obs, rows.actions).sum().backward()
        poisoned.obs[0] = math.nan
        extra()
        return {}

    _, found = guard.train(reward, Estimate(poisoned), None, fit)
    assert found["fallbacks"] == 1
    assert all(parameter.grad.isfinite().all() for parameter in reward.parameters())


def test_an_unconverged_solve_leaves_the_reward_to_term_1():
    updater = aparl(**FEW, implicit=EXACT | {"tol": 1e-12, "max_iter": 1}, gate="off")
    ours, metrics = weights_after(updater)
    theirs, _ = weights_after(pebble(**FEW, pairs="fresh"))
    np.testing.assert_array_equal(ours, theirs)
    assert metrics["aparl/fallbacks"] == 1


@pytest.mark.parametrize("episodes", [2, 6])
def test_too_few_rollouts_give_no_estimate(episodes):
    reward, session = ensemble(), GaussianSession(0, episodes)
    metrics = aparl(implicit={"trajectory_length": 2}).update(reward, session.preferences(), session)
    assert metrics["aparl/fallbacks"] == 1 and math.isnan(metrics["aparl/split_cosine"])


# ------------------------------------------------------------------------------------------------ state and runs


def test_its_state_resumes_exactly():
    whole, cut_short, resumed = (aparl(**FEW, implicit=EXACT, gate={"error": 0.01, "stake": 0.5}) for _ in range(3))
    straight, metrics = weights_after(whole, sessions=3)
    reward, session = ensemble(), GaussianSession(0)
    for _ in range(2):
        cut_short.update(reward, session.preferences(), session)
    resumed.load_state_dict(json.loads(json.dumps(cut_short.state_dict())))
    again = resumed.update(reward, session.preferences(), session)
    np.testing.assert_array_equal(flatten(dict(reward.named_parameters())), straight)
    assert again == pytest.approx(metrics, nan_ok=True) and again["aparl/evidence"] != 1


@pytest.mark.parametrize(
    "options",
    [
        {"upper": "fame"},
        {"earlier_share": 1.5},
        {"clip": 0.0},
        {"gate": "shut"},
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        aparl(**options)


@pytest.mark.parametrize(
    "wrong", [{"estimator": "magic"}, {"trajectory_length": 0}, {"damping": -1.0}, {"trace_decay": 0.0}]
)
def test_an_estimator_that_cannot_work_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        aparl(implicit=wrong)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(
            ["updater.gate=off", "updater.clip=.inf", "updater.implicit.estimator=covariance"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["updater.gate=off", "updater.utility={_target_: experiments.energy.Energy}"], marks=pytest.mark.slow
        ),
    ],
    ids=["default", "raw-covariance", "energy"],
)
def test_it_runs_end_to_end(overrides, tmp_path):
    loop = tiny_loop(tmp_path / "run", "updater=aparl", "feedback.fresh_steps=200", *overrides)
    summary = finish(loop)
    assert summary["complete"] and "aparl/fallbacks" in summary
    assert all(p.isfinite().all() for p in loop.parts.reward.parameters())
