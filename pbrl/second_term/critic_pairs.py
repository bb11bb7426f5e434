"""A second term from answered pairs through the critic: how the reward makes *values* explain the answers.

    L(phi) = mean_i [ y_i log σ(D_i) + (1 − y_i) log σ(−D_i) ],     D_i = value(τ0_i) − value(τ1_i)
    value(τ) = Σ_h gamma^h (Q*(s_h, a_h) − V*(s_h)), or Q*(s_0, a_0)

By the envelope theorem ∂L/∂phi = Σ λ(s, a) ∂r_phi(s, a)/∂phi with λ = (I − gamma Kᵀ)⁻¹ ∂L/∂Q: no score function and no
1/alpha. The pairs are fixed, so the objective cannot be raised by making pairs that are easy to predict. One Bellman
step in place of the solve is about MRN's meta-gradient (Liu et al., NeurIPS 2022). A teacher who sums rewards over a
segment does not answer by values: this is another objective than PARL's, not another estimate of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pbrl.bilevel.adjoint import adjoint_weights
from pbrl.preferences import Preferences
from pbrl.second_term.critic import critic_features, replay_halves, sampled, with_samples
from pbrl.second_term.guard import Estimate, WeightedRows
from pbrl.types import Segments, Session


def critic_pairs_estimate(
    preferences: Preferences,
    session: Session,
    rng: np.random.Generator,
    *,
    rows: int,
    ridge: float,
    compare: str,
    actions: int,
    device: torch.device,
) -> Estimate:
    """Two estimates, from the even and the odd pairs and from disjoint replay rows. They share the critics.

    Args:
        rng: of the replay rows and sampled actions; not the updater's own.
        rows, ridge, compare, actions: see `Implicit`.
    """
    halves = replay_halves(session, rows, rng) if len(preferences) >= 2 else None
    if halves is None:
        return Estimate(None)
    policy, parts, hits = session.policy, [], 0.0
    first, second = (
        _values(session, side, rng, compare, actions, device) for side in (preferences.first, preferences.second)
    )
    margin = first[0] - second[0]  # [C, N]
    labels = preferences.prefers_first.to(device)
    hits = float(((margin.mean(0) > 0) == (labels > 0.5)).float()[labels != 0.5].mean())
    for half, replay in enumerate(halves):
        own = torch.arange(len(labels), device=device) % 2 == half
        weights = torch.zeros(len(replay.obs), dtype=torch.float64, device=device)
        for c in range(len(margin)):
            surprise = (labels - torch.sigmoid(margin[c]))[own].double() / own.sum()
            target = surprise @ (first[1][c] - second[1][c])[own].double()
            found = adjoint_weights(replay.features[c], replay.following[c], target, policy.gamma, ridge)
            weights += found / len(margin)
        parts.append(WeightedRows.of_half(replay.obs, replay.actions, weights, half))
    return Estimate(WeightedRows.cat(parts), metrics={"value_accuracy": hits})


def _values(
    session: Session, segments: Segments, rng: np.random.Generator, compare: str, actions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """value(τ) of N segments by each of C critics, float32 [C, N], and its derivative in Q as features [C, N, D]."""
    policy, size = session.policy, len(segments)
    steps = 1 if compare == "value" else segments.length
    obs, taken = (x[:, :steps].flatten(0, 1).to(device) for x in (segments.obs, segments.actions))
    with torch.no_grad():
        critic = policy.critic_parameters()
        q, psi = policy.q_values(critic, obs, taken), critic_features(policy, obs, taken)
        if compare == "advantage":
            others, log_prob = sampled(policy, obs, actions, rng)
            states, others = with_samples(obs, actions), others.flatten(0, 1)
            soft = policy.q_values(critic, states, others) - policy.alpha * log_prob.flatten()
            q = q - soft.unflatten(1, (-1, actions)).mean(2)
            psi = psi - critic_features(policy, states, others).unflatten(1, (-1, actions)).mean(2)
        discounts = policy.gamma ** torch.arange(steps, device=device)
        return (
            q.unflatten(1, (size, steps)) @ discounts,
            (psi.unflatten(1, (size, steps)) * discounts[:, None]).sum(2),
        )
