"""DeepMind control suite (Tassa et al., 2018; Tunyasuvunakool et al., 2020).

Observations are concatenated in the suite's own order, as dmc2gym and B-Pref do (shimmy sorts them by name).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.base import SimulatorEnv, State, unknown_name
from envs.physics import PhysicsState
from envs.rendering import Camera, import_mujoco


def _suite() -> Any:
    import_mujoco()
    # dm_control opens an OpenGL backend of its own at import, and fails without one; pictures come from envs.rendering
    backend = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        from dm_control import suite
    finally:
        os.environ.pop("MUJOCO_GL")
        if backend is not None:
            os.environ["MUJOCO_GL"] = backend
    return suite


def task_names() -> list[str]:
    """All tasks of the suite as `domain-task`, such as "walker-walk"."""
    return sorted(f"{domain}-{task}" for domain, task in _suite().ALL_TASKS)


class DMControl(SimulatorEnv):
    """One task of the suite.

    `terminated` is true only where the task itself ends (discount 0), which hardly any does.

    Args:
        domain, task: such as "walker" and "walk".
        horizon: control steps per episode; 1000 is what the suite's own time limits amount to.
        action_repeat: control steps for which an action is held; each makes one environment step.
        camera: name or number of the model's camera that pictures are taken from.
        seed: first seed; see SimulatorEnv.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        horizon: int = 1000,
        camera: str | int = 0,
        seed: int | None = None,
        action_repeat: int = 1,
    ) -> None:
        suite = _suite()
        if (domain, task) not in suite.ALL_TASKS:
            listing = "python -c 'import envs.dm_control as d; print(*d.task_names())'"
            raise unknown_name("dm_control task", f"{domain}-{task}", task_names(), listing)
        # random=0 fixes what lqr draws for its model; episodes are seeded in _start
        self._env = env = suite.load(domain, task, task_kwargs={"time_limit": float("inf"), "random": 0})
        # quadruped-escape would open dm_control's own renderer at each reset
        env.physics.__class__ = type("Physics", (type(env.physics),), {"contexts": None})
        model, data = env.physics.model.ptr, env.physics.data.ptr
        self._physics = PhysicsState(model, data)
        self._camera = Camera(model, camera)
        spec = env.action_spec()
        self._low, self._scale = spec.minimum, (spec.maximum - spec.minimum) / 2
        obs_dim = _flat(env.reset().observation).size
        self.step_seconds = float(env.control_timestep()) * action_repeat
        super().__init__(obs_dim, spec.shape[0], horizon, self._physics.size, seed, action_repeat)

    def _start(self, episode_seed: int) -> NDArray[Any]:
        if self._env.physics.model.nhfield:
            self._camera.close()  # quadruped-escape draws a new terrain, of which a renderer keeps a copy
        self._env.task._random = np.random.RandomState(episode_seed)
        return _flat(self._env.reset().observation)

    def _advance(self, action: NDArray[np.float64]) -> tuple[NDArray[Any], float, bool, dict[str, Any]]:
        step = self._env.step(self._low + (action + 1.0) * self._scale)
        return _flat(step.observation), step.reward, step.last() and step.discount == 0.0, {}

    def _save(self, out: State) -> None:
        self._physics.save(out)

    def _load(self, saved: State) -> NDArray[Any]:
        self._physics.load(saved)
        self._env._reset_next_step = False
        return _flat(self._env.task.get_observation(self._env.physics))

    def render(self, width: int = 256, height: int = 256) -> NDArray[np.uint8]:
        """The scene from `camera`, uint8 [height, width, 3]."""
        return self._camera.render(self._env.physics.data.ptr, width, height)

    def close(self) -> None:
        """Free the renderer."""
        self._camera.close()


def _flat(observation: dict[str, Any]) -> NDArray[Any]:
    return np.concatenate([np.ravel(part) for part in observation.values()])
