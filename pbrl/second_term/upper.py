"""Upper objectives G on a robot, as score functions: ∂_theta G = Σ_i w_i ∇_theta log π_theta(a_i | s_i).

preference   G = E[f(τ0, τ1)], the labels' expected log-likelihood             PARL eq. (6)–(7), BRL eq. (2)
win_rate     G = E[w(τ)], w the teacher's win rate over the present policy     PARL eq. (3)–(4) with U = w
utility      G + E[U_phi(τ)] + Z(phi), both optional, beside either of them    PARL eq. (3)–(4)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pbrl.bilevel.params import gradient, leaves
from pbrl.losses import log_likelihood
from pbrl.second_term.fresh import PARTS, Labelled, Trajectories, cut
from pbrl.types import Params, PolicyView, Segments

if TYPE_CHECKING:
    from pbrl.reward import RewardEnsemble

UPPERS = ("preference", "win_rate")

# (trajectories, r_phi of their steps [B, H] with a graph to phi, 0 where padded) -> U_phi of each, float [B]
Utility = Callable[[Trajectories, Tensor], Tensor]
Regulariser = Callable[["RewardEnsemble"], Tensor]  # -> Z(phi), scalar [], with a graph to phi


def check_upper(upper: str) -> None:
    """Raise a ValueError unless it is the name of an upper objective."""
    if upper not in UPPERS:
        raise ValueError(f"updater.upper={upper}; expected one of {', '.join(UPPERS)}")


@dataclass(frozen=True)
class ScoreRows:
    """∂_theta G as weights of single steps' scores, once for each part: all of it, from data that the part may meet."""

    obs: Tensor  # float32 [R, obs_dim]
    raw_actions: Tensor  # float32 [R, act_dim]
    weights: Tensor  # float32 [PARTS, R]

    def ascent(self, policy: PolicyView, theta: Params, weights: Tensor) -> Tensor:
        """A scalar whose theta-gradient is Σ_i weights_i ∇_theta log π_theta(a_i | s_i); weights float32 [R]."""
        used = torch.nonzero(weights)[:, 0]
        return (weights[used] * policy.log_prob(theta, self.obs[used], self.raw_actions[used])).sum()

    def half(self, half: int) -> Tensor:
        """Weights of one half's estimate, the mean of its two parts': float32 [R]."""
        return self.weights[2 * half : 2 * half + 2].mean(0)

    def gradients(self, policy: PolicyView, theta: Params) -> list[Params]:
        """∂_theta G for each part."""
        free = leaves(theta)
        with torch.enable_grad():
            return [gradient(self.ascent(policy, free, weights), free) for weights in self.weights]

    def to(self, device: torch.device) -> ScoreRows:
        return ScoreRows(*(t.to(device) for t in (self.obs, self.raw_actions, self.weights)))

    @staticmethod
    def cat(parts: list[ScoreRows]) -> ScoreRows:
        """The sum of several objectives."""
        return ScoreRows(
            torch.cat([part.obs for part in parts]),
            torch.cat([part.raw_actions for part in parts]),
            torch.cat([part.weights for part in parts], dim=1),
        )


def preference_values(reward: RewardEnsemble, labelled: Labelled) -> Tensor:
    """f of each pair by the ensemble's mean reward, float32 [N], in nats."""
    size = len(labelled)
    first, second = labelled.segments[:size], labelled.segments[size:]
    return log_likelihood(reward.preference_logits(first, second).mean(0), labelled.prefers_first)


def pair_scores(upper: str, reward: RewardEnsemble, labelled: Labelled) -> ScoreRows:
    """The score function of `preference` (f, for both segments) or `win_rate` (y for the first, 1 − y for the second).

    Each half is centred by itself: f by the mean of the half's other pairs (by −ln 2, which it has where nothing is
    known, if there are none), y by ½. Unbiased for any number of pairs.
    """
    values = preference_values(reward, labelled).cpu() if upper == "preference" else labelled.prefers_first
    weights = torch.zeros(PARTS, 2, len(labelled))
    for half, size in enumerate(labelled.sizes()):
        own = labelled.half == half
        if upper == "preference":
            weight = centred(values[own], -math.log(2)) / max(size, 1)
            sides = torch.stack([weight, weight])
        else:
            weight = (values[own] - 0.5) / (2 * max(size, 1))
            sides = torch.stack([weight, -weight])
        for part in (2 * half, 2 * half + 1):
            weights[part][:, own] = sides
    segments = labelled.segments
    assert segments.raw_actions is not None
    rows = weights.flatten(1).repeat_interleave(segments.length, dim=1)
    return ScoreRows(segments.obs.flatten(0, 1), segments.raw_actions.flatten(0, 1), rows)


def centred(values: Tensor, alone: float) -> Tensor:
    """Each value less the mean of the others, or less `alone` if it is the only one: float [N]."""
    size = len(values)
    return values - alone if size < 2 else (values - values.mean()) * (size / (size - 1))


def utility_scores(utility: Utility, reward: RewardEnsemble, trajectories: Trajectories) -> ScoreRows:
    """The score function of E[U_phi(τ)] over fresh trajectories, for each part by its partner's: needs no labels."""
    with torch.no_grad():
        value = utility(trajectories.to(reward.device), mean_rewards(reward, trajectories)).cpu()
    weights = torch.zeros(PARTS, *trajectories.mask.shape)
    for part in range(PARTS):
        partner = slice(part ^ 1, None, PARTS)
        weights[part, partner] = (centred(value[partner], 0.0) / len(value[partner]))[:, None]
    mask = trajectories.mask
    return ScoreRows(trajectories.obs[mask], trajectories.raw_actions[mask], weights[:, mask])


def mean_rewards(reward: RewardEnsemble, trajectories: Trajectories) -> Tensor:
    """r_phi of every step by the ensemble's mean, 0 where padded: float32 [B, H], on the reward's device."""
    moved = trajectories.to(reward.device)
    return torch.where(moved.mask, reward.mean(moved.obs, moved.actions), 0.0)


def direct(
    utility: Utility | None,
    regulariser: Regulariser | None,
    reward: RewardEnsemble,
    episodes: list[Segments],
    trajectory_length: int,
) -> Callable[[], None] | None:
    """Subtracts the phi-gradients of E[U_phi(τ)] and Z(phi) from the loss's, every member as though it were alone.

    The expectation is over the episodes, cut to `trajectory_length` steps. None if neither or no episode is given.
    """
    if (utility is None and regulariser is None) or not episodes:
        return None
    moved = cut(episodes, trajectory_length).to(reward.device)

    def add() -> None:
        value = torch.zeros((), device=reward.device)
        if utility is not None:
            for m in range(len(reward.members)):
                rewards = torch.where(moved.mask, reward.member(m, moved.obs, moved.actions), 0.0)
                value = value + utility(moved, rewards).mean()
        if regulariser is not None:
            value = value + regulariser(reward)
        if value.requires_grad:
            (-value).backward()

    return add
