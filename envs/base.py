"""What all environments share: seeds, the time limit, and states that can be stored and restored.

An episode is determined by one integer, its *episode seed*, drawn from `np_random` at each `reset()`. The simulator
gets its layout (where the door stands, which way is the goal) from that integer alone, so a state needs to hold only
the episode seed, the elapsed steps and the moving parts: any instance can rebuild the rest.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from numpy.typing import NDArray

Obs = NDArray[np.float32]
State = NDArray[np.float64]

_HEADER = 2  # episode seed, elapsed steps


def unknown_name(kind: str, name: str, known: Iterable[str], listing: str) -> ValueError:
    """The error for a misspelt `name`: names it, the closest known ones, and the command that lists all."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ValueError(f"unknown {kind} {name!r}; {hint}List all: {listing}")


class SimulatorEnv(gym.Env, ABC):
    """An environment with float32 observations, actions in [-1, 1] and restorable states.

    A subclass holds a simulator and implements `_start`, `_advance`, `_save`, `_load` and `render`.

    Args:
        obs_dim, act_dim: sizes of observation and action.
        horizon: control steps after which an episode is truncated.
        simulator_size: numbers written by `_save`; None if the simulator's state cannot be stored.
        seed: first seed of `np_random`, as if given to the first `reset`; None: from the operating system.
        action_repeat: control steps for which each action is held: one environment step. Their rewards are added up,
            an info's number is the largest.

    Attributes:
        horizon: environment steps per episode: the constructor's, over `action_repeat`, rounded up.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium declares it so)
    render_mode = "rgb_array"
    step_seconds: float | None = None  # that one environment step takes in the simulated world; None: it has no clock

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        horizon: int,
        simulator_size: int | None,
        seed: int | None,
        action_repeat: int = 1,
    ) -> None:
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; expected at least 1 environment step")
        if action_repeat < 1:
            raise ValueError(f"action_repeat is {action_repeat}; expected at least 1 control step")
        self.observation_space = Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = Box(-1.0, 1.0, (act_dim,), np.float32)
        self.action_repeat = action_repeat
        self.horizon = -(-horizon // action_repeat)
        self.state_size = 0 if simulator_size is None else _HEADER + simulator_size  # float64 numbers in a state
        self._episode_seed = -1  # none yet
        self._elapsed = 0
        self._over = True
        self._cut = False  # by the environment itself, before the horizon
        if seed is not None:
            super().reset(seed=seed)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        """Begin an episode. The same `seed` gives the same episodes, this one and those after it."""
        super().reset(seed=seed)
        self._episode_seed = int(self.np_random.integers(2**32))
        self._elapsed, self._over, self._cut = 0, False, False
        return self._start(self._episode_seed).astype(np.float32), {}

    def step(self, action: NDArray[Any]) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        """One environment step. `terminated`: the task ended; `truncated`: `horizon` steps are over, or it was cut."""
        if self._over:
            raise ResetNeeded("the episode is over or was never begun; call reset() first")
        control = np.asarray(action, dtype=np.float64)
        obs, reward, terminated, info = self._advance(control)
        for _ in range(self.action_repeat - 1):
            if terminated or self._cut:
                break
            obs, more, terminated, later = self._advance(control)
            reward = reward + more
            info = {key: max(value, info.get(key, value)) for key, value in later.items()}
        self._elapsed += 1
        truncated = self._elapsed >= self.horizon or self._cut
        self._over = terminated or truncated
        return obs.astype(np.float32), float(reward), terminated, truncated, info

    def get_state(self) -> State:
        """All that decides what follows until the next reset, float64 [state_size]; empty if not supported.

        `np_random` is not in it: who needs the episodes after this one stores `env.np_random.bit_generator.state`.
        """
        state = np.empty(self.state_size)
        if self.state_size:
            if self._episode_seed < 0:
                raise ResetNeeded("there is no state before the first reset()")
            state[0], state[1] = self._episode_seed, self._elapsed
            self._save(state[_HEADER:])
        return state

    def set_state(self, state: State) -> Obs:
        """Continue from a state of this or another instance of the same environment; `np_random` stays as it is.

        Returns:
            The observation of that moment, float32 [obs_dim]. Steps from here give bit for bit what the original gave.

        Raises:
            NotImplementedError: if this environment's states cannot be stored.
            ValueError: if `state` has another shape than [state_size].
        """
        if not self.state_size:
            raise NotImplementedError(f"{self} cannot store or restore simulator states (state_size is 0)")
        if np.shape(state) != (self.state_size,):
            raise ValueError(
                f"state has shape {list(np.shape(state))}; expected [{self.state_size}], as from get_state"
            )
        episode_seed, self._elapsed = int(state[0]), int(state[1])
        if episode_seed != self._episode_seed:
            self._episode_seed = episode_seed
            self._start(episode_seed)
        self._over, self._cut = self._elapsed >= self.horizon, False
        return self._load(np.array(state[_HEADER:], dtype=np.float64)).astype(np.float32)

    @abstractmethod
    def _start(self, episode_seed: int) -> NDArray[Any]:
        """Lay out the episode of this seed, whatever came before; return its first observation [obs_dim]."""

    @abstractmethod
    def _advance(self, action: NDArray[np.float64]) -> tuple[NDArray[Any], float, bool, dict[str, Any]]:
        """Simulate one step; return observation [obs_dim], reward, terminated, info; `_cut` tells an early end."""

    @abstractmethod
    def _save(self, out: State) -> None:
        """Write the simulator's moving parts into `out`, float64 [simulator_size]."""

    @abstractmethod
    def _load(self, saved: State) -> NDArray[Any]:
        """Undo `_save` within the same episode seed; return the observation [obs_dim]."""

    @abstractmethod
    def render(self, width: int = 256, height: int = 256) -> NDArray[np.uint8]:
        """A picture of the present state, uint8 [height, width, 3]. Never changes the simulation."""
