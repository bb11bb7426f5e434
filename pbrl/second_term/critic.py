"""What the second terms without score functions share: the critics' last hidden features on replay rows, by halves.

The critics' features stand for the table of states and actions in `pbrl.bilevel.adjoint`; each critic gives an
estimate, and their mean is used. They presume that the critics have settled on the present reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pbrl.types import PolicyView, Session

BLOCK = 2048  # rows of one pass through the critics


@dataclass(frozen=True)
class ReplayHalf:
    """One half's replay rows, B of them, with D features by each of C critics."""

    obs: Tensor  # float32 [B, obs_dim]
    actions: Tensor  # float32 [B, act_dim]
    features: Tensor  # float32 [C, B, D]
    following: Tensor  # float32 [C, B, D]: of the next state and an action drawn there; 0 at the end of an episode


def replay_halves(session: Session, rows: int, rng: np.random.Generator) -> list[ReplayHalf] | None:
    """`rows` random replay rows, each always in the same half (by the parity of its bits); None if one is empty."""
    drawn = session.transitions(rows, rng)
    obs, actions, next_obs, not_done = (drawn[name] for name in ("obs", "actions", "next_obs", "not_done"))
    half = torch.from_numpy(parity(torch.cat([obs, actions], 1)))
    if min(int((half == h).sum()) for h in (0, 1)) == 0:
        return None
    policy = session.policy
    next_actions, _ = sampled(policy, next_obs, 1, rng)
    features = critic_features(policy, obs, actions)
    following = critic_features(policy, next_obs, next_actions[:, 0]) * not_done.reshape(1, -1, 1)
    return [
        ReplayHalf(obs[half == h], actions[half == h], features[:, half == h], following[:, half == h]) for h in (0, 1)
    ]


def parity(rows: Tensor) -> np.ndarray:
    """0 or 1 for each row of float32 [B, D], the same wherever the row turns up: int64 [B]."""
    bits = np.bitwise_xor.reduce(rows.cpu().numpy().astype(np.float32).view(np.uint32), axis=1)
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return (bits & 1).astype(np.int64)


@torch.no_grad()
def critic_features(policy: PolicyView, obs: Tensor, actions: Tensor) -> Tensor:
    """The policy's `critic_features` in blocks that stay in the cache: float32 [C, B, D]."""
    return torch.cat(
        [policy.critic_features(obs[i : i + BLOCK], actions[i : i + BLOCK]) for i in range(0, len(obs), BLOCK)],
        dim=1,
    )


@torch.no_grad()
def sampled(policy: PolicyView, obs: Tensor, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`count` squashed actions of the present policy at each of B states, float32 [B, count, act_dim], and log π."""
    mean, log_std = (x[:, None] for x in policy.distribution(policy.parameters(), obs))
    shape = (len(obs), count, mean.shape[-1])
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(obs.device)
    raw = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return raw.tanh(), (gaussian - 2 * (math.log(2) - raw - F.softplus(-2 * raw))).sum(-1)


def with_samples(obs: Tensor, count: int) -> Tensor:
    """Each state `count` times, those of one state beside each other: [B * count, obs_dim]."""
    return obs.repeat_interleave(count, dim=0)
