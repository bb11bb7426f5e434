"""The agent's options: what it sees, how far it looks ahead, what it does about a new reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from stable_baselines3 import SAC
from torch import nn

from pbrl.agent.replay import RelabelReplay
from pbrl.agent.sac import PreferenceSAC
from pbrl.launch.configuration import ConfigError
from pbrl.records.evaluation import act
from tests.conftest import finish, point_mass_agent, rows, stopped_and_resumed, tiny_loop

ALL = (
    "agent.normalise=true",
    "agent.actor_layer_norm=true",
    "agent.critic_layer_norm=true",
    "agent.blocks=1",
    "agent.net_arch=[8]",
    "agent.critics=1",
    "agent.weight_decay=1e-2",
    "agent.target_entropy=-0.5",
    "agent.n_steps=3",
    "agent.relabel_updates=7",
    "agent.gradient_steps=2",
    "agent.reset_above=-10",
    "agent.noise_color=1",
)


def agent(**options: Any) -> PreferenceSAC:
    return point_mass_agent(**({"net_arch": [8], "buffer_size": 1000} | options))


@pytest.mark.slow
def test_a_run_with_every_option_resumes_bit_for_bit(tmp_path: Path) -> None:
    again = stopped_and_resumed(tmp_path, 330, *ALL, "total_steps=420")
    assert isinstance(again.agent, SAC)
    finish(again)
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    resets = [row["train/critic_reset"] for row in rows(tmp_path / "whole") if "train/critic_reset" in row]
    assert resets == [1.0, 1.0], "of three sessions the first has no reward of before"


def test_the_agent_sees_standardised_observations_everywhere() -> None:
    seen = agent(normalise=True, learning_starts=10)
    seen.collect(60)
    stored = seen.replay_buffer.observations[:60, 0].astype(np.float64)
    assert seen.seen is not None
    np.testing.assert_allclose(seen.seen.mean, stored.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(seen.seen.var), stored.std(0), rtol=1e-4)
    plain = agent()
    plain.policy.load_state_dict({k: v for k, v in seen.policy.state_dict().items() if ".scale." not in k})
    obs = np.array([0.9, -1.0], np.float32)
    standardised = ((obs - stored.mean(0)) / stored.std(0)).astype(np.float32)
    expected = plain.predict(standardised, deterministic=True)[0]
    np.testing.assert_allclose(seen.predict(obs, deterministic=True)[0], expected, atol=1e-5)
    np.testing.assert_allclose(act(seen, obs), expected, atol=1e-5)
    values = [
        model(torch.from_numpy(at[None]), torch.zeros(1, 2))[0].item()
        for model, at in ((seen.critic, obs), (plain.critic, standardised), (seen.critic_target, obs))
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    twin = plain.critic_target(torch.from_numpy(standardised[None]), torch.zeros(1, 2))[0].item()
    assert values[2] == pytest.approx(twin, abs=1e-5)


@pytest.mark.parametrize("blocks", [0, 2])
def test_norms_stand_where_they_were_asked_for(blocks: int) -> None:
    width = {"blocks": blocks, "net_arch": (8,) if blocks else (8, 8)}
    only = agent(critic_layer_norm=True, **width)
    counts = [sum(isinstance(m, nn.LayerNorm) for m in net.modules()) for net in (only.actor, *only.critic.q_networks)]
    assert counts == [0, blocks + 1 if blocks else 2, blocks + 1 if blocks else 2]


def test_new_critics_have_new_norms() -> None:
    one = agent(critic_layer_norm=True)
    norm = next(m for m in one.critic.modules() if isinstance(m, nn.LayerNorm))
    with torch.no_grad():
        norm.weight.fill_(5.0)
    one.reset_critic(3)
    assert bool((norm.weight == 1).all())


# ------------------------------------------------------------------------------------------------ n steps


def walk(episodes: list[int], timeout: bool = False, capacity: int = 30) -> RelabelReplay:
    """Episodes of these lengths; observation i, reward 2^i at row i, each last step terminal or at the time limit."""
    space, actions = Box(-1e9, 1e9, (1,), np.float32), Box(-1, 1, (1,), np.float32)
    replay = RelabelReplay(capacity, space, actions, "cpu", n_steps=3, gamma=0.5)
    i = 0
    for length in episodes:
        for step in range(length):
            last = step == length - 1
            obs, following = np.array([[i]]), np.array([[i + 1 if not last else 1000 + i]])
            info = [{"TimeLimit.truncated": last and timeout}]
            replay.add(obs, following, np.zeros((1, 1)), np.array([2.0**i]), np.array([last]), info)
            i += 1
    return replay


class Given:
    """A generator that draws these rows."""

    def __init__(self, index: list[int]) -> None:
        self.index = np.array(index)

    def integers(self, *_: Any, **__: Any) -> np.ndarray:
        return self.index.copy()


@pytest.mark.parametrize("timeout", [False, True])
def test_three_steps_by_hand(timeout: bool) -> None:
    replay = walk([5, 4], timeout)
    batch = replay.draw(4, Given([0, 3, 4, 8]), n_steps=3)  # type: ignore[arg-type]
    #   γ = 1/2 and rewards 2^i: each further reward adds 2^i again
    assert batch.rewards.tolist() == [3 * 1, 2 * 8, 16, 256]
    assert batch.next_obs[:, 0].tolist() == [3, 1004, 1004, 1008]
    assert batch.obs[:, 0].tolist() == [0, 3, 4, 8]
    ends = 1.0 if timeout else 0.0
    assert batch.not_done.tolist() == [0.25, 0.5 * ends, ends, ends]


def test_steps_reach_neither_over_the_rings_head_nor_across_a_branch() -> None:
    replay = walk([12], capacity=10)  # rows 0, 1 are the newest; row 2 the oldest
    batch = replay.draw(3, Given([0, 1, 9]), n_steps=3)  # type: ignore[arg-type]
    assert batch.obs[:, 0].tolist() == [10, 11, 9]
    assert batch.rewards.tolist() == [2 * 1024, 2048, 3 * 512]
    replay = walk([6])
    replay.observations[3, 0] = 77.0  # what follows step 2 begins elsewhere
    batch = replay.draw(1, Given([1]), n_steps=3)  # type: ignore[arg-type]
    assert (batch.rewards.tolist(), batch.next_obs.tolist(), batch.not_done.tolist()) == ([4.0], [[3.0]], [0.5])


def test_pretraining_looks_one_step_ahead() -> None:
    asked: list[int] = []
    one = agent(n_steps=5, learning_starts=0)
    one.collect(10, updates=0)
    draw = one.replay_buffer.draw
    one.replay_buffer.draw = lambda size, rng, reach: asked.append(reach) or draw(size, rng, reach)  # type: ignore
    one.pay_by(None, lambda obs: torch.zeros(len(obs)))
    one.train(1, 8)
    one.pay_by(None)
    one.train(1, 8)
    assert asked == [1, 5]


# ------------------------------------------------------------------------------------------------ overestimation


class Expecting(nn.Module):
    """A critic that expects the same everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.full((len(inputs), 1), self.value)


@pytest.mark.parametrize("excess", [0.0, 0.25, -0.5])
def test_overestimation_is_what_constant_critics_have_too_much(excess: float) -> None:
    one = agent(initial_temperature=1e-12, gamma=0.98)  # no entropy to speak of
    one.collect(400, updates=0)
    one.replay_buffer.rewards[:] = 0.5
    for i in range(2):
        one.critic.q_networks[i] = Expecting((0.5 + excess) / (1 - one.gamma))  # type: ignore[call-overload]
    assert one.overestimation(400, 20) == pytest.approx(excess, abs=1e-5)
    assert np.isnan(one.overestimation(10, 20))


@pytest.mark.parametrize("n", [1, 3])
def test_a_critic_that_is_right_for_its_n_step_target_overestimates_nothing(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """r = 0.5 and −α log π = −0.4 everywhere: Q = r / (1 − γ) − 0.4 γ^n / (1 − γ^n)."""
    one = agent(initial_temperature=0.2, gamma=0.98, n_steps=n)
    one.collect(400, updates=0)
    one.replay_buffer.rewards[:] = 0.5
    monkeypatch.setattr("pbrl.agent.sac.squash", lambda mean, *_: (mean, torch.full((len(mean),), 2.0)))
    value = 0.5 / (1 - 0.98) - 0.4 * 0.98**n / (1 - 0.98**n)
    batch = one.replay_buffer.draw(64, np.random.default_rng(0), n)
    whole = torch.isclose(batch.not_done, torch.tensor(0.98 ** (n - 1)))  # no end of an episode within
    target = (batch.rewards + batch.not_done * 0.98 * (value - 0.2 * 2.0))[whole]
    assert len(target) > 32 and target.numpy() == pytest.approx(value, rel=1e-5), "it is what the update aims at"
    for i in range(2):
        one.critic.q_networks[i] = Expecting(value)  # type: ignore[call-overload]
    assert one.overestimation(400, 20) == pytest.approx(0.0, abs=1e-5)


def test_critics_that_expect_too_much_are_reset_and_updates_follow() -> None:
    calm, anxious = agent(reset_above=1e6, relabel_updates=3), agent(reset_above=-1e6, relabel_updates=3)
    for one in (calm, anxious):
        one.collect(200, updates=0)
        before = one.critic.q_networks[0][0].weight.detach().clone()
        one.relabel_updates, updates = 0, one.relabel_updates
        found = one.after_relabelling(5)
        assert found["train/critic_reset"] == float(one is anxious)
        assert torch.equal(before, one.critic.q_networks[0][0].weight) == (one is calm)
        one.relabel_updates = updates
        one.after_relabelling(5)
        assert one._n_updates == 3


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("agent.critics=3", "agent.critics=3; expected 1 or 2"),
        ("agent.blocks=1", "one width, such as"),
        ("agent.n_steps=0", "agent.n_steps=0; expected at least 1"),
        ("agent.noise_color=3.0", "agent.noise_color=3.0; expected a number from 0"),
        ("agent.weight_decay=-1.0", "agent.weight_decay=-1.0; expected at least 0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(tmp_path: Path, option: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        tiny_loop(tmp_path / "run", option)
