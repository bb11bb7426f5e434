"""A-PARL's second term as covariances within a start state: neither a solve nor a score function.

At a soft-optimal policy with deterministic dynamics, trajectories from s0 are distributed as exp(R_phi / alpha), so
d log p(τ)/dphi = (∂_phi R_phi(τ) − E[∂_phi R_phi | s0]) / alpha. On exact problems: `pbrl.bilevel.covariance_term` and
`win_rate_term`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pbrl.second_term.fresh import Labelled
from pbrl.second_term.guard import Estimate, WeightedRows
from pbrl.types import Segments


def covariance_estimate(values: Tensor, labelled: Labelled, continued: Segments, alpha: float) -> Estimate:
    """The term from the labels that were paid for and unlabelled continuations.

        Term 2 = (2 / alpha) E[ (f − b) (∂_phi R_phi(τ) − mean_c ∂_phi R_phi(τ_c)) ],    τ labelled, τ_c from τ's start

    f of a labelled pair is an unbiased sample of f̄ of each of its segments, and the continuations' mean estimates
    E[∂_phi R_phi | s0], so this is (2/alpha) E_s0 Cov(f̄, ∂_phi R_phi | s0) without a label for any continuation. Exact
    in expectation at a soft-optimal policy with deterministic dynamics. Each half's pairs make one estimate; b is the
    mean of the half's other pairs, so there must be two.

    Args:
        values: f of each pair, float32 [N].
        continued: the continuations of each of the 2N segments, [2N * branches, H, ...], one's beside each other.
        alpha: weight of the entropy bonus.
    """
    sizes = labelled.sizes()
    if min(sizes) < 2:
        return Estimate(None)
    branches = len(continued) // (2 * len(labelled))
    parts = []
    for half, count in enumerate(sizes):
        own = (labelled.half == half).float()
        centred = own * (values - (own * values).sum() / count) / (count - 1)
        weight = centred.repeat(2) / alpha  # 2/alpha, over the 2 count segments; count − 1 for the baseline's share
        parts.append(_segment_rows(labelled.segments, weight, half))
        parts.append(_segment_rows(continued, -(weight / branches).repeat_interleave(branches), half))
    return Estimate(WeightedRows.cat(parts))


def win_rate_estimate(labelled: Labelled, alpha: float) -> Estimate:
    """The whole hypergradient of the teacher's win rate over the present policy: no solve, no scores.

        dG_win/dphi = 1/(2 alpha) E[ (y − ½)(∂_phi R_phi(τ0) − ∂_phi R_phi(τ1)) ]

    Exact for pairs from one start state each (`query.branch_share=1`); for other pairs it also credits the policy with
    where a segment happened to start. Each half's pairs make one estimate.
    """
    if min(labelled.sizes()) < 1:
        return Estimate(None)
    parts = []
    for half in (0, 1):
        own = (labelled.half == half).float()
        weight = own * (labelled.prefers_first - 0.5) / (2 * alpha * own.sum())
        parts.append(_segment_rows(labelled.segments, torch.cat([weight, -weight]), half))
    return Estimate(WeightedRows.cat(parts))


def _segment_rows(segments: Segments, weight: Tensor, half: int) -> WeightedRows:
    """Every step of segment i with weight[i], where that is not zero."""
    used = weight != 0
    obs, actions = segments.obs[used], segments.actions[used]
    weights = weight[used].repeat_interleave(segments.length)
    return WeightedRows.of_half(obs.flatten(0, 1), actions.flatten(0, 1), weights, half)
