"""Playing one episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Episode:
    """T steps, from the reset to the end."""

    obs: np.ndarray  # [T, obs_dim]: what was seen before each action
    actions: np.ndarray  # [T, act_dim], in the environment's units
    rewards: list[float]  # the task's, T of them
    success: bool | None  # whether any step was one; None where the task does not define it

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def task_return(self) -> float:
        """Undiscounted sum of the task's rewards."""
        return sum(self.rewards)


def play(
    env: Any, policy: Callable[[np.ndarray], np.ndarray], seed: int, before: Callable[[], object] = lambda: None
) -> Episode:
    """One episode.

    Args:
        policy: an action for an observation.
        seed: of the reset.
        before: called before each action, while the simulator stands there (to draw it, say).
    """
    obs, _ = env.reset(seed=seed)
    seen, actions, rewards = [], [], []
    success, done = None, False
    while not done:
        before()
        action = policy(obs)
        seen.append(obs)
        actions.append(action)
        obs, reward, terminated, truncated, info = env.step(action)
        rewards.append(float(reward))
        if "success" in info:
            success = bool(success) or float(info["success"]) > 0
        done = terminated or truncated
    return Episode(np.array(seen), np.array(actions), rewards, success)
