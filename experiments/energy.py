"""A designer's utility on a robot, after PARL's example 1: what the motors use.

    python -m pbrl.train experiment=energy-walker-walk

The teacher says what looks good; the designer adds that energy costs. In PARL eq. (3) the upper objective becomes
G = E[log-likelihood of the answers] + E[U(τ)], and the reward is shaped so that the policy it leads to uses less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbrl.second_term.fresh import Trajectories


@dataclass(frozen=True)
class Energy:
    """U(τ) = −cost · mean_h |a_h|², for a trajectory of up to H steps.

    Actions are the normalised torques in [−1, 1]; U does not depend on phi, so all of its gradient is implicit.

    Args:
        cost: in nats per unit of squared action; the answers' log-likelihood is between −0.7 and 0 per pair.
    """

    cost: float = 1.0

    def __post_init__(self) -> None:
        if self.cost < 0:
            raise ValueError(f"cost={self.cost}; expected at least 0")

    def __call__(self, trajectories: Trajectories, rewards: Tensor) -> Tensor:
        """float32 [B]; `rewards` are not needed."""
        squares = trajectories.actions.square().sum(-1)
        mask = trajectories.mask
        return -self.cost * torch.where(mask, squares, 0.0).sum(1) / mask.sum(1)
