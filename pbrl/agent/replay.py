"""SB3's replay buffer, with rewards that can be relabelled in place and each transition packed into one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

from pbrl.types import Moments

# obs [N, ·], actions [N, ·] -> float32 [N]; to a replay that keeps deviations: float32 [2, N], reward and deviation
RewardFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
BLOCK = 65_536  # rows relabelled at a time


class Batch(NamedTuple):
    """Transitions as tensors, float32 [B, ·] each; `not_done` is 0 only at true terminations, never at time limits."""

    obs: Tensor
    actions: Tensor
    next_obs: Tensor
    rewards: Tensor  # [B]
    not_done: Tensor  # [B]


class RelabelReplay(ReplayBuffer):
    """A `ReplayBuffer` of one environment whose fields are views into one packed float32 array.

    A batch is one gather instead of five. Memory: 4·(2·obs_dim + act_dim + 3) bytes a transition.

    Args:
        hybrid_ratio: share of each batch drawn from the last `hybrid_steps` transitions (QPA's hybrid replay); 0: off.
            Not while `hybrid` is False: the loop sets it so when no question is left, as QPA does.
        hybrid_steps: environment steps that count as recent.
        n_steps, gamma: rewards summed before the critic is asked, and the discount between them (see `draw`).

    Where pay moves from update to update, `keep_deviations` gives each transition a second number: it is then paid
    its reward plus `weight` times its deviation, by the weight at the moment of the draw.

    Raises:
        ValueError: for more than one environment, or observations that are not float32 vectors.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        hybrid_ratio: float = 0.0,
        hybrid_steps: int = 10_000,
        n_steps: int = 1,
        gamma: float = 0.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device, n_envs, **kwargs)
        if n_envs != 1:
            raise ValueError(f"the replay holds one environment's steps; got n_envs={n_envs}. Run seeds as processes")
        if self.observations.ndim != 3 or self.observations.dtype != np.float32:
            raise ValueError(f"observations must be float32 vectors; the space is {observation_space}")
        self.hybrid_ratio, self.hybrid_steps, self.hybrid = hybrid_ratio, hybrid_steps, True
        self.n_steps, self.gamma = n_steps, gamma
        self.deviations: np.ndarray | None = None  # float32 [buffer_size, 1]
        self.weight = 0.0
        obs_dim, act_dim = self.obs_shape[0], self.action_dim
        ends = np.cumsum([obs_dim, act_dim, obs_dim, 1, 1, 1])
        self.rows = np.zeros((self.buffer_size, int(ends[-1])), np.float32)
        obs, action, next_obs, self._reward, self._done, self._timeout = (
            slice(int(end - size), int(end))
            for end, size in zip(ends, [obs_dim, act_dim, obs_dim, 1, 1, 1], strict=True)
        )
        self.observations = self.rows[:, None, obs]
        self.actions = self.rows[:, None, action]
        self.next_observations = self.rows[:, None, next_obs]
        self.rewards = self.rows[:, self._reward]
        self.dones = self.rows[:, self._done]
        self.timeouts = self.rows[:, self._timeout]
        self._end = np.r_[next_obs, self._done, self._timeout]  # what a longer reach takes from its last step
        self._split = [obs_dim, act_dim, obs_dim, 1, 1, 1]

    def keep_deviations(self) -> None:
        """From now on each transition has a deviation, which `weight` weighs when it is drawn."""
        self.deviations = np.zeros_like(self.rewards)

    def paid(self, index: np.ndarray) -> np.ndarray:
        """What these transitions are paid now: float32 [N, 1]."""
        rewards = self.rewards[index]
        return rewards if self.deviations is None else rewards + np.float32(self.weight) * self.deviations[index]

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> ReplayBufferSamples:
        samples = super()._get_samples(batch_inds, env)
        return samples if self.deviations is None else samples._replace(rewards=self.to_torch(self.paid(batch_inds)))

    def _take(self, index: np.ndarray) -> np.ndarray:
        """Copies of these packed rows, with what they are paid now."""
        rows = self.rows.take(index, axis=0)
        if self.deviations is not None:
            rows[:, self._reward] = self.paid(index)
        return rows

    def draw(self, batch_size: int, rng: np.random.Generator, n_steps: int = 1) -> Batch:
        """`batch_size` uniformly drawn transitions (a share of them recent ones, if `hybrid_ratio` says so).

        With `n_steps` > 1 each reaches over up to that many steps, fewer where the episode ends: `rewards` is their
        discounted sum Σ_{i<k} γ^i r_i, `next_obs` the one after the k-th, `not_done` times γ^(k − 1), so that γ times
        it discounts the value after k steps.
        """
        size = self.size()
        index = rng.integers(size, size=batch_size)
        recent = round(self.hybrid_ratio * batch_size) if self.hybrid else 0
        if recent:
            back = rng.integers(min(size, self.hybrid_steps), size=recent)
            index[:recent] = (self.pos - 1 - back) % self.buffer_size
        if n_steps == 1:
            return self.batch(self._take(index))
        rows = self._take(index)
        last, further = self._reach(index, rows, n_steps)
        rows[:, self._end] = self.rows[last][:, self._end]
        batch = self.batch(rows)
        discounts = torch.from_numpy((self.gamma**further).astype(np.float32)).to(batch.not_done.device)
        return batch._replace(not_done=batch.not_done * discounts)

    def _reach(self, index: np.ndarray, rows: np.ndarray, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Add up to n_steps − 1 following rewards to those in `rows`: the last step and how many were added, int [B].

        The next row continues an episode if it begins where this one ended: after a branch from a stored state it does
        not.
        """
        obs, next_obs = self.observations[:, 0], self.next_observations[:, 0]
        further = np.zeros(len(index), np.int64)
        goes_on = np.ones(len(index), bool)
        for i in range(1, n_steps):
            following = (index + 1) % self.buffer_size
            goes_on &= (self.dones[index, 0] == 0) & (following != self.pos)
            goes_on &= (obs[following] == next_obs[index]).all(axis=1)
            rows[goes_on, self._reward] += np.float32(self.gamma**i) * self.paid(following[goes_on])
            index = np.where(goes_on, following, index)
            further += goes_on
        return index, further

    def batch(self, packed: np.ndarray) -> Batch:
        """Packed rows, float32 [B, ·], as a `Batch` on the buffer's device."""
        rows = torch.from_numpy(packed).to(self.device, non_blocking=True)
        obs, actions, next_obs, rewards, done, timeout = rows.split(self._split, dim=1)
        return Batch(obs, actions, next_obs, rewards.squeeze(1), (1 - done * (1 - timeout)).squeeze(1))

    def moments(self) -> tuple[Moments, Moments]:
        """Mean and standard deviation of all stored observations, and of all actions: float64 [·] each."""
        size, (obs_dim, act_dim, *_) = self.size(), self._split
        running = RunningMeanStd(1e-8, (obs_dim + act_dim,))
        for start in range(0, size, BLOCK):
            running.update(self.rows[start : min(start + BLOCK, size), : obs_dim + act_dim].astype(np.float64))
        mean, deviation = running.mean, np.sqrt(running.var)
        return (mean[:obs_dim], deviation[:obs_dim]), (mean[obs_dim:], deviation[obs_dim:])

    def relabel(self, reward: RewardFunction) -> None:
        """Pay every stored transition by `reward`, in place."""
        for start in range(0, self.size(), BLOCK):
            rows = slice(start, min(start + BLOCK, self.size()))
            obs = np.ascontiguousarray(self.observations[rows, 0])
            paid = reward(obs, np.ascontiguousarray(self.actions[rows, 0]))
            if self.deviations is None:
                self.rewards[rows, 0] = paid
            else:
                self.rewards[rows, 0], self.deviations[rows, 0] = paid
