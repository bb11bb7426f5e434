"""Which estimator of the second term an updater asked for: one function for all of them."""

from __future__ import annotations

import numpy as np
import torch

from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.second_term.covariance import covariance_estimate, win_rate_estimate
from pbrl.second_term.critic_adjoint import critic_adjoint_estimate
from pbrl.second_term.critic_pairs import critic_pairs_estimate
from pbrl.second_term.fresh import LABELLED_SHARE, Division, divide
from pbrl.second_term.guard import Estimate, WeightedRows
from pbrl.second_term.implicit import CRITIC_BASED, Implicit, implicit_term
from pbrl.second_term.upper import ScoreRows, Utility, mean_rewards, pair_scores, preference_values, utility_scores
from pbrl.types import Session


def check_estimator(settings: Implicit, upper: str, utility: Utility | None) -> None:
    """Refuse an upper objective that the estimator would ignore.

    Raises:
        ValueError: naming both.
    """
    if settings.estimator in CRITIC_BASED and (upper != "preference" or utility is not None):
        raise ValueError(
            f"updater.upper={upper}, utility={utility}: implicit.estimator={settings.estimator} has an upper objective "
            "of its own; leave them at preference and null, or choose fisher, full, paper or covariance"
        )


def estimate(
    settings: Implicit,
    upper: str,
    utility: Utility | None,
    reward: RewardEnsemble,
    preferences: Preferences,
    session: Session,
) -> Estimate:
    """This session's second term, without touching `session.rng` (except for branches).

    A closed gate so leaves the updater's shuffles as they would be without it.
    """
    if settings.estimator in CRITIC_BASED:
        return _through_critics(settings, reward, preferences, session)
    episodes = session.fresh()
    if len(preferences.current) < 2 or not episodes:
        return Estimate(None)
    closed_form = upper == "win_rate" or settings.estimator == "covariance"
    share = 1.0 if closed_form and utility is None else LABELLED_SHARE
    fresh = divide(preferences, episodes, settings.trajectory_length, share)
    if not fresh.enough(pieces=share < 1):
        return Estimate(None, metrics={"pairs": float(len(fresh.pairs))})
    scores: list[ScoreRows] = []
    found: list[Estimate] = []
    if upper == "win_rate":
        found.append(win_rate_estimate(fresh.pairs, session.policy.alpha))
    elif settings.estimator == "covariance":
        found.append(_covariance(settings, reward, preferences, fresh, session))
    else:
        scores.append(pair_scores(upper, reward, fresh.pairs))
    if utility is not None:
        scores.append(utility_scores(utility, reward, fresh.pieces))
    if scores:
        found.append(_solve(settings, reward, scores, fresh, session))
    return _sum(found, reward.device, {"pairs": float(len(fresh.pairs))})


def _through_critics(
    settings: Implicit, reward: RewardEnsemble, preferences: Preferences, session: Session
) -> Estimate:
    rng = np.random.default_rng((session.env_step, len(preferences)))  # not session.rng
    if settings.estimator == "critic-pairs":
        return critic_pairs_estimate(
            preferences,
            session,
            rng,
            rows=settings.rows,
            ridge=settings.ridge,
            compare=settings.compare,
            actions=settings.actions,
            device=reward.device,
        )
    return critic_adjoint_estimate(
        reward,
        preferences,
        session,
        rng,
        trajectory_length=settings.trajectory_length,
        rows=settings.rows,
        ridge=settings.ridge,
        trace_decay=settings.trace_decay,
        center=settings.center,
        actions=settings.actions,
        low_dimensional=settings.estimator == "low-dimensional",
    )


def _solve(
    settings: Implicit, reward: RewardEnsemble, scores: list[ScoreRows], fresh: Division, session: Session
) -> Estimate:
    together, pieces = ScoreRows.cat(scores).to(reward.device), fresh.pieces
    with torch.no_grad():
        rewards = reward.pay.convex(mean_rewards(reward, pieces))
    return implicit_term(
        settings,
        session.policy,
        pieces.to(reward.device),
        rewards,
        together.gradients(session.policy, session.policy.parameters()),
        torch.Generator().manual_seed(session.env_step),  # not session.rng
    )


def _covariance(
    settings: Implicit, reward: RewardEnsemble, preferences: Preferences, fresh: Division, session: Session
) -> Estimate:
    if preferences.states is None:
        raise ValueError("implicit.estimator=covariance continues segments; this environment stores no states")
    if min(fresh.pairs.sizes()) < 2:
        return Estimate(None)
    states = preferences.states[fresh.chosen]
    starts = states.transpose(0, 1).flatten(0, 1)  # all first, then all second ones
    continued = session.branches_from(starts, settings.branches, fresh.pairs.segments.length)
    values = preference_values(reward, fresh.pairs)
    return covariance_estimate(values, fresh.pairs, continued, session.policy.alpha)


def _sum(found: list[Estimate], device: torch.device, metrics: dict[str, float]) -> Estimate:
    """All terms together, on the device; none if one that was asked for is missing."""
    rows = [part.rows for part in found if part.rows is not None]
    metrics = metrics | {key: value for part in found for key, value in part.metrics.items()}
    if len(rows) < len(found):
        return Estimate(None, metrics=metrics)
    moved = [WeightedRows(r.obs.to(device), r.actions.to(device), r.weights.to(device)) for r in rows]
    return Estimate(WeightedRows.cat(moved), all(part.converged for part in found), metrics)
