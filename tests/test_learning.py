"""Every method solves the point mass: judged by a permutation test over episodes, not by a hand-picked threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from envs.pointmass import PointMass, optimal_action
from pbrl.episodes import play
from pbrl.records.evaluation import episode
from tests.conftest import finish, tiny_loop

EPISODES = 20
LEVEL = 0.001  # probability of a false alarm of each comparison

# Enough to learn in 1500 environment steps; small enough for seconds.
SMALL = (
    "total_steps=1500",
    "segment_length=10",
    "agent.learning_starts=100",
    "agent.net_arch=[64,64]",
    "agent.batch_size=64",
    "agent.learning_rate=2e-3",
    "agent.temperature_lr=1e-3",
    "reward.hidden=[64,64]",
    "pretraining.steps=200",
    "pretraining.updates=50",
    "feedback.budget=200",
    "feedback.per_session=40",
    "feedback.every=150",
    "eval.every=1500",
    "checkpoint_every=1500",
)
METHODS = {
    "pebble": ("updater=pebble",),
    "aparl": ("updater=aparl", "feedback.fresh_steps=100"),
    "penalty": ("updater=penalty", "feedback.fresh_steps=100", "updater.walk.rollout_steps=50"),
    "surf": (
        "updater=surf",
        "updater.fit.steps_per_label=0.5",
        "updater.unlabelled_per_label=4",
        "updater.unlabelled_ratio=1",
        "updater.fit.crop=[0.8,1.2]",
    ),
    "mrn": ("updater=mrn", "updater.meta_every=50"),
    # its denoising is judged here: its own pretraining and warm start need more steps than these
    "rime": (
        "updater=rime",
        "updater.warm_updates=200",
        "reward.learning_rate=1e-3",
        "teacher=mistake",
        "pretraining.bounded=false",
        "pretraining.reset_critic=true",
    ),
    # after 1500 steps about half of six seeds are clearly above halfway, however the pairs are batched
    "qpa": (
        "updater=pebble",
        "query=near-policy",
        "agent.hybrid_ratio=0.5",
        "agent.hybrid_steps=500",
        "total_steps=2500",
    ),
    # after 1500 steps four of six seeds are clearly above halfway, after 2500 all six
    "rune": (
        "updater=pebble",
        "reward.disagreement_bonus=0.05",
        "reward.disagreement_decay=1e-3",
        "total_steps=2500",
    ),
    "reed": ("updater=pebble", "reward=reed", "reward.hidden=[64,64]", "reward.embedding=64", "reward.max_updates=200"),
    "k-center": ("updater=pebble", "query=k-center"),
    "oracle": ("updater=oracle", "agent.learning_starts=100"),
}


def p_value(better: np.ndarray, worse: np.ndarray, rng: np.random.Generator, permutations: int = 20_000) -> float:
    """One-sided permutation test of the paired differences of means: episode i of both starts at the same place.

    Under the null hypothesis the sign of each difference is arbitrary.
    """
    differences = better - worse
    signs = rng.choice([-1.0, 1.0], size=(permutations, len(differences)))
    return float((1 + np.sum((signs * differences).mean(axis=1) >= differences.mean())) / (1 + permutations))


def random_returns(seeds: range) -> np.ndarray:
    """Returns of uniformly random actions from the starts that these seeds give."""
    rng, env, found = np.random.default_rng(0), PointMass(), []
    for seed in seeds:
        found.append(play(env, lambda obs: rng.uniform(-1, 1, 2).astype(np.float32), seed).task_return)
    return np.array(found)


def optimal_returns(seeds: range) -> np.ndarray:
    """Returns of the optimal policy from the same starts."""
    env = PointMass()
    return np.array([play(env, optimal_action, seed).task_return for seed in seeds])


def test_the_permutation_test_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    values = [p_value(*rng.normal(size=(2, 20)), rng, 500) for _ in range(300)]
    assert 0.3 < np.mean(np.array(values) < 0.5) < 0.7
    assert np.mean(np.array(values) < 0.05) < 0.1
    assert p_value(np.arange(20.0) + 3, np.arange(20.0), rng) < LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_method_solves_the_point_mass(tmp_path: Path, name: str) -> None:
    """Better than random, and better than halfway from random to optimal, both at the level above."""
    loop = tiny_loop(tmp_path / "run", *SMALL, *METHODS[name])
    finish(loop)
    seeds = range(10_000, 10_000 + EPISODES)
    learned = np.array([episode(loop.agent, PointMass(), seed)[0] for seed in seeds])
    chance, best = random_returns(seeds), optimal_returns(seeds)
    rng = np.random.default_rng(1)
    assert p_value(learned, chance, rng) < LEVEL, f"{learned.mean():.1f} against {chance.mean():.1f} by chance"
    halfway = (chance.mean() + best) / 2
    assert p_value(learned, halfway, rng) < LEVEL, f"{learned.mean():.1f}, optimal {best.mean():.1f}"
