"""REED: the encoder learns the dynamics and carries the reward."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pbrl.reed import DynamicsAwareReward
from tests.conftest import option
from tests.preference_problem import answered, segments, session


def test_reeds_encoder_learns_the_dynamics_and_moves_the_reward() -> None:
    reward = DynamicsAwareReward(2, 2, members=2, hidden=[16], embedding=32, max_updates=300, dynamics_batch_size=64)
    batch = session(seed=9).transitions(500)
    obs, actions, following = batch["obs"], batch["actions"], batch["next_obs"]

    def loss(next_obs: Tensor) -> float:
        return float(reward.dynamics_loss(obs, actions, next_obs).detach())

    before, paid = loss(following), reward.mean(obs, actions).detach()
    reward.pretrain(session())
    assert loss(following) < min(before - 0.3, -0.9)
    assert loss(following.flip(0)) > loss(following) + 0.3, "it tells next states apart: no collapse"
    assert not torch.equal(reward.mean(obs, actions).detach(), paid), "the heads stand on the same encoder"


def test_reeds_members_share_the_encoder_and_answers_train_it() -> None:
    reward = DynamicsAwareReward(2, 2, members=3, hidden=[16], embedding=16, seed=3, learning_rate=3e-3)
    steps = segments(4, 5, np.random.default_rng(0))
    both = reward(steps.obs, steps.actions)
    assert both.shape == (3, 4, 5)
    for m in range(3):
        torch.testing.assert_close(both[m], reward.member(m, steps.obs, steps.actions))
    before = reward.joint[0].weight.detach().clone()  # type: ignore[union-attr]
    metrics = option("updater", "pebble-published", fit={"epochs": 30}).update(reward, answered(60), session())
    assert not torch.equal(before, reward.joint[0].weight)  # type: ignore[union-attr]
    assert metrics["reward/accuracy"] > 0.8


def test_reeds_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    one = DynamicsAwareReward(2, 2, hidden=[8], embedding=8, seed=5).state_dict()
    torch.manual_seed(2)
    two = DynamicsAwareReward(2, 2, hidden=[8], embedding=8, seed=5).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
