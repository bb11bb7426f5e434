"""Upper objectives G on a robot, as score functions: ∂_theta G = Σ_i w_i ∇_theta log π_theta(a_i | s_i).

preference   G = E[f(τ0, τ1)], the labels' expected log-likelihood             PARL eq. (6)–(7), BRL eq. (2)
win_rate     G = E[w(τ)], w the teacher's win rate over the present policy     PARL eq. (3)–(4) with U = w
utility      G + E[U_phi(τ)] + Z(phi), both optional, beside either of them    PARL eq. (3)–(4)
"""

from __future__ import annotations

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
    """∂_theta G as weights of single steps' scores; each part alone gives an estimate of all of it."""

    obs: Tensor  # float32 [R, obs_dim]
    raw_actions: Tensor  # float32 [R, act_dim]
    weights: Tensor  # float32 [R]
    part: Tensor  # int64 [R]

    def ascent(self, policy: PolicyView, theta: Params, parts: list[int]) -> Tensor:
        """A scalar whose theta-gradient is the estimate of ∂_theta G by these parts, with a graph to theta."""
        chosen = torch.isin(self.part, torch.tensor(parts, device=self.part.device))
        log_prob = policy.log_prob(theta, self.obs[chosen], self.raw_actions[chosen])
        return (self.weights[chosen] * log_prob).sum() / len(parts)

    def gradients(self, policy: PolicyView, theta: Params) -> list[Params]:
        """∂_theta G by each part."""
        free = leaves(theta)
        with torch.enable_grad():
            return [gradient(self.ascent(policy, free, [k]), free) for k in range(PARTS)]

    def to(self, device: torch.device) -> ScoreRows:
        return ScoreRows(*(t.to(device) for t in (self.obs, self.raw_actions, self.weights, self.part)))

    @property
    def complete(self) -> bool:
        """Whether every part has steps; without, there are no disjoint estimates."""
        return len(self.part.unique()) == PARTS

    @staticmethod
    def cat(parts: list[ScoreRows]) -> ScoreRows:
        """The sum of several objectives."""
        names = ("obs", "raw_actions", "weights", "part")
        return ScoreRows(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def preference_values(reward: RewardEnsemble, labelled: Labelled) -> Tensor:
    """f of each pair by the ensemble's mean reward, float32 [N], in nats."""
    size = len(labelled)
    first, second = labelled.segments[:size], labelled.segments[size:]
    return log_likelihood(reward.preference_logits(first, second).mean(0), labelled.prefers_first)


def pair_scores(upper: str, reward: RewardEnsemble, labelled: Labelled) -> ScoreRows:
    """The score function of `preference` (f, for both segments) or `win_rate` (y for the first, 1 − y for the second).

    Values are centred over the pairs, with N/(N − 1) for the mean's own share: N ≥ 2.
    """
    size = len(labelled)
    if upper == "preference":
        value = preference_values(reward, labelled).repeat(2) * 2  # G's pair is two draws of the policy
    else:
        value = torch.cat([labelled.prefers_first, 1 - labelled.prefers_first])
    value = (value - value.mean()) * (size / (size - 1)) / (2 * size)
    segments, part = labelled.segments, labelled.part
    assert segments.raw_actions is not None
    return _rows(segments.obs, segments.raw_actions, value[:, None].expand(part.shape), part)


def utility_scores(utility: Utility, reward: RewardEnsemble, trajectories: Trajectories) -> ScoreRows:
    """The score function of E[U_phi(τ)] over fresh trajectories: needs no labels."""
    size, horizon = trajectories.mask.shape
    with torch.no_grad():
        value = utility(trajectories.to(reward.device), mean_rewards(reward, trajectories)).cpu()
    value = (value - value.mean()) * (size / max(size - 1, 1)) / size
    part = (torch.arange(size) % PARTS)[:, None].expand(size, horizon)
    mask = trajectories.mask
    return _rows(
        trajectories.obs[mask][None],
        trajectories.raw_actions[mask][None],
        value[:, None].expand(size, horizon)[mask][None],
        part[mask][None],
    )


def mean_rewards(reward: RewardEnsemble, trajectories: Trajectories) -> Tensor:
    """r_phi of every step by the ensemble's mean, 0 where padded: float32 [B, H], on the reward's device."""
    moved = trajectories.to(reward.device)
    return torch.where(moved.mask, reward.mean(moved.obs, moved.actions), 0.0)


def direct(
    utility: Utility | None,
    regulariser: Regulariser | None,
    reward: RewardEnsemble,
    episodes: list[Segments],
    horizon: int,
) -> Callable[[], None] | None:
    """Subtracts the phi-gradients of E[U_phi(τ)] and Z(phi) from the loss's, every member as though it were alone.

    The expectation is over the episodes, cut to `horizon` steps. None if neither is given, or without episodes.
    """
    if (utility is None and regulariser is None) or not episodes:
        return None
    moved = cut(episodes, horizon).to(reward.device)

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


def _rows(obs: Tensor, raw_actions: Tensor, weights: Tensor, part: Tensor) -> ScoreRows:
    """Flat rows; each part's weights are enlarged by the inverse of its share of the steps."""
    share = torch.bincount(part.flatten(), minlength=PARTS).to(weights) / part.numel()
    return ScoreRows(obs.flatten(0, 1), raw_actions.flatten(0, 1), (weights / share[part]).flatten(), part.flatten())
