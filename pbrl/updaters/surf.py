"""SURF (Park et al., ICLR 2022): PEBBLE, helped by pairs nobody was asked about and by random crops in time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbrl.fitting import answer_loss, crops, train_epochs
from pbrl.interfaces import Updater
from pbrl.losses import log_likelihood, preference_logits
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Segments, Session


def pseudo_label_loss(logits: Tensor, cropped_logits: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy on what the reward is already sure about.

    Args:
        logits: log-odds of the whole segments, float32 [B], without gradient: their sign is the label.
        cropped_logits: log-odds of the crops, float32 [B].
        confidence: only pairs whose likelier answer has at least this probability count.

    Returns:
        Mean over all B pairs (those not counted are zeros), float32 []; the share that counts, float32 [].
    """
    sure = (torch.sigmoid(logits.abs()) >= confidence).to(logits.dtype)
    return -(sure * log_likelihood(cropped_logits, (logits > 0).to(logits.dtype))).mean(), sure.mean()


class Surf(Updater):
    """Cross-entropy on cropped answered pairs, plus pseudo-labels on cropped unlabelled pairs.

    With `unlabelled_per_label=0` and `crop=0` it equals `Pebble` bit for bit.

    Args:
        epochs, batch_size, stop_accuracy, pairs: as in `Pebble`.
        steps_per_label: gradient steps per answered pair, instead of `epochs` (SURF: 1000/128 on walker, 20/128 on
            Meta-World, with no stop); null: `epochs`.
        crop: environment steps by which a crop may be longer or shorter than a segment; 0: no crops. Segments are
            then asked about with that many steps around them kept.
        unlabelled_per_label: unlabelled pairs drawn for each answered pair of a session.
        unlabelled_ratio: unlabelled pairs per answered pair in a mini-batch (SURF's mu).
        unlabelled_kept: newest unlabelled pairs kept. (SURF keeps 5·10⁵; 10⁴ of walker's take 0.14 GB.)
        confidence: tau of `pseudo_label_loss`.
        weight: of the pseudo-label loss (SURF's lambda).
    """

    def __init__(
        self,
        epochs: int = 50,
        batch_size: int = 128,
        stop_accuracy: float = 0.97,
        pairs: str = "buffer",
        steps_per_label: float | None = None,
        crop: int = 5,
        unlabelled_per_label: int = 100,
        unlabelled_ratio: int = 4,
        unlabelled_kept: int = 10_000,
        confidence: float = 0.99,
        weight: float = 1.0,
    ) -> None:
        for name, ok in (
            ("pairs", pairs in ("buffer", "fresh")),
            ("crop", crop >= 0),
            ("unlabelled_per_label", unlabelled_per_label >= 0),
            ("unlabelled_ratio", unlabelled_ratio >= 1),
            ("unlabelled_kept", unlabelled_kept >= 1),
            ("confidence", 0.5 <= confidence <= 1),
        ):
            if not ok:
                raise ValueError(f"updater.{name}={locals()[name]} is out of range")
        self.epochs, self.batch_size, self.stop_accuracy, self.pairs = epochs, batch_size, stop_accuracy, pairs
        self.steps_per_label, self.margin, self.weight, self.confidence = steps_per_label, crop, weight, confidence
        self.unlabelled_per_label, self.unlabelled_ratio = unlabelled_per_label, unlabelled_ratio
        self.unlabelled_kept = unlabelled_kept
        self.unlabelled: tuple[Segments, Segments] | None = None  # newest last

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Train every member; returns `train_epochs`' metrics and the share of confident unlabelled pairs."""
        self._draw_unlabelled(session, preferences.horizon)
        first, second, labels = preferences.wide_first, preferences.wide_second, preferences.prefers_first
        horizon, margin, rng = preferences.horizon, preferences.margin, session.rng
        if self.margin == 0:
            first, second = preferences.first, preferences.second
        if self.margin >= horizon:
            raise ValueError(f"updater.crop={self.margin}; expected less than segment_length={horizon}")
        shares: list[Tensor] = []

        def loss(member: int, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
            kept = self._crops(len(index), horizon, margin, rng) if self.margin else None
            value, hits, decided = answer_loss(
                reward, member, first[index], second[index], labels[torch.from_numpy(index)], kept
            )
            if self.unlabelled is not None:
                pseudo, share = self._pseudo_labels(reward, member, len(index), horizon, rng)
                shares.append(share)
                value = value + self.weight * pseudo
            return value, hits, decided

        metrics = train_epochs(
            reward,
            loss,
            len(preferences),
            batch_size=self.batch_size,
            max_epochs=self._epochs(len(preferences)),
            stop_accuracy=self.stop_accuracy,
            rng=rng,
        )
        if shares:
            metrics["surf/confident"] = float(torch.stack(shares).mean())
        return metrics

    def _crops(self, count: int, horizon: int, margin: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return crops(count, horizon + 2 * margin, horizon - self.margin, horizon + self.margin, rng)

    def _epochs(self, labels: int) -> int:
        if self.steps_per_label is None:
            return self.epochs
        return math.ceil(math.ceil(self.steps_per_label * labels) / math.ceil(labels / self.batch_size))

    def _draw_unlabelled(self, session: Session, horizon: int) -> None:
        count = min(self.unlabelled_per_label * session.new_pairs, self.unlabelled_kept)
        if not count:
            return
        new = session.unlabelled(count, horizon + 2 * self.margin)
        sides = [Segments(side.obs, side.actions) for side in new]
        if self.unlabelled is not None:
            sides = [Segments.cat([old, side]) for old, side in zip(self.unlabelled, sides, strict=True)]
        self.unlabelled = sides[0][-self.unlabelled_kept :], sides[1][-self.unlabelled_kept :]

    def _pseudo_labels(
        self, reward: RewardEnsemble, member: int, labelled: int, horizon: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        assert self.unlabelled is not None
        index = rng.integers(len(self.unlabelled[0]), size=self.unlabelled_ratio * labelled)
        first, second = (
            reward.member(member, side.obs[index].to(reward.device), side.actions[index].to(reward.device))
            for side in self.unlabelled
        )
        center = slice(self.margin, self.margin + horizon)
        logits = preference_logits(first[:, center].detach(), second[:, center].detach())
        if self.margin:
            kept = self._crops(len(index), horizon, self.margin, rng)
            first, second = first * kept[0].to(reward.device), second * kept[1].to(reward.device)
        return pseudo_label_loss(logits, preference_logits(first, second), self.confidence)

    def state_dict(self) -> dict[str, Any]:
        """The unlabelled pairs, for a checkpoint."""
        if self.unlabelled is None:
            return {}
        return {"obs": [s.obs for s in self.unlabelled], "actions": [s.actions for s in self.unlabelled]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        sides = [Segments(*pair) for pair in zip(state.get("obs", []), state.get("actions", []), strict=True)]
        self.unlabelled = (sides[0], sides[1]) if sides else None
