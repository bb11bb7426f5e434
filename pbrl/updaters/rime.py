"""RIME (Cheng et al., ICML 2024): any updater, trained only on answers that the reward does not find implausible.

    KL_i = KL(label_i ‖ p_i),   p_i = the ensemble's mean probability that the first segment is preferred
    trusted:  KL_i < tau_low = −ln x + alpha x + min(beta Var, 3)        flipped:  KL_i > tau_high = −ln flip

where x is a running mean of the largest trusted KL, and beta falls linearly. Var is the variance of all KL trusted so
far, pooled by count; the mean that enters it is a running one, at the same rate as x. The reward's learning rate rises
linearly from 0 over the first `warmup_epochs` epochs after the warm start.
A wrapper: the reward is trained by `inner`, on the trusted and the flipped answers only, chosen anew for each epoch.

Before the first answers the reward is fitted to the normalised novelty by which pretraining paid the agent, so that the
agent's critics remain right (`pretraining.reset_critic=false`, `pretraining.bounded=true`).

Departures, each where the published code contradicts itself or fails: the divergence of an equal label is measured from
that label (ln 2 less than its cross-entropy), and equal labels, which have no other side, are never flipped; a pair
above both thresholds counts once, as trusted; if nothing is left to train on, training stops instead of failing; the
warm start is done at once, at the first session, not spread over pretraining.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pbrl.interfaces import Updater, as_updater
from pbrl.losses import log_likelihood
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Session

NOVELTY_ROWS = 2048  # observations whose mean and deviation normalise the novelty


def divergences(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(label ‖ mean over members of sigmoid(logits)), float [N] in nats, for logits [M, N] and labels [N]."""
    p = torch.sigmoid(logits.double()).mean(dim=0)
    y = labels.double()
    entropy = -(torch.xlogy(y, y) + torch.xlogy(1 - y, 1 - y))
    return -log_likelihood(torch.logit(p, eps=1e-12), y) - entropy


class Rime(Updater):
    """Denoises the answers for another updater.

    Args:
        inner: the updater to wrap; one call of it is one epoch, so its own `fit.epochs` is usually 1.
        epochs: at the most. least_epochs: at the least. stop_accuracy: stop after an epoch above it.
        alpha: of tau_low. beta_first, beta_last: weight of the variance, over the run's first `beta_epochs` epochs.
        flip: probability below which a label is held to be wrong and flipped.
        rate: of the running means.
        warmup_epochs: over which the learning rate rises; the first one trains nothing. 0: at once.
        warm_updates: gradient steps of the warm start; 0: none. warm_batch_size: transitions each.
        nearest: k of the novelty, as in pretraining.

    Raises:
        ValueError: for an inner updater that learns no reward, or one that learns between sessions from raw answers.
    """

    def __init__(
        self,
        *,
        inner: Updater,
        epochs: int,
        least_epochs: int,
        stop_accuracy: float,
        alpha: float,
        beta_first: float,
        beta_last: float,
        beta_epochs: int,
        flip: float,
        rate: float,
        warmup_epochs: int,
        warm_updates: int,
        warm_batch_size: int,
        nearest: int,
    ) -> None:
        inner = as_updater(inner)
        if inner.pairs == "none":
            raise ValueError("updater.inner asks no questions, so there is nothing to denoise; wrap pebble or another")
        if inner.between_every is not None:
            raise ValueError("updater.inner also learns between sessions, from answers as given; rime cannot wrap it")
        if not 0 < flip < 0.5 or not 0 < rate <= 1:
            raise ValueError(f"updater.flip={flip}, updater.rate={rate}; expected 0 < flip < 0.5 and 0 < rate ≤ 1")
        if warmup_epochs < 0:
            raise ValueError(f"updater.warmup_epochs={warmup_epochs}; expected at least 0")
        self.inner, self.pairs, self.margin = inner, inner.pairs, inner.margin
        self.epochs, self.least_epochs, self.stop_accuracy = epochs, least_epochs, stop_accuracy
        self.alpha, self.flip, self.rate = alpha, flip, rate
        self.beta_first, self.beta_last, self.beta_epochs = beta_first, beta_last, beta_epochs
        self.warm_updates, self.warm_batch_size, self.nearest = warm_updates, warm_batch_size, nearest
        self.warmup_epochs = warmup_epochs
        self.warm, self.largest, self.variance, self.done = False, 0.0, 1.0, 0
        self.mean, self.count = 0.0, 0  # of the trusted KL

    def start(self, session: Session) -> None:
        """The inner updater's."""
        self.inner.start(session)

    def own_steps(self, pairs: int, length: int) -> int:
        """Those of the inner updater at most: in the first epoch, and in the others, which have no new pairs."""
        return self.inner.own_steps(pairs, length) + (self.epochs - 1) * self.inner.own_steps(0, length)

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Denoise and train, epoch by epoch; returns the inner updater's last metrics, its steps, the shares kept."""
        metrics: dict[str, float] = {}
        if not self.warm:
            self.warm = True
            metrics |= self._warm_start(reward, session)
        rates = [group["lr"] for group in reward.optimizer.param_groups]
        for epoch in range(1, self.epochs + 1):
            labels = preferences.prefers_first
            trusted, flipped = self._denoise(reward, preferences)
            metrics["rime/trusted"], metrics["rime/flipped"] = (float(x.float().mean()) for x in (trusted, flipped))
            index = (trusted | flipped).nonzero().squeeze(1)
            if not len(index):
                break
            # new to the inner updater are the session's pairs that are kept, in its first epoch
            kept = preferences.select(index, torch.where(flipped, 1 - labels, labels)[index], new=epoch == 1)
            share = min((self.done - 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
            _set_rates(reward, [share * rate for rate in rates])
            try:
                found = self.inner.update(reward, kept, session)
            finally:
                _set_rates(reward, rates)
            if "reward/steps" in found:
                found["reward/steps"] += metrics.get("reward/steps", 0.0)
            metrics |= found | {"reward/epochs": float(epoch)}
            if epoch >= self.least_epochs and metrics.get("reward/accuracy", 0.0) > self.stop_accuracy:
                break
        return metrics

    @property
    def lower_threshold(self) -> float:
        """tau_low now, in nats; infinite before the first epoch (everything is trusted)."""
        if self.largest == 0:
            return math.inf
        progress = min(self.done / self.beta_epochs, 1.0)
        beta = self.beta_first + (self.beta_last - self.beta_first) * progress
        return -math.log(self.largest) + self.alpha * self.largest + min(beta * self.variance, 3.0)

    def _denoise(self, reward: RewardEnsemble, preferences: Preferences) -> tuple[Tensor, Tensor]:
        """Which pairs are trusted and which are to be flipped: bool [N] each, never both."""
        labels = preferences.prefers_first
        kl = divergences(reward.preference_logits(preferences.first, preferences.second), labels)
        trusted = kl < self.lower_threshold
        flipped = (kl > -math.log(self.flip)) & ~trusted & (labels != 0.5)
        if trusted.any():
            self.observe(kl[trusted])
        self.done += 1
        return trusted, flipped

    def observe(self, trusted: Tensor) -> None:
        """Take in an epoch's trusted divergences, float [N]: x, their mean and their variance."""
        size, mean, variance = len(trusted), float(trusted.mean()), float(trusted.var(unbiased=False))
        total = self.count + size
        between = (mean - self.mean) ** 2 * self.count * size / total
        self.variance = (self.variance * self.count + variance * size + between) / total
        self.mean += self.rate * (mean - self.mean)
        self.largest += self.rate * (float(trusted.max()) - self.largest)
        self.count = total

    def _warm_start(self, reward: RewardEnsemble, session: Session) -> dict[str, float]:
        """Fit every member to clip((d − mean d) / (3 std d), −1, 1), d the distance to the k-th nearest observation."""
        if not self.warm_updates:
            return {}
        distances = session.novelty(session.transitions(NOVELTY_ROWS)["obs"], self.nearest)
        mean, std = distances.mean(), distances.std(unbiased=False).clamp_min(1e-8)
        total = 0.0
        for _ in range(self.warm_updates):
            batch = session.transitions(self.warm_batch_size)
            target = ((session.novelty(batch["obs"], self.nearest) - mean) / (3 * std)).clamp(-1, 1)
            loss = (reward(batch["obs"], batch["actions"]) - target).square().mean(dim=1).sum()
            reward.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            reward.optimizer.step()
            total += float(loss.detach()) / len(reward.members)
        return {"rime/warm_start_loss": total / self.warm_updates}

    def state_dict(self) -> dict[str, Any]:
        """Running numbers and the inner updater's state, for a checkpoint."""
        return {
            "numbers": [self.warm, self.largest, self.variance, self.done, self.mean, self.count],
            "inner": self.inner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.warm, self.largest, self.variance, self.done, *pooled = state["numbers"]
        self.mean, self.count = pooled if pooled else (0.0, 0)  # a run from before 0.2 begins to count now
        self.inner.load_state_dict(state["inner"])


def _set_rates(reward: RewardEnsemble, rates: list[float]) -> None:
    for group, rate in zip(reward.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
