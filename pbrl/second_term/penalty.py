"""The penalty method's second policy on a robot, and the bracket it gives (BRL eq. 10–14, Algorithm 1).

    theta_sigma ≈ argmax V(phi, ·) + sigma G(phi, ·)
    Term 2 = −[∂_phi V(phi, theta) − ∂_phi V(phi, theta_sigma)] / sigma,   ∂_phi V = E Σ_h gamma^h ∂_phi r_phi(s_h, a_h)

G is maximised; BRL's own sign of the bracket, and its errata: `pbrl.bilevel.penalty`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pbrl.bilevel.params import leaves
from pbrl.bilevel.penalty import normalized_ascent
from pbrl.bilevel.surrogates import discounted_weights
from pbrl.checks import check
from pbrl.second_term.fresh import Trajectories
from pbrl.second_term.guard import WeightedRows
from pbrl.types import Params, PolicyView, Session


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How theta_sigma is found: normalised steps from theta (BRL Lemma 1).

    Args:
        steps: K, actor gradients per walk.
        scale: length of the first step, in units of theta; step k has scale / k, all together scale · (ln K + 0.6).
        states: replay states per gradient of V.
        trajectory_length: environment steps per trajectory of V; episodes are cut to it.
        twin: let theta climb V by the same K steps, as in BRL's Algorithm 1, and roll that policy out too. Without it
            the fresh rollouts stand for theta, and as theta_sigma climbs V besides G, the bracket then also holds
            whatever SAC had still to gain: a reproducible difference that has nothing to do with G.
        rollout_steps: environment steps per session, shared by the rollouts of theta_sigma and the twin.

    Raises:
        ValueError: for a number out of range.
    """

    steps: int
    scale: float
    states: int
    trajectory_length: int
    twin: bool
    rollout_steps: int

    def __post_init__(self) -> None:
        check(
            "walk",
            steps=(self.steps, self.steps >= 1, "at least 1"),
            states=(self.states, self.states >= 1, "at least 1"),
            trajectory_length=(self.trajectory_length, self.trajectory_length >= 1, "at least 1"),
            scale=(self.scale, self.scale > 0, "a positive number"),
            rollout_steps=(self.rollout_steps, self.rollout_steps >= 4, "at least 4"),
        )


Draws = list[tuple[Tensor, Tensor]]  # replay states [B, obs_dim] and action noise [B, act_dim] of each step of a walk


def draw(walk: Walk, session: Session, act_dim: int, device: torch.device) -> Draws:
    """The random numbers of a walk; theta_sigma and its twin use the same, so that they cancel in the bracket."""
    obs = [session.transitions(walk.states)["obs"].to(device) for _ in range(walk.steps)]
    return [(o, session.normal(len(o), act_dim).to(device)) for o in obs]


def climb(
    walk: Walk,
    policy: PolicyView,
    draws: Draws,
    upper: Callable[[Params], Tensor] | None,
    divergence: Callable[[Params, Tensor], Tensor] | None = None,
) -> Params:
    """The policy's parameters after normalised ascent on V + upper − divergence.

    V's gradient is SAC's actor objective on replay states, a value per state, times the discounted number of steps in a
    trajectory.

    Args:
        upper: theta -> sigma G, scalar []; None for the twin. The score function on recorded steps has no importance
            weights: the walk is short.
        divergence: (theta, states) -> what is taken off, scalar [].

    Raises:
        FloatingPointError: if a gradient is not finite.
    """
    steps, drawn = discounted_steps(policy.gamma, walk.trajectory_length), iter(draws)

    def objective(theta: Params) -> Tensor:
        obs, noise = next(drawn)
        value = steps * policy.objective(theta, obs, noise)
        if upper is not None:
            value = value + upper(theta)
        return value if divergence is None else value - divergence(theta, obs)

    return normalized_ascent(objective, policy.parameters(), walk.steps, walk.scale)


def discounted_steps(gamma: float, steps: int) -> float:
    """Σ_{h < steps} gamma^h."""
    return sum(gamma**h for h in range(steps))


def bracket(present: Trajectories, penalised: Trajectories, half: int, gamma: float, sigma: float) -> WeightedRows:
    """One half's estimate of Term 2: theta_sigma's discounted rewards less theta's, over sigma.

    Both sides' weights are scaled to sum to the same, so that a constant reward, which no policy can change, has no
    gradient however the episodes were cut. `present` may hold the steps whose scores made theta_sigma: the two enter a
    difference of means, not a product, so nothing is counted twice in expectation.
    """
    steps = max(present.mask.shape[1], penalised.mask.shape[1])
    parts = []
    for trajectories, sign in ((penalised, 1.0), (present, -1.0)):
        mask = trajectories.mask
        weights = torch.zeros(2, int(mask.sum()), device=mask.device)
        discounts = discounted_weights(mask, gamma)[mask]
        weights[half] = ((sign / sigma) * discounted_steps(gamma, steps) * discounts / discounts.sum()).float()
        parts.append(WeightedRows(trajectories.obs[mask], trajectories.actions[mask], weights))
    return WeightedRows.cat(parts)


def divergence_from(reference: Params, policy: PolicyView, weight: float) -> Callable[[Params, Tensor], Tensor]:
    """(theta, states) -> weight · mean KL(π_theta ‖ π_reference), in nats: of the Gaussians before the tanh, which
    changes no KL."""

    def divergence(theta: Params, obs: Tensor) -> Tensor:
        with torch.no_grad():
            mean_ref, log_std_ref = policy.distribution(reference, obs)
        mean, log_std = policy.distribution(theta, obs)
        spread = (2 * (log_std - log_std_ref)).exp() + ((mean - mean_ref) / log_std_ref.exp()).square()
        return weight * (log_std_ref - log_std + 0.5 * (spread - 1)).sum(-1).mean()

    return divergence


def copied(params: Params) -> Params:
    """Detached copies, for keeping."""
    return {name: value.detach() for name, value in leaves(params).items()}
