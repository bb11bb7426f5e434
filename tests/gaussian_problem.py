"""A two-step problem with Gaussian actions whose hypergradient is known: exact Term 2 by quadrature, sampled sessions.

Step h visits state h whatever is done (deterministic dynamics, one start state); r_phi = A_h a − ½ B_h a². With gamma 1
the soft-optimal policy is N(A_h / B_h, alpha / B_h) and lies in the policy's class.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Answer, Query, Segments

ALPHA = 0.5
STEPS = 2
TASK = torch.tensor([1.0, -0.7])  # the teacher's reward is TASK_h a
A, B = torch.tensor([0.3, 0.2]), torch.tensor([1.2, 0.8])


class Quadratic(nn.Module):
    """r_phi for rows of (one-hot state, action)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, rows: Tensor) -> Tensor:
        obs, action = rows[..., :STEPS], rows[..., STEPS:]
        return (obs @ self.a)[..., None] * action - 0.5 * (obs @ self.b)[..., None] * action.square()


def quadratic_reward() -> RewardEnsemble:
    reward = RewardEnsemble(STEPS, 1, members=1, hidden=(2,))
    reward.members = nn.ModuleList([Quadratic()])
    reward.optimizer = torch.optim.Adam(reward.parameters(), lr=1e-3)
    return reward


def soft_optimal(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {"mean": a / b, "log_std": 0.5 * torch.log(ALPHA / b)}


class GaussianPolicy:
    """A `PolicyView` at theta: independent Gaussians per state; actions are not squashed here."""

    gamma, alpha = 1.0, ALPHA

    def __init__(self) -> None:
        self.theta = soft_optimal(A, B)

    def parameters(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.theta.items()}

    def distribution(self, theta, obs):
        return (obs @ theta["mean"])[..., None], (obs @ theta["log_std"])[..., None]

    def log_prob(self, theta, obs, raw_actions):
        mean, log_std = self.distribution(theta, obs)
        return (-0.5 * ((raw_actions - mean) / log_std.exp()).square() - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)

    def objective(self, theta, obs, noise):
        """E[r_phi − alpha log π] at the states: what SAC's critic would say, as no action changes what follows."""
        mean, log_std = self.distribution(theta, obs)
        action = mean + log_std.exp() * noise
        value = (obs @ A)[:, None] * action - 0.5 * (obs @ B)[:, None] * action.square()
        return (value + ALPHA * log_std).mean()


class GaussianSession:
    """A `Session` of that policy: `episodes` episodes, of which the teacher compared consecutive ones in pairs.

    Args:
        pairs: how many; by default every episode is in one.
    """

    env_step = 0

    def __init__(self, seed: int, episodes: int = 64, pairs: int | None = None) -> None:
        self.rng, self.policy = np.random.default_rng(seed), GaussianPolicy()
        rolled = self._roll(self.policy.theta, episodes)
        self.episodes = replace(rolled, step=seed * 10**6 + STEPS * torch.arange(episodes))
        self.pairs = episodes // 2 if pairs is None else pairs
        self.rolled = 0

    def _roll(self, theta: dict[str, Tensor], count: int) -> Segments:
        obs = torch.eye(STEPS).expand(count, STEPS, STEPS).contiguous()
        raw = theta["mean"] + theta["log_std"].exp() * self.normal(count, STEPS)
        return Segments(obs, raw[..., None], raw[..., None])

    def preferences(self) -> Preferences:
        first, second = (self.episodes[side : 2 * self.pairs : 2] for side in (0, 1))
        labels = torch.sigmoid(task_return(first) - task_return(second))
        size = len(labels)
        states, fresh = torch.zeros(size, 2, 1, dtype=torch.float64), torch.ones(size, dtype=torch.bool)
        query = Query(first, second, torch.zeros(size, 2, STEPS), states=states, fresh=fresh)
        stored = Preferences()
        stored.add(query, Answer(labels, torch.ones(size, dtype=torch.bool)), 0)
        return stored

    def normal(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))

    def fresh(self) -> list[Segments]:
        return [self.episodes[i : i + 1] for i in range(len(self.episodes))]

    def rollout(self, theta, steps):
        self.rolled += steps
        found = self._roll(theta, steps // STEPS)
        return [found[i : i + 1] for i in range(len(found))]

    def branches_from(self, states, branches, length):
        return self._roll(self.policy.theta, len(states) * branches)

    def transitions(self, count):
        return {"obs": torch.eye(STEPS).repeat(count // STEPS, 1)}


def task_return(segments: Segments) -> Tensor:
    return (segments.actions[..., 0] * TASK).sum(1)


def quadrature(nodes: int = 14) -> tuple[Tensor, Tensor]:
    """Standard normal nodes [Q, STEPS] and weights [Q] for one trajectory's noise."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.cartesian_prod(*[torch.from_numpy(z)] * STEPS)
    weight = torch.cartesian_prod(*[torch.from_numpy(w / w.sum())] * STEPS).prod(1)
    return grid, weight


def exact_terms(upper: str) -> tuple[Tensor, Tensor]:
    """∂_phi G and the rest of dG(phi, theta*(phi))/dphi, float64 [2 STEPS] each: the derivatives in A, then in B."""
    z, w = quadrature()
    a, b = A.double().requires_grad_(), B.double().requires_grad_()

    def returns(action: Tensor) -> Tensor:
        return (a * action - 0.5 * b * action.square()).sum(1)

    def objective(theta: dict[str, Tensor], opponent: dict[str, Tensor]) -> Tensor:
        own, other = (t["mean"] + t["log_std"].exp() * z for t in (theta, opponent))
        y = torch.sigmoid((own @ TASK.double())[:, None] - (other @ TASK.double())[None])
        if upper == "win_rate":
            return w @ y @ w
        logits = returns(own)[:, None] - returns(other)[None]
        f = -torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        return w @ f @ w

    fixed = {name: value.detach() for name, value in soft_optimal(a, b).items()}
    moving = soft_optimal(a, b)
    direct = (
        torch.autograd.grad(objective(fixed, fixed), (a, b), allow_unused=True, materialize_grads=True)
        if (upper == "preference")
        else (torch.zeros_like(a), torch.zeros_like(b))
    )
    total = torch.autograd.grad(objective(moving, fixed if upper == "win_rate" else moving), (a, b))
    return torch.cat(direct), torch.cat(total) - torch.cat(direct)


def assert_unbiased(samples: list[np.ndarray], truth: np.ndarray, z: float = 4.5) -> None:
    """The mean of independent estimates lies within z standard errors of the truth, in every coordinate.

    4.5 errors with some 30 samples: a false alarm about once in 10⁴ runs per coordinate (t distribution).
    """
    stacked = np.stack(samples)
    error = stacked.std(0, ddof=1) / np.sqrt(len(stacked))
    np.testing.assert_array_less(np.abs(stacked.mean(0) - truth), z * error)
    assert np.linalg.norm(error) < 0.3 * np.linalg.norm(truth), "too noisy to tell anything"
