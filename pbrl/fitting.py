"""How a reward is fitted to answers: the Bradley–Terry cross-entropy, crops in time, and B-Pref's epochs over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pbrl.checks import check
from pbrl.losses import bradley_terry_loss, correct, preference_logits
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Segments

LOOKED_AT = 64  # newest answered pairs, on whose steps a member is seen to be saturated
BLOCK_PAIRS = 32  # pairs of one forward and backward pass: activations stay in the second-level cache


def answer_loss(
    reward: RewardEnsemble,
    member: int,
    first: Segments,
    second: Segments,
    labels: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
    shrink: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of one member on B answered pairs, as `MemberLoss` returns it.

    Args:
        labels: in [0, 1], float32 [B].
        kept: the steps of each first and second segment that count, bool [B, H] each, or [kB, H]: k times other steps
            of the same pairs; None: all.
        shrink: times the mean squared reward of a step is the price.
    """
    device = reward.device
    left, right = (reward.member(member, s.obs.to(device), s.actions.to(device)) for s in (first, second))
    price = shrink * (left.square().mean() + right.square().mean()) if shrink else torch.zeros(())
    labels = labels.to(device)
    if kept is not None:
        pieces = len(kept[0]) // len(left)
        left, right, labels = left.repeat(pieces, 1), right.repeat(pieces, 1), labels.repeat(pieces)
        left, right = left * kept[0].to(device), right * kept[1].to(device)
    hits, decided = correct(preference_logits(left.detach(), right.detach()), labels)
    return bradley_terry_loss(left, right, labels), hits, decided, price


def crops(count: int, steps: int, shortest: int, longest: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crops in time of `count` pairs of `steps` steps (SURF, QPA): which steps count, bool [count, steps] each.

    Both segments of a pair keep the same number of steps, ~ U{shortest, …, longest} (at most `steps`), from
    independent, uniformly drawn starts.
    """
    lengths = rng.integers(shortest, min(longest, steps), size=count, endpoint=True)
    first, second = (rng.integers(0, steps - lengths, endpoint=True) for _ in range(2))
    step = np.arange(steps)[None]
    kept = [(step >= start[:, None]) & (step < (start + lengths)[:, None]) for start in (first, second)]
    return torch.from_numpy(kept[0]), torch.from_numpy(kept[1])


class MemberLoss(Protocol):
    """Mean loss of one member on the pairs at `index`: (loss [], right answers [], decided labels []).

    What comes after them, [] each, is added to the loss that is trained on but is no part of the one that is logged.
    """

    def __call__(self, member: int, index: np.ndarray) -> tuple[Tensor, ...]: ...


def train_epochs(
    reward: RewardEnsemble,
    loss: MemberLoss,
    size: int,
    *,
    batch_size: int,
    max_epochs: int,
    stop_accuracy: float,
    rng: np.random.Generator,
    extra_gradient: Callable[[], None] | None = None,
    least_steps: int = 0,
    max_steps: int | None = None,
    stop_over: str = "epoch",
    even_batches: bool = True,
) -> dict[str, float]:
    """B-Pref's training of a reward ensemble (`train_reward` of its code), each member on its own shuffled batches.

    One optimiser step per mini-batch on the sum of the members' losses, taken in blocks of pairs that stay in the cache
    (1.3 times as fast at 128 pairs of 50 steps); stops after the first epoch in which the
    accuracy, averaged over members and measured while training, exceeds `stop_accuracy`.

    Args:
        loss: see `MemberLoss`.
        size: number of pairs; 0 trains nothing.
        batch_size: pairs per member and step.
        max_epochs: passes over the data at the most, unless `least_steps` are more.
        stop_accuracy: in [0, 1]; above 1 means never.
        rng: shuffles.
        extra_gradient: called after each backward pass and before the step; may change the gradients.
        least_steps: optimiser steps before which it does not end, whatever the two limits above say.
        max_steps: optimiser steps at the most, in place of `max_epochs`.
        stop_over: what the accuracy is taken over: `epoch`, or `update`, all steps so far, looked at after each.
        even_batches: an epoch's steps share its pairs evenly, none with more than `batch_size`; else all but the last
            have `batch_size` (B-Pref). A last step of one pair then moves the networks as far as one of 32.

    Returns:
        reward/loss (last epoch, nats per pair and member, no prices), reward/accuracy, reward/epochs, reward/steps.
    """
    members = range(len(reward.members))
    mean_loss, accuracy, epoch, steps = float("nan"), float("nan"), 0, 0
    steps_an_epoch = max(-(-size // batch_size), 1)
    last_step = max_epochs * steps_an_epoch if max_steps is None else max_steps
    max_epochs = -(-max(last_step, least_steps) // steps_an_epoch)
    last_step = max_epochs * steps_an_epoch if max_steps is None else max(max_steps, least_steps)
    cuts = [size * step // steps_an_epoch if even_batches else step * batch_size for step in range(steps_an_epoch)]
    hits, decided, over = torch.zeros(()), torch.zeros(()), False
    for epoch in range(1, (max_epochs if size else 0) + 1):
        orders = [rng.permutation(size) for _ in members]
        losses, trained = torch.zeros(()), 0
        if stop_over == "epoch":
            hits, decided = torch.zeros(()), torch.zeros(())
        for start, end in pairwise([*cuts, size]):
            reward.optimizer.zero_grad(set_to_none=True)
            for m in members:
                index = orders[m][start:end]
                for block in (index[i : i + BLOCK_PAIRS] for i in range(0, len(index), BLOCK_PAIRS)):
                    value, right, counted, *prices = loss(m, block)
                    (sum(prices, value) * (len(block) / len(index))).backward()  # gradients add up to the whole's
                    losses += value.detach().cpu() * len(block)
                    hits += right.cpu()
                    decided += counted.cpu()
            if extra_gradient is not None:
                extra_gradient()
            reward.optimizer.step()
            steps, trained = steps + 1, trained + end - start
            accuracy = float(hits / decided) if decided else 1.0
            over = steps >= last_step or (
                (end == size or stop_over == "update") and accuracy > stop_accuracy and steps >= least_steps
            )
            if over:
                break
        mean_loss = float(losses) / (trained * len(members))
        if not np.isfinite(mean_loss):
            raise FloatingPointError(f"the reward's loss became {mean_loss} in epoch {epoch} of its training")
        if over:
            break
    return {
        "reward/loss": mean_loss,
        "reward/accuracy": accuracy,
        "reward/epochs": float(epoch),
        "reward/steps": float(steps),
    }


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a reward is fitted to answers: `train_epochs` on the cross-entropy of every member.

    Its values stand in `pbrl/conf/fit`: `ours`, and `published`, which is B-Pref's.

    Args:
        epochs: passes over the answers at the most, ≥ 1, unless `least_steps` are more; not used where
            `steps_per_label` is given.
        batch_size: pairs per member and step, ≥ 1.
        even_batches: see `train_epochs`.
        stop_accuracy: stop after the first epoch above it; above 1: never.
        least_steps: optimiser steps, ≥ 0, that both limits above wait for: with few answers they end too soon.
        steps_per_label: optimiser steps per answered pair, > 0, rounded up to a whole number of steps, in place of
            `epochs` (SURF, QPA); null: `epochs`.
        stop_over: what the accuracy is taken over: `epoch`, or `update`: all steps of this update so far, looked at
            after each step (QPA).
        crop: shortest and longest piece of a segment, as shares of its length, 0 < shortest ≤ longest: of each segment
            a random piece of such a length is used each time it is drawn (SURF, QPA; see `crops`). It teaches which
            steps were good, not only which segments. Above 1 (SURF) the steps around a segment must have been kept
            (`margin`). null: whole segments.
        pieces: how many such pieces of each pair are in a step's loss, ≥ 1 (QPA: 20).
        label_smoothing: ε in [0, 1): an answer y counts as (1 − ε) y + ε / 2, so that no margin is worth widening
            without end (STAR).
        shrink: times the mean squared reward of both segments' steps, ≥ 0, added to the loss. Answers leave the
            rewards' common level open; without this it drifts to where the tanh is flat. For segments of 50 steps;
            times (H / 50)² for H, as answers are about sums of H rewards. A member that got there all the same, at
            three quarters of the newest answers' steps, starts anew (`RewardEnsemble.renew_saturated`).

    Raises:
        ValueError: for a number out of range.
    """

    epochs: int
    batch_size: int
    even_batches: bool
    stop_accuracy: float
    least_steps: int
    steps_per_label: float | None
    stop_over: str
    crop: Sequence[float] | None
    pieces: int
    label_smoothing: float
    shrink: float

    def __post_init__(self) -> None:
        check(
            "updater.fit",
            epochs=(self.epochs, self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size, self.batch_size >= 1, "at least 1"),
            least_steps=(self.least_steps, self.least_steps >= 0, "at least 0"),
            steps_per_label=(
                self.steps_per_label,
                self.steps_per_label is None or self.steps_per_label > 0,
                "a number above 0, or null",
            ),
            crop=(
                self.crop,
                self.crop is None or (len(self.crop) == 2 and 0 < self.crop[0] <= self.crop[1]),
                "the shortest and the longest share of a segment, such as [0.7, 1.0], or null",
            ),
            pieces=(
                self.pieces,
                self.pieces >= 1 and (self.pieces == 1 or self.crop is not None),
                "at least 1; 1 without a crop",
            ),
            label_smoothing=(self.label_smoothing, 0 <= self.label_smoothing < 1, "a share in [0, 1)"),
            stop_over=(self.stop_over, self.stop_over in ("epoch", "update"), "epoch or update"),
            shrink=(self.shrink, self.shrink >= 0, "at least 0"),
        )

    def crop_lengths(self, segment_length: int) -> tuple[int, int]:
        """Steps of the shortest and of the longest piece of a segment."""
        if self.crop is None:
            return segment_length, segment_length
        shortest, longest = (max(round(share * segment_length), 1) for share in self.crop)
        return shortest, longest

    def margin(self, segment_length: int) -> int:
        """Steps that must be kept on either side of a segment, so that the longest piece can lie anywhere."""
        return max(self.crop_lengths(segment_length)[1] - segment_length, 0)

    def random_pieces(
        self, count: int, segment_length: int, stored: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """Which of the `stored` steps of `count` pairs count this time, bool [count, stored] each; None: all."""
        return None if self.crop is None else crops(count, stored, *self.crop_lengths(segment_length), rng)

    def __call__(
        self,
        reward: RewardEnsemble,
        preferences: Preferences,
        rng: np.random.Generator,
        rows: np.ndarray | None = None,
        extra_gradient: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Train every member on all answers, or those at `rows` (int64 [K]).

        Args:
            rng: shuffles and crops.
            extra_gradient: see `train_epochs`.

        Returns:
            `train_epochs`' metrics, and reward/renewed where members started anew.
        """
        labels, steps = preferences.prefers_first, preferences.length
        first, second = preferences.first, preferences.second
        if self.margin(steps):
            first, second = preferences.wide_first, preferences.wide_second
        shrink = self.shrink * (steps / 50) ** 2
        size = len(preferences) if rows is None else len(rows)

        def loss(member: int, index: np.ndarray) -> tuple[Tensor, ...]:
            chosen = index if rows is None else rows[index]
            kept = self.random_pieces(len(index) * self.pieces, steps, first.length, rng)
            answers = labels[torch.from_numpy(chosen)]
            if self.label_smoothing:
                answers = torch.lerp(answers, torch.full_like(answers, 0.5), self.label_smoothing)
            return answer_loss(reward, member, first[chosen], second[chosen], answers, kept, shrink)

        renewed = reward.renew_saturated(_newest(preferences), rng) if self.shrink and size else 0
        metrics = train_epochs(
            reward,
            loss,
            size,
            batch_size=self.batch_size,
            even_batches=self.even_batches,
            max_epochs=self.epochs,
            max_steps=None if self.steps_per_label is None else math.ceil(self.steps_per_label * size),
            stop_accuracy=self.stop_accuracy,
            stop_over=self.stop_over,
            rng=rng,
            extra_gradient=extra_gradient,
            least_steps=self.least_steps,
        )
        return metrics | ({"reward/renewed": float(renewed)} if renewed else {})


def _newest(preferences: Preferences) -> Segments:
    """Both segments of the last `LOOKED_AT` answered pairs, or of all."""
    rows = slice(max(len(preferences) - LOOKED_AT, 0), None)
    first, second = preferences.first[rows], preferences.second[rows]
    return Segments(torch.cat([first.obs, second.obs]), torch.cat([first.actions, second.actions]))
