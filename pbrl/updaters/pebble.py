"""PEBBLE (Lee et al., ICML 2021): fit the ensemble to all answers by cross-entropy, until it predicts them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pbrl.losses import bradley_terry_loss, correct, preference_logits
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble, train_epochs
from pbrl.types import Session


class Pebble:
    """Cross-entropy on the answered pairs.

    Args:
        epochs: passes over all answers per update at the most (B-Pref: 50 on dm_control, 10 on Meta-World).
        batch_size: pairs per member and step.
        stop_accuracy: stop after the first epoch above it.
        pairs: "buffer" asks about recent episodes, "fresh" about rollouts of the present policy.
    """

    def __init__(
        self, epochs: int = 50, batch_size: int = 128, stop_accuracy: float = 0.97, pairs: str = "buffer"
    ) -> None:
        if pairs not in ("buffer", "fresh"):
            raise ValueError(f"updater.pairs={pairs}; expected buffer or fresh")
        self.epochs, self.batch_size, self.stop_accuracy, self.pairs = epochs, batch_size, stop_accuracy, pairs

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Train every member on all answers; returns `train_epochs`' metrics."""
        first, second, labels = preferences.first, preferences.second, preferences.prefers_first

        def loss(member: int, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
            a, b, y = first[index], second[index], labels[torch.from_numpy(index)].to(reward.device)
            left = reward.member(member, a.obs.to(reward.device), a.actions.to(reward.device))
            right = reward.member(member, b.obs.to(reward.device), b.actions.to(reward.device))
            hits, decided = correct(preference_logits(left.detach(), right.detach()), y)
            return bradley_terry_loss(left, right, y), hits, decided

        return train_epochs(
            reward,
            loss,
            len(preferences),
            batch_size=self.batch_size,
            max_epochs=self.epochs,
            stop_accuracy=self.stop_accuracy,
            rng=session.rng,
        )
