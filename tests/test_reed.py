"""REED: the encoder learns the dynamics and carries the reward."""

from __future__ import annotations

import numpy as np
import pytest
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


def test_the_contrastive_loss_is_the_cross_entropy_of_the_next_state_among_the_batchs() -> None:
    reward = DynamicsAwareReward(2, 2, hidden=[8], embedding=8, contrastive_temperature=0.5)
    batch = session(seed=9).transitions(6)
    told = reward.predictor(reward.encode(batch["obs"], batch["actions"])).detach().double().numpy()
    meant = reward._state(batch["next_obs"]).detach().double().numpy()
    cosine = told @ meant.T / np.outer(np.linalg.norm(told, axis=1), np.linalg.norm(meant, axis=1))
    odds = np.exp(cosine / 0.5)
    expected = -np.log(np.diag(odds) / odds.sum(1)).mean()
    loss = reward.dynamics_loss(batch["obs"], batch["actions"], batch["next_obs"])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    moved = {name.split(".")[0] for name, p in reward.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"state_encoder", "action_encoder", "joint", "predictor"}


def test_the_contrastive_encoder_tells_next_states_apart() -> None:
    options = {"hidden": [16], "embedding": 32, "max_updates": 200, "dynamics_batch_size": 64}
    reward = DynamicsAwareReward(2, 2, contrastive_temperature=0.1, **options)  # type: ignore[arg-type]
    batch = session(seed=9).transitions(64)
    before = float(reward.dynamics_loss(**batch_of(batch)).detach())
    reward.pretrain(session())
    assert float(reward.dynamics_loss(**batch_of(batch)).detach()) < before - 1


def batch_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("obs", "actions", "next_obs")}


@pytest.mark.parametrize("bad", [{"contrastive_temperature": 0.0}, {"max_updates": 0}])
def test_reeds_numbers_out_of_range_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"reward.{next(iter(bad))}="):
        DynamicsAwareReward(2, 2, **bad)  # type: ignore[arg-type]


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
