"""MRN (Liu et al., NeurIPS 2022): PEBBLE, and between sessions the reward is bent to make critics rank the answers.

Lower level: one gradient step of the critics on the Bellman error, which depends on the reward. Upper level: the moved
critics' values of each segment's first step should predict the answer. The reward's gradient flows through the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pbrl.bilevel.params import combine, gradient, leaves, linearize
from pbrl.checks import check
from pbrl.fitting import Fitting
from pbrl.interfaces import Updater
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Params, Session

Values = Callable[[Params], Tensor]  # critic parameters -> both critics' values, [2, B]


def critic_step(values: Values, critic: Params, target: Tensor, step_size: float) -> Params:
    """The critics after one plain gradient step on L = Σ_i mean_b (Q_i − y_b)².

    Args:
        target: y_b = r_b + gamma V(s'_b), [B].
    """
    theta = leaves(critic)
    return combine(critic, gradient((values(theta) - target).square().mean(dim=1).sum(), theta), -step_size)


def reward_weights(values: Values, critic: Params, direction: Params, step_size: float) -> Tensor:
    """dU/dr_b of an outer loss U(theta') through theta' = theta − step_size · dL/dtheta, in closed form.

        dU/dr_b = (2 step_size / B) Σ_i ⟨∇_theta Q_i(s_b, a_b; theta), g⟩,   g = dU/dtheta'

    because dL/dtheta is linear in the rewards: one Jacobian-vector product, no Hessian.

    Args:
        values: the batch's values by the critics. critic: theta. direction: g, by name.

    Returns:
        [B].
    """
    _, forward, _ = linearize(values, critic)
    (change,) = forward(direction)
    return 2 * step_size / change.shape[1] * change.sum(dim=0)


def outer_loss(predicted: Tensor, labels: Tensor) -> Tensor:
    """U = Σ_i CE(Q_i(first) − Q_i(second), label): [] in nats, for log-odds [2, N] and labels [N] (1: the first)."""
    losses = F.binary_cross_entropy_with_logits(predicted, labels.expand_as(predicted), reduction="none")
    return losses.mean(dim=1).sum()


class Mrn(Updater):
    """PEBBLE's update at each session; between sessions, while questions are left, one step on the outer loss.

    A meta-step that falls on a session's step comes after it. Two departures: the next SAC update draws a batch of its
    own, where the published code takes the meta-step's; and a time limit is no end of the episode (the published code
    treats it as one in this step only).

    Args:
        fit, pairs: as in `Pebble`.
        meta_every: environment steps between meta-steps.
        meta_batch_size: transitions of the critics' step.
        meta_pairs: latest answered pairs in the outer loss (MRN: as many as a session has).
        critic_learning_rate: of the critics' step (MRN: the agent's).
        outer_weight: of the outer loss.
    """

    def __init__(
        self,
        *,
        fit: Fitting,
        pairs: str,
        meta_every: int,
        meta_batch_size: int,
        meta_pairs: int,
        critic_learning_rate: float,
        outer_weight: float,
    ) -> None:
        check(
            "updater",
            pairs=(pairs, pairs in ("buffer", "fresh"), "buffer or fresh"),
            meta_every=(meta_every, meta_every >= 1, "at least 1"),
            meta_batch_size=(meta_batch_size, meta_batch_size >= 1, "at least 1"),
            meta_pairs=(meta_pairs, meta_pairs >= 1, "at least 1"),
            critic_learning_rate=(critic_learning_rate, critic_learning_rate > 0, "a number above 0"),
        )
        self.fit, self.pairs = fit, pairs
        self.between_every, self.meta_batch_size, self.meta_pairs = meta_every, meta_batch_size, meta_pairs
        self.critic_learning_rate, self.outer_weight = critic_learning_rate, outer_weight

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Train every member on all answers; returns `train_epochs`' metrics."""
        return self.fit(reward, preferences, session.rng)

    def between(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """One Adam step of the reward on the outer loss; returns mrn/outer_loss, before the step."""
        policy, batch = session.policy, session.transitions(self.meta_batch_size)
        obs, actions, critic = batch["obs"], batch["actions"], policy.critic_parameters()
        following = policy.next_value(batch["next_obs"], session.normal(*actions.shape).to(actions.device))
        with torch.no_grad():
            target = reward.pay.convex(reward.mean(obs, actions)) + policy.gamma * batch["not_done"] * following
        latest = slice(max(len(preferences) - self.meta_pairs, 0), len(preferences))
        sides = preferences.first[latest], preferences.second[latest]
        starts = [(side.obs[:, 0].to(obs.device), side.actions[:, 0].to(obs.device)) for side in sides]

        def values(theta: Params) -> Tensor:
            return policy.q_values(theta, obs, actions)

        labels = preferences.prefers_first[latest].to(obs.device)
        moved = leaves(critic_step(values, critic, target, self.critic_learning_rate))
        predicted = policy.q_values(moved, *starts[0]) - policy.q_values(moved, *starts[1])
        loss = self.outer_weight * outer_loss(predicted, labels)
        weights = reward_weights(values, critic, gradient(loss, moved), self.critic_learning_rate)
        reward.optimizer.zero_grad(set_to_none=True)
        (weights * reward.pay.convex(reward.mean(obs, actions))).sum().backward()
        reward.optimizer.step()
        return {"mrn/outer_loss": float(loss.detach())}
