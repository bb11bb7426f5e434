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
        fit: how they are fitted.
        pairs: "buffer" or "fresh", see `pbrl.interfaces.Updater`.

    Raises:
        ValueError: for other pairs.
    """

    def __init__(self, *, fit: Fitting, pairs: str) -> None:
        if pairs not in ("buffer", "fresh"):
            raise ValueError(f"updater.pairs={pairs}; expected buffer or fresh")
        self.fit, self.pairs = fit, pairs

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Train every member on all answers; returns `train_epochs`' metrics."""
        return self.fit(reward, preferences, session.rng)
