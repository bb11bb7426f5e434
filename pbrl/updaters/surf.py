"""SURF (Park et al., ICLR 2022): PEBBLE, helped by pairs nobody was asked about and by random crops in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbrl.checks import check
from pbrl.fitting import BLOCK_PAIRS, Fitting
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


def _batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices below `count`, `size` at a time, each once before any comes again: int64 [≤ size]."""
    while True:
        order = rng.permutation(count)
        yield from (order[start : start + size] for start in range(0, count, size))


class Surf(Updater):
    """Cross-entropy on cropped answered pairs, plus pseudo-labels on cropped unlabelled pairs.

    With `unlabelled_per_label=0` and `fit.crop=null` it equals `Pebble` bit for bit.

    Args:
        fit: as in `Pebble`; its crops, which may be longer than a segment, are the unlabelled pairs' too. (SURF: 45 to
            55 steps of 50; 1000/128 steps per label on walker, 20/128 on Meta-World, and no stop.)
        pairs: as in `Pebble`.
        segment_length: of the pairs asked about, environment steps.
        unlabelled_per_label: unlabelled pairs drawn for each answered pair of a session.
        unlabelled_ratio: unlabelled pairs in a mini-batch, as a multiple of `fit.batch_size` (SURF's mu); fewer if not
            so many are kept.
        unlabelled_kept: newest unlabelled pairs kept. (SURF keeps 5·10⁵; 10⁴ of walker's take 0.14 GB.)
        confidence: tau of `pseudo_label_loss`.
        weight: of the pseudo-label loss (SURF's lambda).

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        *,
        fit: Fitting,
        pairs: str,
        segment_length: int,
        unlabelled_per_label: int,
        unlabelled_ratio: int,
        unlabelled_kept: int,
        confidence: float,
        weight: float,
    ) -> None:
        check(
            "updater",
            pairs=(pairs, pairs in ("buffer", "fresh"), "buffer or fresh"),
            unlabelled_per_label=(unlabelled_per_label, unlabelled_per_label >= 0, "at least 0"),
            unlabelled_ratio=(unlabelled_ratio, unlabelled_ratio >= 1, "at least 1"),
            unlabelled_kept=(unlabelled_kept, unlabelled_kept >= 1, "at least 1"),
            confidence=(confidence, 0.5 <= confidence <= 1, "a probability in [0.5, 1]"),
        )
        self.fit, self.pairs, self.margin = fit, pairs, fit.margin(segment_length)
        self.weight, self.confidence = weight, confidence
        self.unlabelled_per_label, self.unlabelled_ratio = unlabelled_per_label, unlabelled_ratio
        self.unlabelled_kept = unlabelled_kept
        self.unlabelled: tuple[Segments, Segments] | None = None  # newest last

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Train every member; returns `train_epochs`' metrics and the share of confident unlabelled pairs."""
        length, rng = preferences.length, session.rng
        self._draw_unlabelled(session, int(preferences.new.sum()), length)
        if self.unlabelled is None:
            return self.fit(reward, preferences, rng)
        count, size = len(self.unlabelled[0]), self.unlabelled_ratio * self.fit.batch_size
        batches = [_batches(count, size, rng) for _ in reward.members]
        shares: list[Tensor] = []

        def pseudo_gradient() -> None:
            """As many unlabelled pairs a step as full batches of answers have, however few answers there are."""
            for member, batch in enumerate(batches):
                index = next(batch)
                for block in (index[i : i + BLOCK_PAIRS] for i in range(0, len(index), BLOCK_PAIRS)):
                    loss, share = self._pseudo_labels(reward, member, block, length, rng)
                    (self.weight * loss * (len(block) / len(index))).backward()
                    shares.append(share * (len(block) / len(index)))

        metrics = self.fit(reward, preferences, rng, extra_gradient=pseudo_gradient)
        steps = metrics["reward/steps"] * len(batches)
        return metrics | {"surf/confident": float(torch.stack(shares).sum() / steps)}

    def _draw_unlabelled(self, session: Session, labels: int, length: int) -> None:
        count = min(self.unlabelled_per_label * labels, self.unlabelled_kept)
        if not count:
            return
        new = session.unlabelled(count, length + 2 * self.margin)
        sides = [Segments(side.obs, side.actions) for side in new]
        if self.unlabelled is not None:
            sides = [Segments.cat([old, side]) for old, side in zip(self.unlabelled, sides, strict=True)]
        self.unlabelled = sides[0][-self.unlabelled_kept :], sides[1][-self.unlabelled_kept :]

    def _pseudo_labels(
        self, reward: RewardEnsemble, member: int, index: np.ndarray, length: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        assert self.unlabelled is not None
        first, second = (
            reward.member(member, side.obs[index].to(reward.device), side.actions[index].to(reward.device))
            for side in self.unlabelled
        )
        center = slice(self.margin, self.margin + length)
        logits = preference_logits(first[:, center].detach(), second[:, center].detach())
        kept = self.fit.random_pieces(len(index), length, first.shape[1], rng)
        if kept is not None:
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
