"""Any registered gymnasium environment with a flat Box observation and bounded Box actions."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control import Continuous_MountainCarEnv, PendulumEnv
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box
from numpy.typing import NDArray
from PIL import Image

from envs.base import SimulatorEnv, State, unknown_name
from envs.physics import PhysicsState
from envs.rendering import Camera, import_mujoco


class GymEnv(SimulatorEnv):
    """A registered environment; actions are rescaled to [-1, 1].

    States can be stored for gymnasium's own MuJoCo environments, Pendulum and MountainCarContinuous. What others keep
    between steps is not known here, so their `state_size` is 0.

    Args:
        id: such as "Pendulum-v1"; with a module that registers it when it is imported, "my_env:MyEnv-v0".
        horizon: environment steps per episode; None: as registered.
        seed: first seed; see SimulatorEnv.
    """

    def __init__(self, id: str, horizon: int | None = None, seed: int | None = None) -> None:
        module, _, name = id.rpartition(":")
        if module:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(f"id={id}: {error}; expected a module in this folder or installed") from error
        spec = gymnasium.registry.get(name)
        if spec is None:
            listing = "python -c 'import gymnasium; gymnasium.pprint_registry()'"
            raise unknown_name("gymnasium id", name, gymnasium.registry, listing)
        horizon = spec.max_episode_steps if horizon is None else horizon
        if horizon is None:
            raise ValueError(f"id={id} is registered without a time limit; give one, such as env.horizon=1000")
        mujoco_based = str(spec.entry_point).startswith("gymnasium.envs.mujoco")
        if mujoco_based:
            import_mujoco()
        # -1: without gymnasium's TimeLimit, since SimulatorEnv counts the steps
        try:
            self._env = gymnasium.make(name, max_episode_steps=-1, disable_env_checker=True, **_drawing(spec))
        except gymnasium.error.Error as error:  # a simulator that is not installed, say
            raise ValueError(f"id={id}: {error}") from error
        obs, actions = self._env.observation_space, self._env.action_space
        if not isinstance(obs, Box) or len(obs.shape) != 1:
            what = "images" if isinstance(obs, Box) and len(obs.shape) == 3 else str(obs)
            raise ValueError(f"id={id}: it observes {what}; expected a Box with one axis")
        if not isinstance(actions, Box) or len(actions.shape) != 1 or not actions.is_bounded():
            raise ValueError(f"id={id}: it acts in {actions}; expected continuous actions: a bounded Box with one axis")
        self._low, self._scale = actions.low.astype(np.float64), (actions.high - actions.low) / 2.0
        self._action_dtype = actions.dtype
        inner: Any = self._env.unwrapped
        self._inner = inner
        self.step_seconds = getattr(inner, "dt", None)
        self._memory: PhysicsState | _ClassicState | None = None
        self._camera: Camera | None = None
        if mujoco_based:
            # rewards of ant and humanoid read the bodies' places before a step, where mj_step left them: a substep ago
            self._memory = PhysicsState(inner.model, inner.data, derived=("xpos", "xipos"))
            self._camera = Camera(inner.model, 0 if inner.model.ncam else -1)
        elif isinstance(inner, PendulumEnv | Continuous_MountainCarEnv):
            self._memory = _ClassicState(inner)
        size = None if self._memory is None else self._memory.size + obs.shape[0]
        super().__init__(obs.shape[0], actions.shape[0], horizon, size, seed)

    def _start(self, episode_seed: int) -> NDArray[Any]:
        self._obs, _ = self._env.reset(seed=episode_seed)
        return self._obs

    def _advance(self, action: NDArray[np.float64]) -> tuple[NDArray[Any], float, bool, dict[str, Any]]:
        scaled = (self._low + (action + 1.0) * self._scale).astype(self._action_dtype)
        self._obs, reward, terminated, truncated, info = self._env.step(scaled)
        self._cut = bool(truncated)
        return self._obs, float(reward), bool(terminated), info

    def _save(self, out: State) -> None:
        assert self._memory is not None  # state_size is 0 otherwise
        split = self._memory.size
        self._memory.save(out[:split])
        out[split:] = self._obs

    def _load(self, saved: State) -> NDArray[Any]:
        assert self._memory is not None  # state_size is 0 otherwise
        split = self._memory.size
        self._memory.load(saved[:split])
        self._obs = saved[split:]
        return self._obs

    def render(self, width: int = 256, height: int = 256) -> NDArray[np.uint8]:
        """The environment's own picture, or its MuJoCo model's first camera, uint8 [height, width, 3]."""
        if self._camera is not None:
            return self._camera.render(self._inner.data, width, height)
        return np.asarray(Image.fromarray(np.asarray(self._env.render())).resize((width, height)))

    def close(self) -> None:
        """Free the renderer and the environment."""
        if self._camera is not None:
            self._camera.close()
        self._env.close()


def _drawing(spec: Any) -> dict[str, str]:
    """The render mode, unless it is an environment of one's own that names none: its constructor may take no such."""
    made_by = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    modes = getattr(made_by, "metadata", {}).get("render_modes", ())
    own = not str(spec.entry_point).startswith("gymnasium.")
    return {} if own and "rgb_array" not in modes else {"render_mode": "rgb_array"}


class _ClassicState:
    """The two numbers that Pendulum and MountainCarContinuous keep, and the precision they keep them in."""

    size = 3

    def __init__(self, env: Any) -> None:
        self._env = env

    def save(self, out: State) -> None:
        out[:2] = self._env.state
        out[2] = self._env.state.itemsize  # MountainCarContinuous begins in float64 and goes on in float32

    def load(self, saved: State) -> None:
        self._env.state = saved[:2].astype(np.float32 if saved[2] == 4 else np.float64)
