"""A second term for an upper value that means "behaves well": the reward's effect on it, by a critic of that value.

    U(phi) = E_{π*(phi)} Σ_k gamma^k u(s_k, a_k),   u a reward fitted to answers that the other half does not see
    ∂U/∂phi = (1/alpha) E Σ_h w_h ∂r_phi(s_h, a_h)/∂phi,   w_h = Σ_{k≤h} gamma^k (gamma λ)^(h−k) A_U(s_k, a_k)

u is not the reward that is being learned, so U does not grow by making answers easy to predict. Q_U is linear in the
critics' last features (LSTD, one solve), A_U is Q_U less its mean over sampled actions. λ = 1 is exact given A_U; λ = 0
is the one-step truncation of SoBiRL. With `low-dimensional`, only what the term says along few directions of reward is
kept: each member's reward (their weights and common scale) and the members' deviation (pessimism).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pbrl.bilevel.adjoint import linear_values, projected, upper_traces
from pbrl.fitting import Fitting
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.second_term.critic import ReplayHalf, critic_features, replay_halves, sampled, with_samples
from pbrl.second_term.fresh import PARTS, Trajectories, cut
from pbrl.second_term.guard import Estimate, WeightedRows
from pbrl.types import PolicyView, Session

FOLD_FIT = Fitting(
    epochs=1,
    batch_size=32,
    even_batches=True,
    stop_accuracy=2.0,
    least_steps=100,
    steps_per_label=None,
    stop_over="epoch",
    crop=(0.7, 1.0),
    pieces=1,
    label_smoothing=0.0,
    shrink=0.3,
)


def critic_adjoint_estimate(
    reward: RewardEnsemble,
    preferences: Preferences,
    session: Session,
    rng: np.random.Generator,
    *,
    trajectory_length: int,
    rows: int,
    ridge: float,
    trace_decay: float,
    center: bool,
    actions: int,
    low_dimensional: bool,
) -> Estimate:
    """Two estimates, from the even and the odd answers, disjoint replay rows and disjoint pieces of the fresh episodes.

    Args:
        rng: of everything random here; not the updater's own.
        trajectory_length, rows, ridge, trace_decay, center, actions: see `Implicit`.
        low_dimensional: keep the term along few directions of reward only.
    """
    episodes, device = session.fresh(), reward.device
    pieces = cut(episodes, trajectory_length) if episodes else None
    if pieces is None or len(pieces) < PARTS or len(preferences) < 4:
        return Estimate(None)
    halves = replay_halves(session, rows, rng)
    if halves is None:
        return Estimate(None)
    parts = []
    for half, replay in enumerate(halves):
        upper = fold_reward(preferences, half, rng, device)
        own = pieces.half(half).to(device)
        advantage = upper_advantage(session.policy, upper, replay, own, ridge, actions, rng)
        gamma = session.policy.gamma
        w = upper_traces(advantage, own.mask, gamma, gamma * trace_decay) / (session.policy.alpha * len(own))
        if center:
            w = torch.where(own.mask, w - w.sum(0) / own.mask.sum(0), 0.0)
        obs, acts, weights = own.obs[own.mask], own.actions[own.mask], w[own.mask]
        if low_dimensional:
            weights = projected(weights, directions(reward, obs, acts))
        parts.append(WeightedRows.of_half(obs, acts, weights, half))
    return Estimate(WeightedRows.cat(parts))


def fold_reward(preferences: Preferences, half: int, rng: np.random.Generator, device: torch.device) -> RewardEnsemble:
    """u: a small network of its own, fitted to every second answer as `updater=pebble` fits."""
    sizes = preferences.first.obs.shape[-1], preferences.first.actions.shape[-1]
    fitted = RewardEnsemble(*sizes, members=1, hidden=(64, 64), seed=int(rng.integers(2**31))).to(device)
    FOLD_FIT(fitted, preferences, rng, np.arange(half, len(preferences), 2))
    return fitted


@torch.no_grad()
def upper_advantage(
    policy: PolicyView,
    upper: RewardEnsemble,
    replay: ReplayHalf,
    pieces: Trajectories,
    ridge: float,
    actions: int,
    rng: np.random.Generator,
) -> Tensor:
    """A_U of the pieces' actions, float32 [B, H]: the mean of the critics' features' answers."""
    rewards = upper.mean(replay.obs, replay.actions)
    obs, taken = pieces.obs[pieces.mask], pieces.actions[pieces.mask]
    others, _ = sampled(policy, obs, actions, rng)
    here = critic_features(policy, obs, taken)
    there = critic_features(policy, with_samples(obs, actions), others.flatten(0, 1)).unflatten(1, (-1, actions))
    found = torch.zeros(len(obs), dtype=torch.float64, device=obs.device)
    for c in range(len(here)):
        w = linear_values(replay.features[c], replay.following[c], rewards, policy.gamma, ridge)
        found += (here[c] - there[c].mean(1)).double() @ w / len(here)
    advantage = torch.zeros(pieces.mask.shape, device=obs.device)
    advantage[pieces.mask] = found.float()
    return advantage


@torch.no_grad()
def directions(reward: RewardEnsemble, obs: Tensor, actions: Tensor) -> Tensor:
    """What each row's pay gains along the members' rewards and their deviation, float32 [R, M + 1] (M = 1: [R, 1])."""
    members = reward(obs, actions)
    slope = torch.exp(reward.pay.convexity * members.mean(0))  # of the pay, by the members' mean
    along = members if len(members) == 1 else torch.cat([members, members.std(0, correction=0)[None]])
    return (slope * along).T
