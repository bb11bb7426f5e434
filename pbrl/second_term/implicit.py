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
from pbrl.checks import check
from pbrl.second_term.fresh import PARTS, Trajectories
from pbrl.second_term.guard import Estimate, WeightedRows
from pbrl.types import Params, PolicyView

CRITIC_BASED = ("critic-pairs", "critic-adjoint", "low-dimensional")
ESTIMATORS = ("fisher", "full", "paper", "covariance", *CRITIC_BASED, "off")
COMPARED = ("advantage", "value")


@dataclass(frozen=True, kw_only=True)
class Implicit:
    """How the implicit term is estimated.

    Args:
        estimator: the curvature A: `fisher` (exact at the soft optimum, definite, least noisy), `full` (the Hessian of
            the recorded value: indefinite, noisy), `paper` (PARL 16, which is not that Hessian); or `covariance`, which
            needs neither a solve nor scores but continues every labelled segment's start state; or one through the
            critics, with an upper objective of its own: `critic-pairs` (`pbrl.second_term.critic_pairs`),
            `critic-adjoint` and `low-dimensional` (`pbrl.second_term.critic_adjoint`); or `off`.
        trajectory_length: environment steps per trajectory of V; episodes are cut to it.
        damping: multiple of the mean Fisher eigenvalue, ≥ 0. The largest is some 1000 times the mean: below 30 a solve
            needs hundreds of iterations.
        max_iter: of the solver. tol: relative residual to reach, else the term is not used.
        trace_decay: per step, in (0, 1]; 1 is exact, less forgets earlier scores (less variance, some bias).
        center: take the mean over trajectories off the traces, step by step: much less variance.
        states: environment steps at most whose states one solve's curvature is averaged over.
        branches: continuations of each labelled segment's start state (`covariance`; they are environment steps).
        rows: replay rows that the solves through the critics average over.
        ridge: of those solves, ≥ 0, in units of the features' mean square.
        compare: what `critic-pairs` compares: discounted `advantage` sums of the segments, or the first steps' `value`.
        actions: sampled per state where the policy's mean is needed (through the critics).

    Raises:
        ValueError: for an unknown estimator or a number out of range.
    """

    estimator: str
    trajectory_length: int
    damping: float
    max_iter: int
    tol: float
    trace_decay: float
    center: bool
    states: int
    branches: int
    rows: int = 8192
    ridge: float = 0.01
    compare: str = "advantage"
    actions: int = 4

    def __post_init__(self) -> None:
        check(
            "implicit",
            estimator=(self.estimator, self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
            trajectory_length=(self.trajectory_length, self.trajectory_length >= 1, "at least 1"),
            max_iter=(self.max_iter, self.max_iter >= 1, "at least 1"),
            states=(self.states, self.states >= 1, "at least 1"),
            branches=(self.branches, self.branches >= 1, "at least 1"),
            rows=(self.rows, self.rows >= 1, "at least 1"),
            actions=(self.actions, self.actions >= 1, "at least 1"),
            compare=(self.compare, self.compare in COMPARED, f"one of {', '.join(COMPARED)}"),
            ridge=(self.ridge, self.ridge >= 0, "at least 0"),
            damping=(self.damping, self.damping >= 0, "at least 0"),
            tol=(self.tol, self.tol > 0, "a positive number"),
            trace_decay=(self.trace_decay, 0 < self.trace_decay <= 1, "a number above 0, at most 1"),
        )


def implicit_term(
    settings: Implicit,
    policy: PolicyView,
    trajectories: Trajectories,
    rewards: Tensor,
    score_gradients: list[Params],
    generator: torch.Generator,
) -> Estimate:
    """The term by solves with `fisher`, `full` or `paper` curvature: one solve per part, on its partner's curvature.

    Args:
        trajectories: the pieces, on the policy's device; at least 2 per part, else there is no estimate.
        rewards: what their steps are paid, float32 [B, H], constants.
        score_gradients: ∂_theta G for each part (`ScoreRows.gradients`).
        generator: of the probes of the mean eigenvalue.
    """
    if len(trajectories) < 2 * PARTS:
        return Estimate(None)
    theta, gamma = policy.parameters(), policy.gamma
    parts, solves, dampings = [], [], []
    for k, g in enumerate(score_gradients):
        partner = slice(k ^ 1, None, PARTS)
        curved, damping = _curvature(settings, policy, theta, trajectories[partner], rewards[partner], generator)
        x, solved = solve_curvature(
            curved,
            g,
            solver="minres" if settings.estimator in ("full", "paper") else "cg",
            damping=damping,
            tol=settings.tol,
            max_iter=settings.max_iter,
        )
        solves.append(solved)
        dampings.append(damping)
        piece = trajectories[k::PARTS]
        c = traces(
            partial(policy.log_prob, obs=piece.obs, raw_actions=piece.raw_actions),
            theta,
            x,
            piece.mask,
            center=settings.center,
            trace_decay=settings.trace_decay,
        )
        weights = -discounted_weights(piece.mask, gamma).to(c) * c
        mask = piece.mask  # a half's estimate is the mean of its two solves
        parts.append(WeightedRows.of_half(piece.obs[mask], piece.actions[mask], weights[mask] / 2, k // 2))
    return Estimate(
        WeightedRows.cat(parts),
        all(solved.converged for solved in solves),
        {
            "solver_iterations": float(sum(solved.iterations for solved in solves)),
            "solver_residual": max(solved.residual for solved in solves),
            "damping": sum(dampings) / PARTS,
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
    if settings.estimator not in ("full", "paper"):  # a utility beside the covariances is solved for like this
        return fisher, damping
    free = leaves(theta)
    with torch.enable_grad():
        log_prob = policy.log_prob(free, chosen.obs, chosen.raw_actions)
        if settings.estimator == "full":
            return hessian_product(value_surrogate(log_prob, rewards, mask, gamma, alpha), free), damping
        return paper_curvature(log_prob, rewards - alpha * log_prob.detach(), mask, gamma, free), damping
