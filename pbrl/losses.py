"""Losses of the Bradley–Terry preference model: pure functions of predicted rewards (PARL eq. 6–7)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _check_pair(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"first and second must both be [B, H]; got {list(first.shape)} and {list(second.shape)}")


def preference_logits(first: Tensor, second: Tensor) -> Tensor:
    """Log-odds that the first segment is preferred: Σ_h r(first_h) − Σ_h r(second_h).

    Args:
        first, second: predicted rewards, float [B, H]; summed, not averaged, over the segment.

    Returns:
        float [B], in nats.

    Raises:
        ValueError: if the shapes differ or are not [B, H].
    """
    _check_pair(first, second)
    return first.sum(dim=1) - second.sum(dim=1)


def log_likelihood(logits: Tensor, prefers_first: Tensor) -> Tensor:
    """Log-likelihood of each label, f = y log P + (1 − y) log(1 − P), P = sigmoid(logits)   PARL eq. (7).

    Args:
        logits: log-odds of preferring the first segment, float [B].
        prefers_first: labels in [0, 1], float [B]; 0.5 means equally good.

    Returns:
        float [B], in nats, ≤ 0.
    """
    return -F.binary_cross_entropy_with_logits(logits, prefers_first, reduction="none")


def bradley_terry_loss(first: Tensor, second: Tensor, prefers_first: Tensor) -> Tensor:
    """Cross-entropy of the Bradley–Terry preference model.

        P(first ≻ second) = sigmoid(Σ_h r(first_h) − Σ_h r(second_h))        PARL eq. (6)

    Args:
        first, second: predicted rewards, float32 [B, H].
        prefers_first: labels in [0, 1], float32 [B]; 0.5 means equally good.

    Returns:
        Mean loss over the batch, float32 [], in nats.

    Raises:
        ValueError: if first and second differ in shape.
    """
    return -log_likelihood(preference_logits(first, second), prefers_first).mean()


def correct(logits: Tensor, prefers_first: Tensor) -> tuple[Tensor, Tensor]:
    """How many decided labels the logits predict, and how many labels are decided (not 0.5).

    Equal pairs have no right side, so they count in neither number. (B-Pref counts them as one class.)

    Returns:
        Two int64 [] tensors: hits, decided.
    """
    decided = prefers_first != 0.5
    hits = ((logits > 0) == (prefers_first > 0.5)) & decided
    return hits.sum(), decided.sum()


def calibration_error(logits: Tensor, prefers_first: Tensor, bins: int = 10) -> float:
    """Expected calibration error of the predicted preference probabilities, in [0, 1].

    Pairs are binned by P(first preferred) into `bins` equal bins; the error is Σ_b n_b/N |mean label − mean P|.
    NaN without pairs.
    """
    if len(logits) == 0:
        return float("nan")
    probability = torch.sigmoid(logits.double())
    index = (probability * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, prefers_first.double() - probability)
    return float(gap.abs().sum() / len(logits))
