"""A finished run's learned reward as an environment: any algorithm of Stable-Baselines3 trains on it.

from pbrl import LearnedReward
env = LearnedReward(gym.make("…"), "runs/…")
PPO("MlpPolicy", env).learn(100_000)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from hydra.utils import instantiate

from pbrl.launch.configuration import ConfigError, check_arguments
from pbrl.launch.stored import read_config
from pbrl.records.checkpoint import load_latest
from pbrl.reward import RewardEnsemble


class LearnedReward(gym.Wrapper):
    """Pays each step with the learned reward of a run, as the run paid its agent at its last checkpoint.

    `info["task_reward"]` holds what the environment itself would have paid. Observations, ends of episodes and all else
    are the environment's own.

    Args:
        env: of the run's task: observations float32 [obs_dim], actions [act_dim] within bounds; the reward sees them
            rescaled to [−1, 1], as the run's agent acts.
        run: the folder of a run whose reward was learned.
        trust: modules of your own that the run's config may name.

    Raises:
        ConfigError: if there is no run, it has learned no reward yet, or `env` is of other sizes or has no bounds.
        CheckpointError: if no checkpoint can be used.
    """

    def __init__(self, env: gym.Env, run: str | Path, trust: Sequence[str] = ()) -> None:
        super().__init__(env)
        self.reward, self.step_of_run = load_reward(Path(run), env, trust)
        space = env.action_space
        if not isinstance(space, gym.spaces.Box) or not space.is_bounded():
            raise ConfigError(f"{run}: its reward is of actions within bounds; the environment acts in {space}")
        self.low, self.half = space.low.astype(np.float64), (space.high.astype(np.float64) - space.low) / 2.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.obs, info = self.env.reset(seed=seed, options=options)
        return self.obs, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        before = np.asarray(self.obs, np.float32)[None]
        scaled = ((np.asarray(action) - self.low) / self.half - 1.0).astype(np.float32)
        members = self.reward.predict(before, scaled[None])
        self.obs, task_reward, terminated, truncated, info = self.env.step(action)
        pay = float(self.reward.pay(members, self.step_of_run)[0])
        return self.obs, pay, terminated, truncated, info | {"task_reward": float(task_reward)}


def load_reward(run: Path, env: gym.Env, trust: Sequence[str] = ()) -> tuple[RewardEnsemble, int]:
    """The learned reward of a run's newest usable checkpoint, and that checkpoint's environment step.

    Raises:
        ConfigError, CheckpointError: as `LearnedReward`.
    """
    cfg, choices = read_config(run, trust, ("reward",))
    if choices.get("updater") == "oracle":
        raise ConfigError(f"{run}: its agent was paid the task's own reward (updater=oracle); there is none learned")
    check_arguments("reward", cfg.reward)
    loaded = load_latest(run)
    if not loaded.run["pretrained"]:
        raise ConfigError(
            f"{run}: at step {loaded.run['step']} no answer was learned from yet; let it go on: resume={run}"
        )
    sizes = [space.shape[0] if space.shape else 0 for space in (env.observation_space, env.action_space)]
    reward = instantiate(cfg.reward, obs_dim=sizes[0], act_dim=sizes[1], seed=0, _convert_="all")
    try:
        if len(loaded.state["agent"]["policy"]["actor.mu.weight"]) != sizes[1]:
            raise RuntimeError("other actions")
        reward.load_state(loaded.state["reward"])
    except RuntimeError as error:
        raise ConfigError(
            f"{run}: its reward does not fit an environment with {sizes[0]} observations and {sizes[1]} actions; "
            "use one of the run's task"
        ) from error
    return reward, int(loaded.run["step"])
