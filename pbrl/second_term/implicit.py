"""Estimates of A-PARL's implicit term from a robot's rollouts, each as a weighted reward gradient.

    Term 2 = −∂_phi ⟨∂_theta V, x⟩ = −mean_j Σ_h gamma^h c_jh ∂_phi r_phi(s_jh, a_jh)
    (A − damping · I) x = ∂_theta G

PARL eq. (12)–(17), (28)–(31). The two factors never share a step (`pbrl.second_term.fresh`). Nothing of size
dim(theta)² is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pbrl.bilevel.implicit import mean_eigenvalue, solve_curvature, traces
from pbrl.bilevel.params import leaves
from pbrl.bilevel.surrogates import (
    Curvature,
    discounted_weights,
    fisher_product,
    hessian_product,
    paper_curvature,
    value_surrogate,
)
from pbrl.second_term.fresh import PARTS, Labelled, Trajectories
from pbrl.second_term.guard import Estimate, WeightedRows
from pbrl.types import Params, PolicyView, Segments

ESTIMATORS = ("fisher", "full", "paper", "covariance", "off")


@dataclass(frozen=True)
class Implicit:
    """How the implicit term is estimated.

    Args:
        estimator: the curvature A: `fisher` (exact at the soft optimum, definite, least noisy), `full` (the Hessian of
            the recorded value: indefinite, noisy), `paper` (PARL 16, which is not that Hessian); or `covariance`, which
            needs neither a solve nor scores but continues every labelled segment's start state; or `off`.
        horizon: environment steps per trajectory of V; episodes are cut to it.
        damping: multiple of the mean Fisher eigenvalue, ≥ 0. The largest is some 1000 times the mean: below 30 a solve
            needs hundreds of iterations.
        max_iter: of the solver. tol: relative residual to reach, else the term is not used.
        trace_decay: per step, in (0, 1]; 1 is exact, less forgets earlier scores (less variance, some bias).
        center: take the mean over trajectories off the traces, step by step: unbiased, much less variance.
        states: environment steps at most whose states the curvature is averaged over.
        branches: continuations of each labelled segment's start state (`covariance`; they are environment steps).

    Raises:
        ValueError: for an unknown estimator or a number out of range.
    """

    estimator: str = "fisher"
    horizon: int = 50
    damping: float = 30.0
    max_iter: int = 100
    tol: float = 1e-3
    trace_decay: float = 1.0
    center: bool = True
    states: int = 2048
    branches: int = 2

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"implicit.estimator={self.estimator}; expected one of {', '.join(ESTIMATORS)}")
        for name in ("horizon", "max_iter", "states", "branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"implicit.{name}={getattr(self, name)}; expected at least 1")
        if self.damping < 0 or self.tol <= 0 or not 0 < self.trace_decay <= 1:
            raise ValueError(f"{self}: expected damping ≥ 0, tol > 0 and trace_decay in (0, 1]")


def implicit_term(
    settings: Implicit,
    policy: PolicyView,
    trajectories: Trajectories,
    rewards: Tensor,
    score_gradients: list[Params],
    generator: torch.Generator,
) -> Estimate:
    """The term by solves with `fisher`, `full` or `paper` curvature: one solve per part, used on its partner's steps.

    Args:
        trajectories: on the policy's device; at least 2 per part, else there is no estimate.
        rewards: r_phi of their steps, float32 [B, H], constants.
        score_gradients: ∂_theta G by each part's scores (`ScoreRows.gradients`).
        generator: of the probes of the mean eigenvalue.
    """
    if len(trajectories) < 2 * PARTS:
        return Estimate(None)
    theta, gamma = policy.parameters(), policy.gamma
    curved, damping = _curvature(settings, policy, theta, trajectories, rewards, generator)
    parts, solves = [], []
    for k, g in enumerate(score_gradients):
        x, solved = solve_curvature(
            curved,
            g,
            solver="cg" if settings.estimator == "fisher" else "minres",
            damping=damping,
            tol=settings.tol,
            max_iter=settings.max_iter,
        )
        solves.append(solved)
        partner = k ^ 1
        piece = trajectories[partner::PARTS]
        c = traces(
            partial(policy.log_prob, obs=piece.obs, raw_actions=piece.raw_actions),
            theta,
            x,
            piece.mask,
            center=settings.center,
            trace_decay=settings.trace_decay,
        )
        weights = -discounted_weights(piece.mask, gamma).to(c) * c
        parts.append(_rows(piece, weights / 2, half=k // 2))  # a half's estimate is the mean of its two solves
    return Estimate(
        WeightedRows.cat(parts),
        all(solved.converged for solved in solves),
        {
            "solver_iterations": float(sum(solved.iterations for solved in solves)),
            "solver_residual": max(solved.residual for solved in solves),
            "damping": damping,
        },
    )


def _curvature(
    settings: Implicit,
    policy: PolicyView,
    theta: Params,
    trajectories: Trajectories,
    rewards: Tensor,
    generator: torch.Generator,
) -> tuple[Curvature, float]:
    """A, and the damping in units of its eigenvalues. Both are averages over at most `settings.states` steps."""
    stride = -(-trajectories.mask.numel() // settings.states)
    chosen, rewards = trajectories[::stride], rewards[::stride].detach()
    mask, gamma, alpha = chosen.mask, policy.gamma, policy.alpha
    weights = discounted_weights(mask, gamma)[mask]
    fisher = fisher_product(lambda theta: policy.distribution(theta, chosen.obs[mask]), theta, weights, alpha)
    damping = settings.damping * mean_eigenvalue(fisher, theta, generator)
    if settings.estimator == "fisher":
        return fisher, damping
    free = leaves(theta)
    with torch.enable_grad():
        log_prob = policy.log_prob(free, chosen.obs, chosen.raw_actions)
        if settings.estimator == "full":
            return hessian_product(value_surrogate(log_prob, rewards, mask, gamma, alpha), free), damping
        return paper_curvature(log_prob, rewards - alpha * log_prob.detach(), mask, gamma, free), damping


def covariance_term(values: Tensor, labelled: Segments, continued: Segments, alpha: float) -> Estimate:
    """The term without a solve (MATH §3b), from the labels that were paid for and unlabelled continuations.

        Term 2 = (2 / alpha) E[ (f − b) (∂_phi R_phi(τ) − mean_c ∂_phi R_phi(τ_c)) ],    τ labelled, τ_c from τ's start

    f of a labelled pair is an unbiased sample of f̄ of each of its segments, and the continuations' mean estimates
    E[∂_phi R_phi | s0], so this is (2/alpha) E_s0 Cov(f̄, ∂_phi R_phi | s0) without a label for any continuation. Exact
    in expectation at a soft-optimal policy with deterministic dynamics. Even pairs make one estimate, odd pairs the
    other.

    Args:
        values: f of each pair, float32 [N].
        labelled: all first, then all second segments, [2N, H, ...].
        continued: the continuations of each, [2N * branches, H, ...], those of one segment beside each other.
        alpha: weight of the entropy bonus.
    """
    size = len(values)
    if size < 4:
        return Estimate(None)
    branches = len(continued) // (2 * size)
    parts = []
    for half in (0, 1):
        own = (torch.arange(size) % 2 == half).float()
        count = float(own.sum())
        centred = own * (values - (own * values).sum() / count) / (count - 1)
        weight = centred.repeat(2) / alpha  # 2/alpha, over the 2 count segments; count − 1 for the baseline's share
        parts.append(_segment_rows(labelled, weight, half))
        parts.append(_segment_rows(continued, -(weight / branches).repeat_interleave(branches), half))
    return Estimate(WeightedRows.cat(parts))


def win_rate_term(labelled: Labelled, alpha: float) -> Estimate:
    """The whole hypergradient of the teacher's win rate over the present policy (MATH §3e): no solve, no scores.

        dG_win/dphi = 1/(2 alpha) E[ (y − ½)(∂_phi R_phi(τ0) − ∂_phi R_phi(τ1)) ]

    Exact for pairs from one start state each (`query.branch_share=1`); for other pairs it also credits the policy with
    where a segment happened to start. Even pairs make one estimate, odd pairs the other.
    """
    size = len(labelled)
    if size < 2:
        return Estimate(None)
    parts = []
    for half in (0, 1):
        own = (torch.arange(size) % 2 == half).float()
        weight = own * (labelled.prefers_first - 0.5) / (2 * alpha * own.sum())
        parts.append(_segment_rows(labelled.segments, torch.cat([weight, -weight]), half))
    return Estimate(WeightedRows.cat(parts))


def _segment_rows(segments: Segments, weight: Tensor, half: int) -> WeightedRows:
    """Every step of segment i with weight[i], where that is not zero."""
    used = weight != 0
    obs, actions = segments.obs[used], segments.actions[used]
    weights = torch.zeros(2, obs.shape[0] * obs.shape[1])
    weights[half] = weight[used].repeat_interleave(segments.horizon)
    return WeightedRows(obs.flatten(0, 1), actions.flatten(0, 1), weights)


def _rows(trajectories: Trajectories, weights: Tensor, half: int) -> WeightedRows:
    """The steps that happened, with weights float [B, H], as one half's estimate."""
    mask = trajectories.mask
    both = torch.zeros(2, int(mask.sum()), device=weights.device)
    both[half] = weights[mask].float()
    return WeightedRows(trajectories.obs[mask], trajectories.actions[mask], both)
