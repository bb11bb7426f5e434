"""Which pairs are asked about: every rule against a plain computation of what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pbrl.preferences import Preferences
from pbrl.queries import (
    THIN,
    KCenter,
    Score,
    Uniform,
    disagreement,
    entropy,
    k_center,
    most_novel,
    most_rewarded,
    pair_features,
)
from pbrl.reward import RewardEnsemble
from pbrl.types import Answer, Query, Segments

HORIZON, OBS, ACT = 4, 3, 2


def query(count: int, seed: int = 0, offset: float = 0.0) -> Query:
    rng = np.random.default_rng(seed)

    def segments() -> Segments:
        obs = rng.normal(offset, 1, (count, HORIZON, OBS)).astype(np.float32)
        actions = rng.uniform(-1, 1, (count, HORIZON, ACT)).astype(np.float32)
        return Segments(torch.from_numpy(obs), torch.from_numpy(actions))

    return Query(segments(), segments(), torch.zeros(count, 2, HORIZON))


def swapped(pairs: Query) -> Query:
    return Query(pairs.second, pairs.first, pairs.task_rewards.flip(1))


def asked(pairs: Query) -> Preferences:
    preferences = Preferences()
    if len(pairs):
        preferences.add(pairs, Answer(torch.ones(len(pairs)), torch.ones(len(pairs), dtype=torch.bool)), 0)
    return preferences


def reward(members: int = 3) -> RewardEnsemble:
    return RewardEnsemble(OBS, ACT, members, hidden=[16], seed=1)


def distance(a: Query, i: int, b: Query, j: int) -> float:
    """Squared distance of two pairs as points of observations, in the nearer of the two orders: float64."""
    x = [side.obs[i].double() for side in (a.first, a.second)]
    y = [side.obs[j].double() for side in (b.first, b.second)]
    same = (x[0] - y[0]).square().sum() + (x[1] - y[1]).square().sum()
    turned = (x[0] - y[1]).square().sum() + (x[1] - y[0]).square().sum()
    return float(min(same, turned))


def greedy(candidates: Query, known: Query, count: int) -> list[int]:
    """Farthest-first by brute force: every distance computed again for every pick."""
    picks: list[int] = []
    for _ in range(count):
        best, farthest = -1, -1.0
        for i in set(range(len(candidates))) - set(picks):
            centres = [(known, j) for j in range(len(known))] + [(candidates, j) for j in picks]
            nearest = min(distance(candidates, i, other, j) for other, j in centres)
            if nearest > farthest:
                best, farthest = i, nearest
        picks.append(best)
    return picks


RULES: dict[str, Any] = {
    "uniform": Uniform(),
    "disagreement": Score(score="disagreement"),
    "entropy": Score(score="entropy"),
    "k-center": KCenter(),
    "k-center-disagreement": KCenter(score="disagreement"),
    "k-center-entropy": KCenter(score="entropy"),
}


@pytest.mark.parametrize("known", [0, 7])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_picks_different_candidates_as_many_as_asked(name: str, known: int) -> None:
    candidates = query(30)
    picks = RULES[name](candidates, 5, reward(), asked(query(known, 1)), np.random.default_rng(0))
    assert picks.shape == (5,)
    assert len(set(picks.tolist())) == 5
    assert set(picks.tolist()) <= set(range(30))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_symmetric_under_swapping_the_pairs(name: str) -> None:
    candidates, known = query(40), query(6, 1)
    half = candidates[list(range(20))]
    mixed = Query.cat([swapped(half), candidates[list(range(20, 40))]])
    turned = Query.cat([known[[0, 1, 2]], swapped(known[[3, 4, 5]])])
    expected = RULES[name](candidates, 8, reward(), asked(known), np.random.default_rng(0))
    found = RULES[name](mixed, 8, reward(), asked(turned), np.random.default_rng(0))
    assert found.tolist() == expected.tolist()


def test_random_pairs_are_random_whatever_order_the_candidates_are_in() -> None:
    rng, ensemble = np.random.default_rng(0), reward()
    asked_about = np.bincount([i for _ in range(500) for i in Uniform()(query(50), 12, ensemble, asked(query(1)), rng)])
    assert (np.abs(asked_about - 120) < 50).all(), "5 standard deviations"
    assert Uniform()(query(50), 50, ensemble, asked(query(1)), rng).tolist() == list(range(50))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("known", [1, 9])
def test_k_center_equals_brute_force(known: int, offset: float) -> None:
    candidates, before = query(40, 2, offset), query(known, 3, offset)
    picks = k_center(pair_features(candidates.first, candidates.second), pair_features(before.first, before.second), 12)
    assert picks.tolist() == greedy(candidates, before, 12)


def test_k_center_without_history_starts_farthest_from_the_mean() -> None:
    candidates = query(30, 4)
    total, difference = pair_features(candidates.first, candidates.second)
    picks = k_center((total, difference), (total[:0], difference[:0]), 6)
    spread = ((total - total.mean(0)) ** 2).sum(1) + (difference**2).sum(1)
    assert picks[0] == spread.argmax()
    rest = [i for i in range(30) if i != picks[0]]
    later = greedy(candidates[rest], candidates[[int(picks[0])]], 5)
    assert picks[1:].tolist() == [rest[i] for i in later]


def test_k_center_takes_identical_candidates_only_once_each() -> None:
    one = query(1)
    same = Query.cat([one] * 5)
    features = pair_features(same.first, same.second)
    assert sorted(k_center(features, (features[0][:0], features[1][:0]), 5).tolist()) == [0, 1, 2, 3, 4]


def test_disagreement_and_entropy_by_their_definitions() -> None:
    candidates, ensemble = query(10), reward()
    with torch.no_grad():
        gap = [
            (ensemble.member(m, candidates.first.obs, candidates.first.actions).sum(1))
            - ensemble.member(m, candidates.second.obs, candidates.second.actions).sum(1)
            for m in range(3)
        ]
    p = torch.sigmoid(torch.stack(gap)).double().numpy()
    np.testing.assert_allclose(disagreement(candidates, ensemble), p.std(axis=0), rtol=1e-4, atol=1e-7)
    expected = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(axis=0)
    np.testing.assert_allclose(entropy(candidates, ensemble), expected, rtol=1e-4)


@pytest.mark.parametrize(("name", "score"), [("disagreement", disagreement), ("entropy", entropy)])
def test_score_rules_take_the_highest(name: str, score: object) -> None:
    candidates, ensemble = query(50), reward()
    values = score(candidates, ensemble)  # type: ignore[operator]
    picks = RULES[name](candidates, 5, ensemble, asked(query(0)), np.random.default_rng(0))
    assert picks.tolist() == np.argsort(-values.numpy(), kind="stable")[:5].tolist()


@pytest.mark.parametrize(("name", "score"), [("k-center-disagreement", disagreement), ("k-center-entropy", entropy)])
def test_k_center_with_a_score_covers_the_better_half(name: str, score: object) -> None:
    candidates, ensemble, before = query(20, 5), reward(), query(4, 6)
    half = np.argsort(-score(candidates, ensemble).numpy(), kind="stable")[:10]  # type: ignore[operator]
    picks = RULES[name](candidates, 4, ensemble, asked(before), np.random.default_rng(0))
    assert picks.tolist() == [half[i] for i in greedy(candidates[half], before, 4)]


def test_k_center_with_a_score_keeps_enough_candidates() -> None:
    candidates = query(6)
    picks = KCenter(score="entropy", pool=1)(candidates, 6, reward(), asked(query(0)), np.random.default_rng(0))
    assert sorted(picks.tolist()) == list(range(6)), "half would be three, but six are asked for"


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("known", [1, 9])
def test_novelty_equals_brute_force(known: int, offset: float) -> None:
    """A constant dimension (Meta-World's hidden goal) does not count, a unit is a deviation."""
    candidates, before = query(15, 2, offset), query(known, 3, offset)
    for pairs in (candidates, before):
        for side in (pairs.first, pairs.second):
            side.obs[..., 1], side.obs[..., 2] = 7.0, side.obs[..., 2] * 1e4

    def looked_at(pairs: Query, i: int) -> np.ndarray:
        return np.concatenate([side.obs[i, ::THIN].double().numpy() for side in (pairs.first, pairs.second)])

    asked_steps = [looked_at(before, i) for i in range(known)]
    deviation = np.concatenate([*(looked_at(candidates, i) for i in range(15)), *asked_steps]).std(axis=0)
    deviation[1] = np.inf
    picks: list[int] = []
    for _ in range(6):
        novelty = {
            i: max(min(np.linalg.norm((x - y) / deviation) for y in np.concatenate(asked_steps)) for x in steps)
            for i, steps in ((i, looked_at(candidates, i)) for i in range(15) if i not in picks)
        }
        picks.append(max(novelty, key=lambda i: novelty[i]))
        asked_steps.append(looked_at(candidates, picks[-1]))
    assert most_novel(candidates, asked(before), 6).tolist() == picks


def test_what_all_members_are_wrong_about_is_novel_and_not_disagreed_about() -> None:
    """One clip beyond everything asked: members of equal weights cannot disagree about it."""
    candidates, ensemble = query(30), reward(2)
    candidates.first.obs[17, 0] += 100.0
    ensemble.members[1].load_state_dict(ensemble.members[0].state_dict())
    assert disagreement(candidates, ensemble).max() < 1e-6
    assert most_novel(candidates, asked(query(8, 1)), 1).tolist() == [17]


def test_the_most_rewarded_pairs_have_two_good_clips() -> None:
    candidates, ensemble = query(30), reward()
    with torch.no_grad():
        mean = [
            torch.stack(
                [member(torch.cat([side.obs, side.actions], -1)).sum((1, 2)) for member in ensemble.members]
            ).mean(0)
            for side in (candidates.first, candidates.second)
        ]
    worse = torch.minimum(*mean)
    for count, expected in ((1, 6), (6, 6), (10, 10), (30, 30)):
        found = most_rewarded(candidates, ensemble, count)
        assert found.tolist() == sorted(range(30), key=lambda i: -float(worse[i]))[:expected], count
    assert most_rewarded(swapped(candidates), ensemble, 10).tolist() == found.tolist()[:10]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Uniform(pool=0), "query.pool=0"),
        (lambda: Uniform(recent_episodes=0), "query.recent_episodes=0"),
        (lambda: Uniform(branch_share=1.5), "query.branch_share=1.5"),
        (lambda: Uniform(novel_share=-0.1), "query.novel_share=-0.1"),
        (lambda: Uniform(best_share=1.1), "query.best_share=1.1"),
        (lambda: Uniform(against_kept=True), "query.against_kept=True; expected false, or a number"),
        (lambda: Score(score="novelty"), "query.score=novelty"),
        (lambda: KCenter(score="novelty"), "query.score=novelty"),
    ],
)
def test_wrong_options_are_refused(make: object, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        make()  # type: ignore[operator]
