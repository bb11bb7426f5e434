"""Which pairs to ask about. A rule sees candidate pairs and picks the most useful ones (Lee et al., NeurIPS 2021
datasets track, §4).

Every rule is symmetric: swapping the two segments of a pair changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pbrl.checks import check
from pbrl.nearest import nearest_distances
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.standardise import CONSTANT
from pbrl.types import Query, Segments


@dataclass
class QueryRule(ABC):
    """Picks the most useful of some candidate pairs.

    Args:
        pool: candidates drawn per question (B-Pref's large_batch).
        recent_episodes: draw only from that many last episodes (QPA's policy-aligned queries); null: all kept ones.
        branch_share: share of the questions that are branch pairs, two continuations by the present policy from one
            stored simulator state; their steps count as environment steps.
        against_kept: with `recent_episodes`, only one clip of each pair is recent, the other from everything kept:
            whether the policy does better than it did is what over-optimisation gets wrong.
        novel_share: share of the questions that are not the rule's choice but the candidates with a step least like
            any asked about before (`most_novel`). Members fitted to the same answers can agree, and be wrong, where
            nothing was asked; then no rule that looks at them asks there.
        best_share: share of the rule's own questions that it chooses among the `most_rewarded` candidates alone. What
            the policy should do next is rare in what it does, so a rule that looks at all of it hardly asks about it.

    Raises:
        ValueError: for a number out of range.
    """

    pool: int = 10
    recent_episodes: int | None = None
    branch_share: float = 0.0
    against_kept: bool = False
    novel_share: float = 0.0
    best_share: float = 0.0

    from_the_start = False  # chooses the first session's pairs too; else those are random
    compares_members = False  # makes sense only with several reward networks

    def __post_init__(self) -> None:
        recent = self.recent_episodes
        check(
            "query",
            pool=(self.pool, self.pool >= 1, "at least 1 candidate per question"),
            recent_episodes=(recent, recent is None or recent >= 1, "at least 1, or null for all"),
            branch_share=(self.branch_share, 0 <= self.branch_share <= 1, "a share in [0, 1]"),
            novel_share=(self.novel_share, 0 <= self.novel_share <= 1, "a share in [0, 1]"),
            best_share=(self.best_share, 0 <= self.best_share <= 1, "a share in [0, 1]"),
            against_kept=(
                self.against_kept,
                not self.against_kept or recent is not None,
                "false, or a number for query.recent_episodes",
            ),
        )

    @abstractmethod
    def __call__(
        self, candidates: Query, count: int, reward: RewardEnsemble, asked: Preferences, rng: np.random.Generator
    ) -> np.ndarray:
        """Indices of `count` of the candidates: int64 [count]. `asked`: all pairs answered so far."""


@dataclass
class Uniform(QueryRule):
    """Random pairs. Also what every run asks first, before the reward knows anything."""

    pool: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.novel_share or self.best_share:  # which are chosen among candidates
            self.pool = max(self.pool, QueryRule.pool)

    def __call__(
        self, candidates: Query, count: int, reward: RewardEnsemble, asked: Preferences, rng: np.random.Generator
    ) -> np.ndarray:
        if count == len(candidates):
            return np.arange(count)
        return rng.choice(len(candidates), count, replace=False)  # they may come in an order, the best ones first


def disagreement(candidates: Query, reward: RewardEnsemble) -> Tensor:
    """Standard deviation over the members of P(first preferred), float32 [C]."""
    return torch.sigmoid(reward.preference_logits(candidates.first, candidates.second)).std(dim=0, unbiased=False)


def entropy(candidates: Query, reward: RewardEnsemble) -> Tensor:
    """Entropy in nats of each member's predicted answer, averaged over members, float32 [C]."""
    logits = reward.preference_logits(candidates.first, candidates.second)
    p = torch.sigmoid(logits)
    log_p, log_not_p = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return -(p * log_p + (1 - p) * log_not_p).mean(dim=0)


BEST = 0.2  # of the candidates: what `best_share` chooses from
THIN = 3  # of so many steps of a clip one is looked at: neighbours look alike
SCORES = {"disagreement": disagreement, "entropy": entropy}


def _best(score: Tensor, count: int) -> np.ndarray:
    return torch.argsort(score, descending=True, stable=True)[:count].numpy()


@dataclass
class Score(QueryRule):
    """The candidates with the highest score: `disagreement` of the ensemble or `entropy` of its answers."""

    score: str = "disagreement"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise ValueError(f"query.score={self.score}; expected one of {', '.join(SCORES)}")
        self.compares_members = self.score == "disagreement"

    def __call__(
        self, candidates: Query, count: int, reward: RewardEnsemble, asked: Preferences, rng: np.random.Generator
    ) -> np.ndarray:
        return _best(SCORES[self.score](candidates, reward), count)


def most_novel(candidates: Query, asked: Preferences, count: int) -> np.ndarray:
    """The pairs with a step least like any asked about, one after the other, each counting as asked for the next.

    Unlike is the Euclidean distance of observations, in standard deviations of those of the candidates and the asked,
    without dimensions that are constant (below `CONSTANT`); every `THIN`-th step of a clip is looked at.

    Args:
        candidates: C pairs. asked: at least one answered pair. count: how many to pick, ≤ C.

    Returns:
        int64 [count].
    """
    clips = [side.obs[:, ::THIN] for side in (candidates.first, candidates.second)]
    known = torch.cat([side.obs[:, ::THIN].flatten(0, 1) for side in (asked.first, asked.second)])
    steps = torch.cat(clips, dim=1)  # [C, S, obs_dim]
    deviation = torch.cat([steps.flatten(0, 1), known]).std(dim=0, unbiased=False)
    moving = deviation > CONSTANT
    steps, known = (x[..., moving] / deviation[moving] for x in (steps, known))

    def distances(others: Tensor) -> Tensor:
        """Of each candidate's steps to the nearest of others: float32 [C, S]."""
        return nearest_distances(steps.flatten(0, 1), others, 0).view(steps.shape[:2])

    distance, picks = distances(known), np.empty(count, np.int64)
    for i in range(count):
        picks[i] = best = int(distance.amax(dim=1).argmax())
        distance = torch.minimum(distance, distances(steps[best]))
        distance[best] = -1.0  # below all distances: not again
    return picks


def most_rewarded(candidates: Query, reward: RewardEnsemble, count: int) -> np.ndarray:
    """The pairs whose worse clip is best by the learned reward, the members' mean return; best first.

    Args:
        candidates: C pairs. count: at least so many, ≤ C; else the better `BEST` of them.

    Returns:
        int64 [max(count, round(BEST · C))].
    """
    first, second = (reward.returns(side).mean(dim=0) for side in (candidates.first, candidates.second))
    return _best(torch.minimum(first, second), max(count, round(BEST * len(candidates))))


def pair_features(first: Segments, second: Segments) -> tuple[np.ndarray, np.ndarray]:
    """A pair as a point: its observations' sum and difference, float32 [N, H·obs_dim] each.

    Swapping the pair flips the sign of the difference only, so the distance between two pairs, minimised over their
    orders, is ‖sum − sum'‖² + min(‖diff − diff'‖², ‖diff + diff'‖²), up to the factor 2 of the concatenation.
    """
    a, b = first.obs.flatten(1).numpy(), second.obs.flatten(1).numpy()
    return a + b, a - b


def k_center(
    candidates: tuple[np.ndarray, np.ndarray], chosen: tuple[np.ndarray, np.ndarray], count: int
) -> np.ndarray:
    """Greedy farthest-first: again and again the candidate farthest from everything chosen or labelled so far.

    Each pick updates the distances to the new centre only: O(C·n + count·C) distances in all.

    Args:
        candidates, chosen: `pair_features` of the C candidates and of the n pairs asked before.
        count: how many to pick, ≤ C.

    Returns:
        int64 [count]; with nothing asked before, the first pick is the candidate farthest from the mean.
    """
    total, difference = candidates
    center = total.mean(axis=0, keepdims=True)

    def squares(x: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij->i", x, x)

    total = total - center  # smaller numbers: the expanded square loses fewer digits
    total_norm, difference_norm = squares(total), squares(difference)

    def distances(other_total: np.ndarray, other_difference: np.ndarray) -> np.ndarray:
        cross = np.abs(difference @ other_difference.T)  # |·|: the nearer of the two orders
        norms = (total_norm + difference_norm)[:, None] + (squares(other_total) + squares(other_difference))[None]
        return norms - 2 * (total @ other_total.T) - 2 * cross

    known = len(chosen[0]) > 0
    nearest = distances(chosen[0] - center, chosen[1]).min(axis=1) if known else total_norm + difference_norm
    picks = np.empty(count, np.int64)
    for i in range(count):
        picks[i] = best = int(np.argmax(nearest))
        new = distances(total[best : best + 1], difference[best : best + 1])[:, 0]
        nearest = np.minimum(nearest, new) if i or known else new
        nearest[best] = -np.inf
    return picks


@dataclass
class KCenter(QueryRule):
    """Pairs that cover the candidates: farthest-first in observation space (the last three of B-Pref's query rules).

    Args:
        score: null, or first keep the better half of the candidates by `disagreement` or `entropy`.
    """

    score: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score is not None and self.score not in SCORES:
            raise ValueError(f"query.score={self.score}; expected null or one of {', '.join(SCORES)}")
        self.compares_members = self.score == "disagreement"

    def __call__(
        self, candidates: Query, count: int, reward: RewardEnsemble, asked: Preferences, rng: np.random.Generator
    ) -> np.ndarray:
        kept = np.arange(len(candidates))
        if self.score is not None:
            kept = _best(SCORES[self.score](candidates, reward), max(count, len(candidates) // 2))
        pool = candidates[kept]
        features = pair_features(pool.first, pool.second)
        known = pair_features(asked.first, asked.second) if len(asked) else (features[0][:0], features[1][:0])
        return kept[k_center(features, known, count)]


def difference(first: Segments, second: Segments) -> np.ndarray:
    """How different the two motions of each pair look, step by step: float32 [N].

    Root mean square, over steps and dimensions, of the observations' difference in standard deviations of all the
    observations given; dimensions that never change do not count.
    """
    deviation = torch.cat([first.obs, second.obs]).flatten(0, 1).std(dim=0, unbiased=False)
    moving = deviation > 0
    apart = (first.obs - second.obs)[..., moving] / deviation[moving]
    return apart.square().mean(dim=(1, 2)).sqrt().numpy() if moving.any() else np.zeros(len(first), np.float32)


@dataclass
class Distinct(KCenter):
    """Pairs that a person can tell apart: the less different half of the candidates is left out (`difference`). Of the
    others the best by `score` are kept, twice as many as are asked, and of those the ones that cover them best are
    asked, the most different first.

    Without answers there is no score yet: the first session's pairs are chosen by difference and cover alone.
    """

    score: str | None = "disagreement"
    from_the_start = True

    def __call__(
        self, candidates: Query, count: int, reward: RewardEnsemble, asked: Preferences, rng: np.random.Generator
    ) -> np.ndarray:
        apart = difference(candidates.first, candidates.second)
        kept = np.argsort(-apart, kind="stable")[: max(count, len(candidates) // 2)]
        if self.score is not None and len(asked):
            kept = kept[_best(SCORES[self.score](candidates[kept], reward), 2 * count)]
        picks = kept[KCenter()(candidates[kept], count, reward, asked, rng)]
        return picks[np.argsort(-apart[picks], kind="stable")]
