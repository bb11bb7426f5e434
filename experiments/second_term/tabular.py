"""Second terms without score functions where the truth is known: discounted random MDPs, soft-optimal policies.

`exact` compares each with central differences. `sampled` says how far estimates from N transitions are off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pbrl.bilevel import adjoint_weights, linear_values, projected, upper_traces

PAIRS, SEGMENT = 8, 3  # answered pairs, steps of each segment


@dataclass(frozen=True)
class DiscountedMDP:
    """S states, A actions, no end; the lower level maximises E Σ gamma^h (r − alpha log π)."""

    transition: Tensor  # float64 [S, A, S]
    start: Tensor  # float64 [S]
    gamma: float
    alpha: float

    @property
    def size(self) -> int:
        """Number of state-action pairs."""
        return self.transition.shape[0] * self.transition.shape[1]

    def q(self, reward: Tensor) -> Tensor:
        """Q* of the soft Bellman equation, float64 [S, A], by iteration to rounding."""
        q = torch.zeros_like(reward)
        for _ in range(int(np.log(1e-15) / np.log(self.gamma)) + 1):
            q = reward + self.gamma * self.transition @ self.soft_value(q)
        return q

    def soft_value(self, q: Tensor) -> Tensor:
        """V* = alpha log Σ exp(Q / alpha): float64 [S]."""
        return self.alpha * torch.logsumexp(q / self.alpha, -1)

    def policy(self, q: Tensor) -> Tensor:
        """π(a | s), float64 [S, A]."""
        return (q / self.alpha).softmax(-1)

    def flow(self, policy: Tensor) -> Tensor:
        """K[(s, a), (s', a')], float64 [S A, S A]."""
        return (self.transition[..., None] * policy).reshape(self.size, self.size)

    def upper(self, reward: Tensor, utility: Tensor) -> Tensor:
        """U = E Σ gamma^k u(s_k, a_k) under the policy that is soft-optimal for `reward`."""
        policy = self.policy(self.q(reward))
        return (self.start[:, None] * policy).reshape(-1) @ self.values(policy, utility).reshape(-1)

    def values(self, policy: Tensor, utility: Tensor) -> Tensor:
        """Q_U, float64 [S, A]."""
        system = torch.eye(self.size, dtype=torch.float64) - self.gamma * self.flow(policy)
        return torch.linalg.solve(system, utility.reshape(-1)).reshape(utility.shape)

    def occupancy(self, policy: Tensor) -> Tensor:
        """Discounted visits Σ gamma^k P(s_k = s, a_k = a), float64 [S A]."""
        system = torch.eye(self.size, dtype=torch.float64) - self.gamma * self.flow(policy)
        return torch.linalg.solve(system.T, (self.start[:, None] * policy).reshape(-1))


@dataclass(frozen=True)
class Problem:
    """An MDP, the reward that is learned, the upper level's reward, and answered pairs of segments."""

    mdp: DiscountedMDP
    reward: Tensor  # float64 [S, A]
    utility: Tensor  # float64 [S, A]
    states: Tensor  # int64 [2, PAIRS, SEGMENT]
    actions: Tensor
    labels: Tensor  # float64 [PAIRS]


def problem(seed: int, states: int = 5, actions: int = 3, gamma: float = 0.9, alpha: float = 0.5) -> Problem:
    """A random one."""
    rng = np.random.default_rng(seed)
    transition = torch.from_numpy(rng.dirichlet(0.5 * np.ones(states), size=(states, actions)))
    start = torch.from_numpy(rng.dirichlet(np.ones(states)))
    reward, utility = (torch.from_numpy(rng.normal(size=(states, actions))) for _ in range(2))
    shape = (2, PAIRS, SEGMENT)
    visited, taken = (torch.from_numpy(rng.integers(n, size=shape)) for n in (states, actions))
    returns = utility[visited, taken].sum(-1)
    return Problem(
        DiscountedMDP(transition, start, gamma, alpha),
        reward,
        utility,
        visited,
        taken,
        torch.sigmoid(returns[0] - returns[1]),
    )


def explained(given: Problem, q: Tensor, compare: str) -> Tensor:
    """The answers' mean log-likelihood by values, as `critic_pairs` has it; scalar."""
    if compare == "value":
        value = q[given.states[..., 0], given.actions[..., 0]]
    else:
        advantage = q - given.mdp.soft_value(q)[:, None]
        discounts = given.mdp.gamma ** torch.arange(SEGMENT, dtype=torch.float64)
        value = advantage[given.states, given.actions] @ discounts
    margin = value[0] - value[1]
    return (given.labels * logsigmoid(margin) + (1 - given.labels) * logsigmoid(-margin)).mean()


def through_pairs(given: Problem, compare: str) -> Tensor:
    """∂L/∂Q for the adjoint, float64 [S A]."""
    q = given.mdp.q(given.reward).requires_grad_()
    return torch.autograd.grad(explained(given, q, compare), q)[0].reshape(-1)


def centrally(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function, shaped like `at`."""
    found = torch.zeros_like(at)
    for i in range(at.numel()):
        shift = torch.zeros_like(at).view(-1)
        shift[i] = step
        rise = function(at + shift.view_as(at)) - function(at - shift.view_as(at))
        found.view(-1)[i] = rise / (2 * step)
    return found


def exact_pairs(given: Problem, compare: str) -> Tensor:
    """λ = (I − gamma Kᵀ)⁻¹ ∂L/∂Q through `adjoint_weights` on the whole table: float64 [S A]."""
    mdp = given.mdp
    table = torch.eye(mdp.size, dtype=torch.float64)
    flow = mdp.flow(mdp.policy(mdp.q(given.reward)))
    return adjoint_weights(table, flow, through_pairs(given, compare), mdp.gamma)


def exact_adjoint(given: Problem) -> Tensor:
    """∂U/∂r = (I − gamma Kᵀ)⁻¹ (d π A_U) / alpha on the whole table: float64 [S A]."""
    mdp = given.mdp
    policy = mdp.policy(mdp.q(given.reward))
    flow, table = mdp.flow(policy), torch.eye(mdp.size, dtype=torch.float64)
    values = linear_values(table, flow, given.utility.reshape(-1), mdp.gamma).reshape(given.utility.shape)
    advantage = values - (policy * values).sum(1, keepdim=True)
    return adjoint_weights(table, flow, mdp.occupancy(policy) * advantage.reshape(-1), mdp.gamma) / mdp.alpha


def low_directions(given: Problem) -> Tensor:
    """Three members' rewards and their deviation, float64 [S A, 4]."""
    rng = np.random.default_rng(0)
    members = given.reward.reshape(-1, 1) + torch.from_numpy(0.3 * rng.normal(size=(given.mdp.size, 3)))
    return torch.cat([members, members.std(1, keepdim=True)], 1)


def exact(seeds: int) -> list[dict]:
    """Relative errors to central differences."""
    rows = []
    for seed in range(seeds):
        given = problem(seed)
        mdp = given.mdp

        def upper(reward: Tensor, given: Problem = given) -> Tensor:
            return given.mdp.upper(reward, given.utility)

        for compare in ("advantage", "value"):

            def fitted(reward: Tensor, given: Problem = given, compare: str = compare) -> Tensor:
                return explained(given, given.mdp.q(reward), compare)

            truth = centrally(fitted, given.reward).reshape(-1)
            rows.append(_error(f"critic-pairs ({compare})", seed, exact_pairs(given, compare), truth))
        weights = exact_adjoint(given)
        rows.append(_error("critic-adjoint", seed, weights, centrally(upper, given.reward).reshape(-1)))
        basis = low_directions(given)

        def along(eta: Tensor, given: Problem = given, basis: Tensor = basis) -> Tensor:
            return given.mdp.upper(given.reward + (basis @ eta).reshape(given.reward.shape), given.utility)

        slopes = centrally(along, torch.zeros(basis.shape[1], dtype=torch.float64))
        rows.append(_error("low-dimensional", seed, basis.T @ projected(weights, basis), slopes))
        assert mdp.size == len(weights)
    return rows


def _error(estimator: str, seed: int, found: Tensor, truth: Tensor) -> dict:
    return {"estimator": estimator, "seed": seed, "relative_error": float((found - truth).norm() / truth.norm())}


def transitions(given: Problem, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`count` uniformly drawn state-action pairs, and one successor each with an action of the policy: one-hot rows."""
    mdp = given.mdp
    flow = mdp.flow(mdp.policy(mdp.q(given.reward))).numpy().cumsum(1)
    here = rng.integers(mdp.size, size=count)
    there = (flow[here] < rng.random((count, 1))).sum(1).clip(max=mdp.size - 1)
    table = torch.eye(mdp.size, dtype=torch.float64)
    return table[here], table[there]


def trajectories(given: Problem, count: int, length: int, rng: np.random.Generator) -> Tensor:
    """State-action indices of `count` trajectories of the policy: int64 [count, length]."""
    mdp = given.mdp
    policy = mdp.policy(mdp.q(given.reward))
    flow = mdp.flow(policy).numpy().cumsum(1)
    first = (mdp.start[:, None] * policy).reshape(-1).numpy()
    at = rng.choice(mdp.size, size=count, p=first / first.sum())
    found = [at]
    for _ in range(length - 1):
        at = (flow[at] < rng.random((count, 1))).sum(1).clip(max=mdp.size - 1)
        found.append(at)
    return torch.from_numpy(np.stack(found, 1))


def estimates(given: Problem, steps: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Every estimate of ∂/∂r from `steps` transitions, float64 [S A] (low-dimensional: its 4 slopes)."""
    mdp, length = given.mdp, 50
    table = torch.eye(mdp.size, dtype=torch.float64)
    here, there = transitions(given, steps, rng)
    found = {}
    for compare in ("advantage", "value"):
        weights = adjoint_weights(here, there, through_pairs(given, compare), mdp.gamma, 1e-3)
        found[f"critic-pairs ({compare})"] = here.T @ weights
    policy = mdp.policy(mdp.q(given.reward))
    utility = here @ given.utility.reshape(-1)
    index = trajectories(given, max(steps // length, 1), length, rng)
    mask = torch.ones(index.shape, dtype=torch.bool)

    def advantage_of(values: Tensor) -> Tensor:
        q = values.reshape(policy.shape)
        return (q - (policy * q).sum(1, keepdim=True)).reshape(-1)[index]

    fitted = linear_values(here, there, utility, mdp.gamma, 1e-3)
    for name, values, decay in (
        ("critic-adjoint, exact A_U, λ 1", mdp.values(policy, given.utility).reshape(-1), 1.0),
        ("critic-adjoint, λ 1", fitted, 1.0),
        ("critic-adjoint, λ 0.9", fitted, 0.9),
    ):
        w = upper_traces(advantage_of(values), mask, mdp.gamma, mdp.gamma * decay) / (mdp.alpha * len(index))
        found[name] = (table[index] * w[..., None]).sum((0, 1))
    found["low-dimensional, λ 1"] = low_directions(given).T @ found["critic-adjoint, λ 1"]
    return found


def sampled(sizes: tuple[int, ...], repeats: int, seeds: int) -> list[dict]:
    """Relative bias (of the mean over repeats), root-mean-square error and mean cosine, averaged over MDPs."""
    found: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    for seed in range(seeds):
        given = problem(seed)
        adjoint = exact_adjoint(given)
        truths = {f"critic-pairs ({c})": exact_pairs(given, c) for c in ("advantage", "value")}
        rng = np.random.default_rng(seed)
        for steps in sizes:
            drawn = [estimates(given, steps, rng) for _ in range(repeats)]
            for name in drawn[0]:
                truth = truths.get(name, adjoint)
                truth = low_directions(given).T @ adjoint if name.startswith("low") else truth
                values = torch.stack([one[name] for one in drawn])
                size = truth.norm()
                spread = float(values.var(0).sum().sqrt() / size)
                found.setdefault((name, steps), []).append(
                    (
                        float((values.mean(0) - truth).norm() / size),
                        spread / repeats**0.5,
                        float((values - truth).square().sum(1).mean().sqrt() / size),
                        float((values @ truth / (values.norm(dim=1) * size)).mean()),
                    )
                )
    names = ("bias", "bias_noise", "rms_error", "cosine")
    return [
        {"estimator": name, "steps": steps} | dict(zip(names, (round(float(x), 4) for x in np.mean(v, 0)), strict=True))
        for (name, steps), v in found.items()
    ]
