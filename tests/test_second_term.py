"""Second terms through the critics: exact where everything is known, and the same through the robot's interfaces."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.second_term import tabular
from experiments.second_term.__main__ import main
from pbrl.bilevel import adjoint_weights, linear_values, projected, upper_traces
from pbrl.bilevel.params import flatten
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.second_term.critic import parity, replay_halves
from pbrl.second_term.critic_adjoint import directions, upper_advantage
from pbrl.second_term.critic_pairs import critic_pairs_estimate
from pbrl.second_term.fresh import Trajectories
from pbrl.types import Answer, Query, Segments
from tests.conftest import finish, option, tiny_loop

# ------------------------------------------------------------------------------------------------ the truth


@pytest.mark.slow
def test_each_equals_central_differences_on_discounted_mdps():
    """Steps of 1e-5 leave an error of about 1e-9; asked for: 1e-6."""
    rows = tabular.exact(2)
    assert {row["estimator"] for row in rows} == {
        "critic-pairs (advantage)", "critic-pairs (value)", "critic-adjoint", "low-dimensional",
    }  # fmt: skip
    assert max(row["relative_error"] for row in rows) < 1e-6


@pytest.mark.slow
def test_sampled_estimates_converge_to_the_truth():
    """Eight times the transitions: the error falls by at least 2 (theory √8), without a bias beyond its noise."""
    few, many = (tabular.sampled((size,), 20, 3) for size in (500, 4000))
    for before, after in zip(few, many, strict=True):
        assert after["rms_error"] < before["rms_error"] / 2, before["estimator"]
        if "0.9" not in before["estimator"]:
            assert after["bias"] < 3 * after["bias_noise"], after


def test_a_trace_on_a_chain_by_hand():
    advantage, mask = torch.tensor([[1.0, -2.0, 9.0]]), torch.tensor([[True, True, False]])
    found = upper_traces(advantage, mask, gamma=0.5, discount=0.25)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.25 - 1.0, 0.0]]))


def test_a_projection_keeps_what_happens_along_its_directions():
    rng = torch.Generator().manual_seed(0)
    weights, basis = torch.randn(20, generator=rng).double(), torch.randn(20, 3, generator=rng).double()
    basis = torch.cat([basis, basis[:, :1]], 1)  # dependent: least squares of smallest norm
    kept = projected(weights, basis)
    torch.testing.assert_close(basis.T @ kept, basis.T @ weights)
    assert kept.norm() < weights.norm()


def test_a_ridge_shrinks_and_shapes_are_checked():
    eye = torch.eye(3)
    free, held = (linear_values(eye, 0.5 * eye, torch.ones(3), 1.0, ridge) for ridge in (0.0, 1.0))
    torch.testing.assert_close(free, torch.full((3,), 2.0, dtype=torch.float64))
    assert (held < free).all()
    rng = torch.Generator().manual_seed(0)
    dead_saturated_one = torch.tensor([0.0, 3.0, 1.0]).expand(50, 3)
    psi, following = (torch.cat([torch.randn(50, 2, generator=rng), dead_saturated_one], 1) for _ in range(2))
    weights = adjoint_weights(psi, following, torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]), 0.99, ridge=1.0)
    assert abs(float(weights.sum())) < 1e-10 < float(weights.abs().sum())  # a constant reward changes nothing
    with pytest.raises(ValueError, match="features"):
        linear_values(eye, eye[:2], torch.ones(3), 0.9)
    with pytest.raises(ValueError, match="target"):
        adjoint_weights(eye, eye, torch.ones(2), 0.9)
    with pytest.raises(ValueError, match="ridge"):
        adjoint_weights(eye, eye, torch.ones(3), 0.9, -1.0)


# ------------------------------------------------------------------------------------------------ the robot's side

STATES, NEXT, CHOICE = 4, [[1, 2], [2, 3], [3, 0], [0, 2]], [0, 1, 1, 0]  # next state by sign of the action; policy


class Table:
    """A `PolicyView` of a policy that takes action ±tanh(1), with one-hot features of state and sign."""

    gamma, alpha = 0.8, 0.0  # no entropy: the log-probability of so narrow a policy would be noise
    q = torch.from_numpy(np.random.default_rng(0).normal(size=(2, STATES, 2)).astype(np.float32))

    def parameters(self):
        return {}

    def critic_parameters(self):
        return {}

    def distribution(self, theta, obs):
        sign = 2 * torch.tensor(CHOICE)[obs.argmax(-1)].float() - 1
        return sign[..., None], torch.full_like(sign, -20.0)[..., None]

    def critic_features(self, obs, actions):
        index = obs.argmax(-1) * 2 + (actions[:, 0] > 0)
        return torch.eye(2 * STATES)[index].expand(2, -1, -1)

    def q_values(self, critic, obs, actions):
        return self.q[:, obs.argmax(-1), (actions[:, 0] > 0).long()]


class TableSession:
    env_step, policy = 0, Table()

    def transitions(self, count, rng=None):
        """Every state and action often; a little noise in the observations lets their bits deal them to the halves."""
        pairs = torch.arange(count) % (2 * STATES)
        state, sign = pairs // 2, pairs % 2
        noise = 1e-3 * torch.from_numpy(rng.random((count, STATES), dtype=np.float32))
        following = torch.tensor(NEXT)[state, sign]
        return {
            "obs": torch.eye(STATES)[state] + noise,
            "actions": (2 * sign[:, None] - 1) * 0.7,
            "next_obs": torch.eye(STATES)[following],
            "not_done": torch.ones(count),
        }


def flow():
    """K of the table's policy, float64 [8, 8]."""
    table = torch.zeros(2 * STATES, 2 * STATES, dtype=torch.float64)
    for state in range(STATES):
        for sign in (0, 1):
            table[2 * state + sign, 2 * NEXT[state][sign] + CHOICE[NEXT[state][sign]]] = 1.0
    return table


def answered(pairs=6, length=3):
    rng = np.random.default_rng(1)
    state, sign = (torch.from_numpy(rng.integers(n, size=(2, pairs, length))) for n in (STATES, 2))
    sides = [Segments(torch.eye(STATES)[state[k]], (2 * sign[k].float() - 1)[..., None] * 0.7) for k in (0, 1)]
    labels = torch.from_numpy(rng.random(pairs, dtype=np.float32))
    stored = Preferences()
    stored.add(Query(*sides, torch.zeros(pairs, 2, length)), Answer(labels, torch.ones(pairs, dtype=torch.bool)), 0)
    return stored, state, sign, labels.double()


@pytest.mark.parametrize("compare", ["value", "advantage"])
def test_pairs_through_the_critic_equal_the_exact_adjoint_with_one_hot_features(compare):
    """Full coverage, no ridge: the rows' weights of a state and action sum to λ(s, a), for each half's pairs."""
    stored, state, sign, labels = answered()
    found = critic_pairs_estimate(
        stored, TableSession(), np.random.default_rng(0), rows=400, ridge=0.0, compare=compare, actions=2,
        device=torch.device("cpu"),
    )  # fmt: skip
    gamma, eye = Table.gamma, torch.eye(2 * STATES, dtype=torch.float64)
    psi = eye[2 * state + sign]
    if compare == "value":
        values = psi[:, :, 0]
    else:
        discounts = gamma ** torch.arange(3, dtype=torch.float64)
        values = ((psi - eye[2 * state + torch.tensor(CHOICE)[state]]) * discounts[:, None]).sum(2)
    index = found.rows.obs.argmax(-1) * 2 + (found.rows.actions[:, 0] > 0)
    for half in (0, 1):
        expected = torch.zeros(2 * STATES, dtype=torch.float64)
        for critic in Table.q.double().reshape(2, -1):
            margin = (values[0] - values[1]) @ critic
            g = ((labels - torch.sigmoid(margin))[half::2] / 3) @ (values[0] - values[1])[half::2]
            expected += torch.linalg.solve((eye - gamma * flow()).T, g) / 2
        total = torch.zeros(2 * STATES).index_add(0, index, found.rows.weights[half])
        torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-4)


def test_the_upper_advantage_is_exact_with_one_hot_features():
    upper = RewardEnsemble(STATES, 1, members=1, hidden=(8,))
    rng = np.random.default_rng(0)
    half = replay_halves(TableSession(), 2000, rng)[0]
    states = torch.eye(STATES).repeat(2, 1, 1)
    actions = torch.tensor([-0.7, 0.7])[:, None, None].expand(2, STATES, 1)
    pieces = Trajectories(states, actions, actions, torch.ones(2, STATES, dtype=torch.bool))
    found = upper_advantage(Table(), upper, half, pieces, 0.0, 2, rng)
    rewards = torch.stack([upper.mean(torch.eye(STATES), actions[sign]) for sign in (0, 1)], 1).reshape(-1).double()
    values = torch.linalg.solve(torch.eye(2 * STATES, dtype=torch.float64) - 0.8 * flow(), rewards).reshape(STATES, 2)
    exact = (values - values[torch.arange(STATES), torch.tensor(CHOICE)][:, None]).T
    torch.testing.assert_close(found.double(), exact.detach(), atol=2e-3, rtol=0)  # the rows' noise of 1e-3


def test_replay_rows_always_fall_into_the_same_half():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float32))
    assert (parity(rows) == parity(rows.flip(0))[::-1]).all()
    assert 400 < parity(rows).sum() < 600


def test_few_directions_are_the_members_and_their_deviation():
    reward = RewardEnsemble(2, 1, members=3, hidden=(4,))
    obs, actions = torch.randn(5, 2), torch.randn(5, 1)
    found = directions(reward, obs, actions)
    torch.testing.assert_close(found[:, :3], reward(obs, actions).detach().T)
    torch.testing.assert_close(found[:, 3], found[:, :3].std(1, correction=0))


def test_the_directions_of_a_convex_pay_are_what_it_gains():
    """So what a projection keeps is what a change of a member does to the pay."""
    reward = RewardEnsemble(2, 1, members=3, hidden=(4,), convexity=3.0)
    obs, actions = torch.randn(5, 2), torch.randn(5, 1)
    members = reward(obs, actions).detach()

    def pay(scale: torch.Tensor) -> torch.Tensor:
        return reward.pay.convex((scale[:, None] * members).mean(0))

    gains = torch.autograd.functional.jacobian(pay, torch.ones(3))
    torch.testing.assert_close(directions(reward, obs, actions)[:, :3], 3 * gains)  # 3: the mean's own factor


# ------------------------------------------------------------------------------------------------ in a run


def test_the_critics_last_layers_are_linear_in_the_features(tmp_path):
    loop = tiny_loop(tmp_path / "run", "updater=pebble")
    view, agent = loop.session.policy, loop.agent
    size = loop.agent.observation_space.shape[0], loop.agent.action_space.shape[0]
    obs, actions = torch.randn(6, size[0]), torch.rand(6, size[1])
    features = view.critic_features(obs, actions)
    heads = [list(q.modules())[-1] for q in agent.critic.q_networks]
    for k, head in enumerate(heads):
        weights = torch.cat([head.weight, head.bias[None]], 1)[0]
        q = view.q_values(view.critic_parameters(), obs, actions)[k]
        torch.testing.assert_close(features[k] @ weights, q, atol=1e-5, rtol=1e-5)
    loop.release()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["critic-pairs", "critic-adjoint", "low-dimensional"])
def test_behind_a_closed_gate_it_leaves_the_run_as_it_was(estimator, tmp_path):
    found = []
    for name in (estimator, "off"):
        loop = tiny_loop(
            tmp_path / name,
            "updater=aparl",
            "feedback.fresh_steps=100",
            "total_steps=500",
            "updater.gate.error=1e-9",
            f"updater.implicit.estimator={name}",
            "updater.implicit.rows=64",
            "updater.implicit.trajectory_length=10",
            "updater.implicit.actions=2",
        )
        summary = finish(loop)
        found.append(flatten(dict(loop.parts.reward.named_parameters())))
        assert name == "off" or np.isfinite(summary["aparl/split_cosine"])
    np.testing.assert_array_equal(*found)


def test_what_an_estimator_would_ignore_is_refused():
    for ignored in ({"upper": "win_rate"}, {"utility": SimpleNamespace()}):
        with pytest.raises(ValueError, match="critic-pairs has an upper objective of its own"):
            option("updater", "aparl", implicit={"estimator": "critic-pairs"}, **ignored)


@pytest.mark.parametrize("bad", [{"compare": "moods"}, {"ridge": -1.0}, {"rows": 0}, {"actions": 0}])
def test_options_that_cannot_work_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        option("updater", "aparl", implicit={"estimator": "critic-pairs"} | bad)


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    main(["exact", "--seeds", "1", "--out", str(tmp_path / "exact.csv")])
    assert (tmp_path / "exact.csv").read_text().startswith("estimator,seed,relative_error")
    with pytest.raises(SystemExit):
        main(["robot", str(tmp_path)])
    assert "needs a run's folder with a checkpoint" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["critic-pairs", "critic-adjoint"])
def test_one_critic_is_enough(estimator, tmp_path):
    few = ["updater.implicit.rows=64", "updater.implicit.trajectory_length=5", "updater.implicit.actions=2"]
    given = ["updater=aparl", "agent.critics=1", f"updater.implicit.estimator={estimator}", "feedback.budget=10", *few]
    assert np.isfinite(finish(tiny_loop(tmp_path, *given, "total_steps=400"))["aparl/split_cosine"])
