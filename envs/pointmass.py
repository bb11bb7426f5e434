"""A point on a table that should go to a goal: a continuous task with a known optimum, for tests and demonstrations.

    p_0 ~ U([-1, 1]²)    p_{t+1} = clip(p_t + 0.1 a_t, -1, 1)    r_t = 1 − ‖p_{t+1} − goal‖ / d_max

with a_t in [-1, 1]² and d_max = 1.5 √2, the largest distance there is, so that 0 ≤ r ≤ 1. The observation is p; the
goal is fixed and must be learned. Going straight towards it on each axis as fast as allowed is optimal at every step,
since each axis's distance shrinks as fast as it can. Returns over 50 steps from a random start: optimal policy 47.7 on
average (standard deviation 1.7), uniformly random policy 25.8 (10.5); 300 episodes each.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.base import Obs, SimulatorEnv, State

GOAL = (0.5, 0.5)
SPEED = 0.1  # length per environment step at full action
RADIUS = 0.1  # success: nearer to the goal than this
_FARTHEST = 1.5 * math.sqrt(2.0)


def optimal_action(obs: Obs) -> Obs:
    """The best action at `obs`, float32 [..., 2] each."""
    return np.clip((np.array(GOAL) - obs) / SPEED, -1.0, 1.0).astype(np.float32)


def optimal_return(obs: Obs, steps: int) -> float:
    """The largest possible sum of rewards over the next `steps` from the position `obs`, float32 [2]."""
    moved = SPEED * np.arange(1, steps + 1)[:, None]
    left = np.maximum(np.abs(np.array(GOAL) - obs) - moved, 0.0)
    return float(np.sum(1.0 - np.linalg.norm(left, axis=1) / _FARTHEST))


class PointMass(SimulatorEnv):
    """See the module's text. `info["success"]` is 1.0 within RADIUS of the goal, else 0.0.

    Args:
        horizon: environment steps per episode.
        seed: first seed; see SimulatorEnv.
    """

    def __init__(self, horizon: int = 50, seed: int | None = None) -> None:
        super().__init__(2, 2, horizon, 2, seed)
        self.step_seconds = 0.1  # so that it can be watched

    def _start(self, episode_seed: int) -> NDArray[Any]:
        self._x, self._y = np.random.default_rng(episode_seed).uniform(-1.0, 1.0, 2).tolist()
        return np.array((self._x, self._y))

    def _advance(self, action: NDArray[np.float64]) -> tuple[NDArray[Any], float, bool, dict[str, Any]]:
        x, y = action.tolist()
        self._x = min(max(self._x + SPEED * x, -1.0), 1.0)
        self._y = min(max(self._y + SPEED * y, -1.0), 1.0)
        distance = math.hypot(self._x - GOAL[0], self._y - GOAL[1])
        info = {"success": float(distance < RADIUS)}
        return np.array((self._x, self._y)), 1.0 - distance / _FARTHEST, False, info

    def _save(self, out: State) -> None:
        out[0], out[1] = self._x, self._y

    def _load(self, saved: State) -> NDArray[Any]:
        self._x, self._y = saved.tolist()
        return saved

    def render(self, width: int = 256, height: int = 256) -> NDArray[np.uint8]:
        """The table from above, uint8 [height, width, 3]: the goal green, the point blue."""
        frame = np.full((height, width, 3), 245, dtype=np.uint8)
        y, x = np.meshgrid(np.linspace(1.1, -1.1, height), np.linspace(-1.1, 1.1, width), indexing="ij")
        frame[np.maximum(np.abs(x), np.abs(y)) > 1.0] = 200
        frame[np.hypot(x - GOAL[0], y - GOAL[1]) < RADIUS] = (90, 180, 90)
        frame[np.hypot(x - self._x, y - self._y) < 0.06] = (40, 80, 200)
        return frame
