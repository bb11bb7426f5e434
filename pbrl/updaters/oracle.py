"""The yardstick: no questions, no learned reward; the same agent on the task's own reward."""

from __future__ import annotations

from pbrl.interfaces import Updater
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Session


class Oracle(Updater):
    """Asks nothing: `pairs = "none"` tells the loop to pay the agent by the task."""

    pairs = "none"

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        raise RuntimeError("the oracle learns no reward; it is never asked to")
