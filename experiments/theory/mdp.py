"""Finite-horizon MDPs small enough to enumerate every trajectory: V, G and theta* are exact, in float64.

The policy has logits per step, state and action, so the soft-optimal policy is in its class and follows from one
backward induction; d/dphi G(phi, theta*(phi)) is then known to rounding, by finite differences or automatically.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pbrl.bilevel import Objective, preference_surrogate, value_surrogate
from pbrl.types import Params


@dataclass(frozen=True)
class EnumeratedMDP:
    """S states, A actions, H steps; N trajectories of positive probability."""

    transition: Tensor  # float64 [S, A, S]
    task_reward: Tensor  # float64 [S, A]: what the teacher judges by
    horizon: int  # steps, H
    gamma: float  # discount per step of V; segment returns R_phi are not discounted
    alpha: float  # weight of the entropy bonus
    states: Tensor  # int64 [N, H]
    actions: Tensor  # int64 [N, H]
    log_dynamics: Tensor  # float64 [N]: log-probability of the start state and of the transitions
    labels: Tensor  # float64 [N, N]: y, the probability that the teacher prefers i to j (Bradley–Terry)

    @property
    def mask(self) -> Tensor:
        """All steps of all trajectories: bool [N, H]."""
        return torch.ones(self.states.shape, dtype=torch.bool)

    def log_prob(self, theta: Params, index: Tensor | slice = slice(None)) -> Tensor:
        """log π_theta along the trajectories `index`, float64 [n, H]."""
        steps = torch.arange(self.horizon)
        return theta["logits"].log_softmax(-1)[steps, self.states[index], self.actions[index]]

    def probabilities(self, theta: Params) -> Tensor:
        """Of each trajectory under π_theta, float64 [N]."""
        return (self.log_dynamics + self.log_prob(theta).sum(1)).exp()

    def rewards(self, phi: Params, index: Tensor | slice = slice(None)) -> Tensor:
        """r_phi along the trajectories, float64 [n, H]."""
        return phi["r"][self.states[index], self.actions[index]]

    def log_likelihood(self, phi: Params, first: Tensor, second: Tensor) -> Tensor:
        """f of the pairs (first, second), given as trajectory indices that broadcast."""
        returns = self.rewards(phi).sum(1)
        return log_likelihood(returns[first], returns[second], self.labels[first, second])

    def value(self, phi: Params, theta: Params) -> Tensor:
        """V(phi, theta), exact."""
        discounts = self.gamma ** torch.arange(self.horizon, dtype=torch.float64)
        soft = self.rewards(phi) - self.alpha * self.log_prob(theta)
        return self.probabilities(theta) @ (soft @ discounts)

    def preference(self, phi: Params, theta: Params) -> Tensor:
        """G(phi, theta), exact: both segments of a pair are drawn from π_theta."""
        p, every = self.probabilities(theta), torch.arange(len(self.states))
        return p @ self.log_likelihood(phi, every[:, None], every[None, :]) @ p

    def exact(self, phi: Params, theta: Params) -> tuple[Objective, Objective]:
        """A sampler that returns the exact objectives, wherever it is asked."""
        return self.preference, self.value

    def soft_optimal(self, phi: Params) -> Params:
        """theta*(phi) = argmax V(phi, ·) by backward induction; differentiable in phi. logits: float64 [H, S, A]."""
        q, found = phi["r"], []
        for _ in range(self.horizon):
            found.append(q / self.alpha)
            v = self.alpha * torch.logsumexp(q / self.alpha, -1)
            q = phi["r"] + self.gamma * self.transition @ v
        return {"logits": torch.stack(found[::-1]).log_softmax(-1)}

    def state_weights(self, theta: Params) -> Tensor:
        """gamma^h P(s_h = s), float64 [H, S]: the weights of the Fisher matrix."""
        p, steps = self.probabilities(theta), torch.arange(self.horizon)
        weights = torch.zeros(self.horizon, len(self.transition), dtype=p.dtype)
        return weights.index_put(
            (steps.expand_as(self.states), self.states),
            (p[:, None] * self.gamma ** steps.double()).detach(),
            accumulate=True,
        )

    def draw(self, theta: Params, count: int, generator: torch.Generator) -> Tensor:
        """Indices of `count` trajectories sampled with π_theta, int64 [count]."""
        return torch.multinomial(self.probabilities(theta).detach(), count, replacement=True, generator=generator)

    def sampled(self, theta: Params, count: int, generator: torch.Generator) -> tuple[Objective, Objective]:
        """Ĝ on `count` sampled pairs and V̂ on `count` other trajectories, all drawn with this theta (cross-fitted)."""
        first, second, rollout = (self.draw(theta, count, generator) for _ in range(3))
        mask = torch.ones(count, self.horizon, dtype=torch.bool)

        def upper(phi: Params, theta: Params) -> Tensor:
            f = self.log_likelihood(phi, first, second)
            return preference_surrogate(self.log_prob(theta, first), self.log_prob(theta, second), f)

        def lower(phi: Params, theta: Params) -> Tensor:
            return value_surrogate(
                self.log_prob(theta, rollout), self.rewards(phi, rollout), mask, self.gamma, self.alpha
            )

        return upper, lower


def log_likelihood(first: Tensor, second: Tensor, prefers_first: Tensor) -> Tensor:
    """f = y log P + (1 − y) log(1 − P) with P = sigmoid(R_first − R_second), PARL (6)–(7); in nats."""
    difference = first - second
    log_sigmoid = torch.nn.functional.logsigmoid
    return prefers_first * log_sigmoid(difference) + (1 - prefers_first) * log_sigmoid(-difference)


def enumerated(
    transition: Tensor, start: Tensor, task_reward: Tensor, *, horizon: int, gamma: float, alpha: float
) -> EnumeratedMDP:
    """All trajectories of the MDP; transition float64 [S, A, S], start float64 [S], task_reward float64 [S, A]."""
    n_states, n_actions = task_reward.shape
    sizes = (n_states, n_actions) * horizon
    grid = torch.from_numpy(np.indices(sizes).reshape(2 * horizon, -1).T.copy())
    states, actions = grid[:, 0::2], grid[:, 1::2]
    moves = transition[states[:, :-1], actions[:, :-1], states[:, 1:]]
    log_dynamics = start[states[:, 0]].log() + moves.log().sum(1)
    possible = log_dynamics.isfinite()
    states, actions = states[possible], actions[possible]
    returns = task_reward[states, actions].sum(1)
    labels = torch.sigmoid(returns[:, None] - returns[None, :])
    return EnumeratedMDP(
        transition, task_reward, horizon, gamma, alpha, states, actions, log_dynamics[possible], labels
    )


def random_mdp(
    seed: int,
    *,
    n_states: int = 3,
    n_actions: int = 2,
    horizon: int = 3,
    gamma: float = 0.9,
    alpha: float = 0.5,
    deterministic: bool = False,
) -> tuple[EnumeratedMDP, Params]:
    """A random MDP, and a reward phi unlike the task's."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(n_states), size=(n_states, n_actions))
    start = np.full(n_states, 1 / n_states)
    if deterministic:
        transition = np.eye(n_states)[rng.integers(n_states, size=(n_states, n_actions))]
        start = np.eye(n_states)[0]
    task_reward = torch.from_numpy(rng.normal(size=(n_states, n_actions)))
    mdp = enumerated(
        torch.from_numpy(transition),
        torch.from_numpy(start),
        task_reward,
        horizon=horizon,
        gamma=gamma,
        alpha=alpha,
    )
    return mdp, {"r": torch.from_numpy(rng.normal(size=(n_states, n_actions)))}


def total_gradient(mdp: EnumeratedMDP, phi: Params) -> Params:
    """d/dphi G(phi, theta*(phi)) by differentiating through the closed-form theta*."""
    free = {"r": phi["r"].detach().clone().requires_grad_()}
    (found,) = torch.autograd.grad(mdp.preference(free, mdp.soft_optimal(free)), [free["r"]])
    return {"r": found}


def central_difference(mdp: EnumeratedMDP, phi: Params, step: float = 1e-5) -> Params:
    """The same by central differences: error about step² + 1e-16 / step, relative to derivatives of order one."""
    found = torch.zeros_like(phi["r"])
    for i in range(found.numel()):
        shift = torch.zeros_like(found).view(-1)
        shift[i] = step
        up, down = ({"r": phi["r"] + sign * shift.view_as(found)} for sign in (1, -1))
        rise = mdp.preference(up, mdp.soft_optimal(up)) - mdp.preference(down, mdp.soft_optimal(down))
        found.view(-1)[i] = rise / (2 * step)
    return {"r": found}
