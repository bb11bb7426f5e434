"""PEBBLE (Lee et al., ICML 2021): fit the ensemble to all answers by cross-entropy, until it predicts them."""

from __future__ import annotations

from pbrl.fitting import Fitting
from pbrl.interfaces import Updater
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Session


class Pebble(Updater):
    """Cross-entropy on the answered pairs.

    Args:
        epochs: passes over all answers per update at the most (B-Pref: 50 on dm_control, 10 on Meta-World).
        batch_size: pairs per member and step.
        stop_accuracy: stop after the first epoch above it.
        pairs: "buffer" asks about recent episodes, "fresh" about rollouts of the present policy.
        least_steps, crop, shrink: see `Fitting`; 0 as published.
    """

    def __init__(
        self,
        epochs: int = 50,
        batch_size: int = 128,
        stop_accuracy: float = 0.97,
        pairs: str = "buffer",
        least_steps: int = 0,
        crop: float = 0.0,
        shrink: float = 0.0,
    ) -> None:
        if pairs not in ("buffer", "fresh"):
            raise ValueError(f"updater.pairs={pairs}; expected buffer or fresh")
        self.fit, self.pairs = Fitting(epochs, batch_size, stop_accuracy, least_steps, crop, shrink), pairs

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Train every member on all answers; returns `train_epochs`' metrics."""
        return self.fit(reward, preferences, session.rng)
