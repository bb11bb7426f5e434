"""Meta-World v3 (Yu et al., CoRL 2020; McLean et al., 2025) in the protocol of B-Pref (Lee et al., 2021).

The object stands elsewhere after each reset, the goal is hidden (the last three observations are 0), an episode has
`horizon` control steps (the benchmark's: 500) and success does not end it. Meta-World's own `reset(seed=…)` is ignored
by it; here seeds work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.base import SimulatorEnv, State, unknown_name
from envs.physics import PhysicsState
from envs.rendering import Camera, import_mujoco

_FRAME = 18  # numbers in one of the observation's two stacked frames
# what rewards remember within an episode: bin-picking's first distance to the target; milestones of reward version 1
_MEMORY = ("_target_to_obj_init", "pickCompleted", "placeCompleted")


def _tasks() -> dict[str, type]:
    import_mujoco()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    return {name.removesuffix("-v3"): cls for name, cls in ALL_V3_ENVIRONMENTS.items()}


def task_names() -> list[str]:
    """The 50 task names, without `-v3`."""
    return sorted(_tasks())


class MetaWorld(SimulatorEnv):
    """One Meta-World task. Observation float32 [39 or 57], action [4]: hand displacement x, y, z and gripper effort.

    `info["success"]` is 1.0 at steps where the task is achieved; it may fall back to 0.0 later in the episode.

    Args:
        task: name without `-v3`, such as "door-open".
        horizon: control steps per episode; without it, the benchmark's.
        reward_version: "v2" (0 to 10 per control step, of which an environment step sums `action_repeat`) or "v1".
        seed: first seed; see SimulatorEnv.
        action_repeat: control steps for which an action is held; each makes one environment step.
        displacement: append how far the frame's 18 numbers (hand, gripper, objects) are from those that the episode
            began with. Objects begin elsewhere in each episode, and the goal is hidden: whether a button is pressed or
            stands a little further back, a single frame does not tell. The first frame is then true on all tasks;
            Meta-World's own is from before the object was placed on `window-open`, `window-close`, `drawer-open`,
            `dial-turn`, `faucet-open` and `lever-pull`.
    """

    def __init__(
        self,
        task: str,
        horizon: int = 500,
        reward_version: str = "v2",
        seed: int | None = None,
        action_repeat: int = 1,
        displacement: bool = False,
    ) -> None:
        tasks = _tasks()
        if task not in tasks:
            listing = "python -c 'import envs.metaworld as m; print(*m.task_names())'"
            raise unknown_name("Meta-World task", task, tasks, listing)
        if reward_version not in ("v1", "v2"):
            raise ValueError(f"reward_version is {reward_version!r}; expected 'v1' or 'v2'")
        self._env = env = tasks[task](reward_function_version=reward_version)
        env.max_path_length = horizon + action_repeat  # the last action may be held beyond `horizon`
        env.seeded_rand_vec, env._freeze_rand_vec, env._set_task_called = True, False, True
        self._physics = PhysicsState(env.model, env.data)
        self._camera = Camera(env.model, "corner2", upside_down=True)
        self.step_seconds = float(env.dt) * action_repeat
        size = self._physics.size + 2 * _FRAME + len(_MEMORY)
        self._displacement = displacement
        super().__init__((3 if displacement else 2) * _FRAME + 3, 4, horizon, size, seed, action_repeat)

    def _start(self, episode_seed: int) -> NDArray[Any]:
        env = self._env
        mujoco = import_mujoco()
        mujoco.mj_resetData(env.model, env.data)  # Meta-World's reset begins where the last episode ended
        env.np_random = np.random.default_rng(episode_seed)
        obs, _ = env.reset()
        if self._displacement:  # Meta-World looks before it knows where the object is, on some tasks
            mujoco.mj_kinematics(env.model, env.data)
            env._prev_obs = env._get_curr_obs_combined_no_goal()
            obs[: 2 * _FRAME] = np.tile(env._prev_obs, 2)
        self._previous_frame, self._first_frame = obs[_FRAME : 2 * _FRAME], obs[:_FRAME]
        return self._seen(obs)

    def _seen(self, obs: NDArray[Any]) -> NDArray[Any]:
        return np.append(obs, obs[:_FRAME] - self._first_frame) if self._displacement else obs

    def _advance(self, action: NDArray[np.float64]) -> tuple[NDArray[Any], float, bool, dict[str, Any]]:
        obs, reward, terminated, _, info = self._env.step(action)
        self._previous_frame = obs[_FRAME : 2 * _FRAME]
        info["success"] = float(info["success"])
        return self._seen(obs), reward, terminated, info

    def _save(self, out: State) -> None:
        split = self._physics.size
        self._physics.save(out[:split])
        out[split : split + _FRAME] = self._env._prev_obs
        out[split + _FRAME : split + 2 * _FRAME] = self._previous_frame
        memory = [getattr(self._env, name, None) for name in _MEMORY]
        out[split + 2 * _FRAME :] = [-1.0 if value is None else value for value in memory]

    def _load(self, saved: State) -> NDArray[Any]:
        env, split = self._env, self._physics.size
        self._physics.load(saved[:split])
        env.curr_path_length = self._elapsed * self.action_repeat
        env._prev_obs = saved[split : split + _FRAME]
        self._previous_frame = saved[split + _FRAME : split + 2 * _FRAME]
        for name, value in zip(_MEMORY, saved[split + 2 * _FRAME :], strict=True):
            setattr(env, name, None if value < 0 else float(value))
        obs = np.concatenate([env._prev_obs, self._previous_frame, np.zeros(3)])
        space = env.sawyer_observation_space
        return self._seen(np.clip(obs, space.low, space.high))  # as Meta-World does

    def render(self, width: int = 256, height: int = 256) -> NDArray[np.uint8]:
        """The scene from the front right, uint8 [height, width, 3]; its model's cameras are upside down."""
        return self._camera.render(self._env.data, width, height)

    def close(self) -> None:
        """Free the renderer."""
        self._camera.close()
