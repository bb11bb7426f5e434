"""What the agent is paid, by hand; standardised inputs of the reward; over-optimisation is seen."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from pbrl.launch.build import build
from pbrl.launch.configuration import ConfigError
from pbrl.launch.stored import read_config
from pbrl.pay import Pay
from pbrl.records.diary import _told
from pbrl.records.evaluation import over_optimisation
from pbrl.reed import DynamicsAwareReward
from pbrl.reward import SLOPES, RewardEnsemble
from pbrl.rollouts import Rollouts
from pbrl.standardise import CLIP, Standardise
from tests.conftest import finish, rows, stopped_and_resumed, tiny_loop

TWO = np.array([[1.0, 0.0], [3.0, 0.0]], np.float32)  # means 2, 0; deviations 1, 0


def test_pay_by_hand() -> None:
    assert Pay()(TWO, 100).tolist() == [2.0, 0.0]
    assert Pay(pessimism=0.5)(TWO, 100).tolist() == [1.5, 0.0]
    assert Pay(pessimism=0.5, pessimism_decay=0.1)(TWO, 2).tolist() == pytest.approx([2 - 0.5 * 0.81, 0.0])
    assert Pay(disagreement_bonus=0.05, disagreement_decay=1e-3)(TWO, 0).tolist() == pytest.approx([2.05, 0.0])
    later = Pay(disagreement_bonus=0.05, disagreement_decay=1e-3)(TWO, 1000)
    assert later.tolist() == pytest.approx([2 + 0.05 * 0.999**1000, 0.0])
    both = Pay(pessimism=1.0, disagreement_bonus=1.0, disagreement_decay=1e-3)
    assert both(TWO, 0).tolist() == [2.0, 0.0]
    assert both(TWO, 100_000).tolist() == pytest.approx([1.0, 0.0])


def test_a_convex_pay_keeps_the_order_and_widens_the_top() -> None:
    rewards = np.linspace(-1, 1, 9, dtype=np.float32)[None]
    for convexity in (0.5, 3.0):
        pay = Pay(convexity=convexity)(rewards, 7)
        assert pay.dtype == np.float32
        expected = (np.exp(convexity * rewards[0].astype(np.float64)) - 1) / convexity
        np.testing.assert_allclose(pay, expected, rtol=1e-6, atol=1e-7)
        steps = np.diff(pay)
        assert (steps > 0).all() and (np.diff(steps) > 0).all()
    cautious = Pay(pessimism=0.5, convexity=2.0)(TWO, 100)  # of 1.5 and 0
    assert cautious.tolist() == pytest.approx([np.expm1(3.0) / 2, 0.0])


@pytest.mark.parametrize("lowest_of", [1, 2, 3, 5])
def test_the_lowest_of_some_is_the_average_over_all_draws(lowest_of: int) -> None:
    rewards = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    draws = [rewards[list(some)].min(axis=0) for some in itertools.combinations(range(5), lowest_of)]
    np.testing.assert_allclose(Pay(lowest_of=lowest_of)(rewards, 0), np.mean(draws, axis=0), rtol=1e-5, atol=1e-6)
    assert Pay(lowest_of=lowest_of)(rewards, 0).dtype == np.float32


@pytest.mark.parametrize(
    "options",
    [
        {"pessimism": -1.0},
        {"pessimism_decay": 1.0},
        {"lowest_of": 0},
        {"disagreement_bonus": -0.1},
        {"convexity": -1.0},
        {"convexity": 1.0, "pessimism": 1.0, "pessimism_decay": 0.1},
    ],
)
def test_pay_out_of_range_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"reward.{next(iter(options))}="):
        Pay(**options)


@pytest.mark.parametrize(
    ("options", "weight", "convexity"),
    [
        (("reward.pessimism=0.5",), -0.5, 0.0),
        (("reward.disagreement_bonus=0.5", "reward.disagreement_decay=0"), 0.5, 0.0),
        (("reward.pessimism=0.5",), -0.5, 3.0),
    ],
)
def test_caution_and_curiosity_are_stored_and_relabelled(
    tmp_path: Path, options: tuple[str, ...], weight: float, convexity: float
) -> None:
    loop = tiny_loop(tmp_path / "run", *options, f"reward.convexity={convexity}", "total_steps=210")
    loop.run()
    replay = loop.agent.replay_buffer
    obs, actions = replay.observations[:210, 0].copy(), replay.actions[:210, 0].copy()
    predicted = loop.parts.reward.predict(obs, actions)
    assert predicted.std(0).max() > 1e-3
    expected = predicted.mean(0) + weight * predicted.std(0)  # relabelled at step 200, ten new ones since
    if convexity:
        expected = np.expm1(convexity * expected) / convexity
    np.testing.assert_allclose(replay.rewards[:210, 0], expected, rtol=1e-5, atol=2e-6)
    written = rows(tmp_path / "run")
    session = next(row for row in written if "feedback/session" in row)
    evaluated = [row for row in written if "eval/return" in row]
    assert "reward/gap" not in evaluated[0], "before the first session there is no learned reward to speak of"
    assert evaluated[-1].keys() >= {"reward/gap", "reward/learned_per_step", "reward/true_per_step"}
    assert session["reward/paid_below"] == (1.0 if weight < 0 else 0.0)
    assert (session["reward/paid_below_by"] > 0) == (weight < 0)
    loop.close(True)


@pytest.mark.parametrize("updater", ["oracle", "aparl"])
def test_caution_goes_with_every_updater(tmp_path: Path, updater: str) -> None:
    tiny_loop(tmp_path / "run", f"updater={updater}", "reward.pessimism=1", "reward.normalise=true").close(False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("reward.pessimism=1", "reward.members=1", "query=uniform"), "members of at least 2"),
        (("reward.lowest_of=4",), "reward.members=3; expected at least 4"),
        (("reward.pessimism=-1",), "reward.pessimism=-1"),
        (("reward.convexity=3", "reward.disagreement_bonus=0.1"), "reward.convexity=3; expected .* decays"),
    ],
)
def test_caution_that_cannot_be_is_refused(tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        tiny_loop(tmp_path / "run", *options)


def test_a_stored_bonus_of_the_agent_becomes_the_rewards(tiny_run: Path, tmp_path: Path) -> None:
    stored = OmegaConf.load(tiny_run / "config.yaml")
    for key in ("disagreement_bonus", "disagreement_decay", "pessimism", "pessimism_decay", "lowest_of", "normalise"):
        del stored.reward[key]
    stored.agent.disagreement_bonus, stored.agent.disagreement_decay = 0.05, 1e-3
    OmegaConf.save(stored, tmp_path / "config.yaml")
    cfg, _ = read_config(tmp_path)
    assert (cfg.reward.disagreement_bonus, cfg.reward.disagreement_decay) == (0.05, 1e-3)
    assert "disagreement_bonus" not in cfg.agent
    build(OmegaConf.merge(cfg, {"run_dir": str(tmp_path / "run")}), {}, []).close(False)


# ------------------------------------------------------------------------------------------------ standardised inputs


def test_standardised_by_hand() -> None:
    scale = Standardise(3, on=True)
    x = np.array([2.0, 5.0, -1e6], np.float32)
    assert scale.row(x).tolist() == [2.0, 5.0, -CLIP] and not scale.known
    scale.set(np.array([1.0, 4.0, 0.0]), np.array([2.0, 0.0, 1.0]))  # the second is constant: only centred
    expected = [0.5, 1.0, -CLIP]
    assert scale(torch.from_numpy(x)).tolist() == scale.row(x).tolist() == expected
    assert not Standardise(3, on=False).state_dict()


@pytest.mark.slow
def test_the_statistics_are_those_of_the_replay_and_stay(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "reward.normalise=true", "total_steps=210")
    loop.run()
    replay, reward = loop.agent.replay_buffer, loop.parts.reward
    seen = replay.rows[:200, :4].astype(np.float64)
    np.testing.assert_allclose(reward.obs_scale.mean, seen[:, :2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(reward.action_scale.deviation, seen[:, 2:].std(0), rtol=1e-5)
    before = {name: value.clone() for name, value in reward.state_dict().items()}
    loop.total_steps = 310
    loop.run()
    after = reward.state_dict()
    assert loop.sessions == 2
    assert all(torch.equal(after[name], value) for name, value in before.items() if "scale" in name)
    obs, actions = replay.observations[:300, 0].copy(), replay.actions[:300, 0].copy()
    paid = reward.predict(obs, actions).mean(0)
    np.testing.assert_allclose(replay.rewards[:300, 0], paid, atol=1e-5)
    loop.close(True)


@pytest.mark.parametrize("make", [RewardEnsemble, DynamicsAwareReward])
def test_a_standardised_reward_is_the_plain_one_on_standardised_inputs(make: Any) -> None:
    rng = np.random.default_rng(0)
    plain, scaled = make(3, 2, hidden=[8], seed=1), make(3, 2, hidden=[8], seed=1, normalise=True)
    obs, actions = rng.normal(3, 9, (50, 3)).astype(np.float32), rng.uniform(-1, 1, (50, 2)).astype(np.float32)
    scaled.obs_scale.set(obs.mean(0), obs.std(0))
    scaled.action_scale.set(actions.mean(0), actions.std(0))
    expected = plain.predict((obs - obs.mean(0)) / obs.std(0), (actions - actions.mean(0)) / actions.std(0))
    np.testing.assert_allclose(scaled.predict(obs, actions), expected, atol=1e-5)
    alone = np.concatenate([scaled.predict(obs[i : i + 1], actions[i : i + 1]) for i in range(5)], axis=1)
    np.testing.assert_allclose(alone, expected[:, :5], atol=1e-5)
    for m in range(3):
        member = scaled.member(m, torch.from_numpy(obs), torch.from_numpy(actions)).detach()
        np.testing.assert_allclose(member, expected[m], atol=1e-5)


def test_reed_predicts_the_embedding_of_the_standardised_next_state() -> None:
    rng = np.random.default_rng(0)
    plain, scaled = (DynamicsAwareReward(3, 2, hidden=[8], seed=1, normalise=on) for on in (False, True))
    scaled.obs_scale.set(np.full(3, 2.0), np.full(3, 4.0))
    obs, following = (torch.from_numpy(rng.normal(3, 9, (20, 3)).astype(np.float32)) for _ in range(2))
    actions = torch.zeros(20, 2)
    expected = plain.dynamics_loss((obs - 2) / 4, actions, (following - 2) / 4)
    torch.testing.assert_close(scaled.dynamics_loss(obs, actions, following), expected)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_reward_of_observations_is_blind_to_actions(normalise: bool) -> None:
    rng = np.random.default_rng(0)
    reward = RewardEnsemble(3, 2, hidden=[8], seed=1, sees_actions=False, normalise=normalise)
    moments = [(np.full(size, 2.0), np.full(size, 4.0)) for size in (3, 2)]
    reward.pretrain(SimpleNamespace(moments=lambda: moments))  # type: ignore[arg-type]
    obs = rng.normal(3, 9, (50, 3)).astype(np.float32)
    actions, others = rng.uniform(-1, 1, (2, 50, 2)).astype(np.float32)
    seen = torch.from_numpy((obs - 2) / 4 if normalise else obs)
    expected = np.stack([network(seen).detach().numpy()[:, 0] for network in reward.members])
    assert expected.std(1).min() > 0.01
    for acts in (actions, others):
        np.testing.assert_allclose(reward.predict(obs, acts), expected, atol=1e-6)
        alone = np.concatenate([reward.predict(obs[i : i + 1], acts[i : i + 1]) for i in range(5)], axis=1)
        np.testing.assert_allclose(alone, expected[:, :5], atol=1e-6)
        member = reward.member(1, torch.from_numpy(obs), torch.from_numpy(acts)).detach().numpy()
        np.testing.assert_allclose(member, expected[1], atol=1e-6)


@pytest.mark.parametrize(
    "updater", ["mrn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aparl", "penalty", "surf", "rime"))]
)
def test_every_updater_learns_a_reward_of_observations(tmp_path: Path, updater: str) -> None:
    folder = tmp_path / "run"
    loop = tiny_loop(folder, f"updater={updater}", "reward.sees_actions=false", "reward.normalise=true")
    finish(loop)
    obs = loop.agent.replay_buffer.observations[:50, 0]
    actions = loop.agent.replay_buffer.actions[:50, 0]
    paid = loop.parts.reward.predict(obs, actions)
    np.testing.assert_array_equal(paid, loop.parts.reward.predict(obs, -actions))
    assert paid.std(1).min() > 1e-3 and {"reward/loss", "reward/rank_correlation"} <= {
        name for row in rows(folder) for name in row
    }


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("reward=reed", "reward.embedding=16", "reward.max_updates=5"), marks=pytest.mark.slow),
        ("reward.sees_actions=false", "reward.convexity=2"),
    ],
)
def test_a_standardised_pessimistic_run_resumes_bit_for_bit(tmp_path: Path, options: tuple[str, ...]) -> None:
    short = ("reward.normalise=true", "reward.pessimism=1", "reward.lowest_of=2", "total_steps=420", *options)
    again = stopped_and_resumed(tmp_path, 330, *short)
    assert again.parts.reward.obs_scale.known
    finish(again)
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ over-optimisation


class Known:
    """Two members that pay the observation and the action, with a tanh's slope."""

    pay, slope = Pay(pessimism=0.5), staticmethod(SLOPES["tanh"])

    def predict(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return np.stack([obs[:, 0], actions[:, 0]])


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def test_the_gap_by_hand() -> None:
    recent = (column(3, 1), column(1, 1), np.array([0.0, 0.0], np.float32))  # means 2, 1; deviations 1, 0
    kept = (column(-1, 1), column(-1, 1), np.array([0.0, 2.0], np.float32))  # learned 0 ± 1, true 1 ± 1
    found = over_optimisation(Known(), 0, recent, kept)  # type: ignore[arg-type]
    assert found == pytest.approx(
        {
            "reward/learned_per_step": 1.5,
            "reward/true_per_step": 0.0,
            "reward/gap": 1.5 + 1.0,
            "reward/saturated": 1.0,
            "reward/paid_below": 0.5,
            "reward/paid_below_by": 0.5,
        }
    )


def test_a_saturated_reward_is_seen_by_its_slope() -> None:
    """As seen on door-open: members at 0.95 and more of a tanh's 1 for most of the policy's steps."""
    steps = (column(0.94, 0.96, -0.96, 0.0), column(0.99, 0.99, 0.99, 0.99), np.zeros(4, np.float32))
    assert over_optimisation(Known(), 0, steps, steps)["reward/saturated"] == 6 / 8  # type: ignore[arg-type]
    reward = RewardEnsemble(1, 1, hidden=(4,), output="linear")
    for parameter in reward.parameters():
        parameter.data.fill_(9.0)  # far beyond a tanh's end
    assert over_optimisation(reward, 0, steps, steps)["reward/saturated"] == 0


@pytest.mark.parametrize(
    ("gap", "saturated", "told"), [(math.nan, 0.5, []), (0.9, 0.0, []), (1.1, 0.51, ["gap", "saturated"])]
)
def test_a_large_gap_and_a_saturated_reward_are_told(gap: float, saturated: float, told: list[str]) -> None:
    assert [words.split()[0] for words in _told({"reward/gap": gap, "reward/saturated": saturated})] == told
    assert _told({}) == []


def test_steps_are_spread_over_all_that_are_kept() -> None:
    rollouts = Rollouts(10, 1, 1)
    for i in range(25):
        rollouts.add(np.full(1, i), np.zeros(1), np.zeros(1), float(i), np.zeros(0), False)
    assert rollouts.steps(0, 100)[2].tolist() == list(range(15, 25))
    assert rollouts.steps(0, 4)[2].tolist() == [15, 18, 21, 24]
    assert rollouts.steps(20, 5)[0][:, 0].tolist() == [20, 21, 22, 23, 24]
