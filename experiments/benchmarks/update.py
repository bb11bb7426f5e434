"""SAC updates against stock Stable-Baselines3's, in one run: written out, fp32 and bf16, eager and compiled; autograd.

The roofline is the time that the update's matrix products alone take at the rate of one large product of the same
kind, measured in turn with the updates.
"""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger

from experiments.benchmarks.timing import interleaved
from pbrl.agent.sac import PreferenceSAC
from pbrl.launch.shipped import make

SETTINGS: dict[str, dict[str, Any]] = {
    "lean": {"obs": 24, "act": 6, "net_arch": (256, 256), "batch": 256},
    "metaworld": {"obs": 39, "act": 4, "net_arch": (256, 256, 256), "batch": 512},
    "dmc": {"obs": 24, "act": 6, "net_arch": (1024, 1024), "batch": 1024},
}
TRANSITIONS = 10_000
STOCK: dict[str, Any] = {
    "learning_rate": 3e-4,
    "log_std_range": None,
    "orthogonal_init": False,
    "compile": False,
}  # as in SB3


class Still(gym.Env):
    """Nothing happens; it has the spaces of a task."""

    def __init__(self, obs: int, act: int) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (act,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape or (), np.float32), {}


def products(setting: dict[str, Any]) -> float:
    """Floating-point operations of one update's matrix products, none of them twice.

    Forward: actor on both observations, two targets, the two critics twice. Backward: all weights and hidden inputs of
    two critics and the actor, and for dQ/da the hidden inputs of one critic for each row, and the action columns.
    """
    obs, act, batch = setting["obs"], setting["act"], setting["batch"]

    def sizes(first: int, last: int) -> tuple[int, int]:
        widths = [first, *setting["net_arch"], last]
        layers = [a * b for a, b in itertools.pairwise(widths)]
        return sum(layers), sum(layers[1:])

    actor, actor_inner = sizes(obs, 2 * act)
    critic, critic_inner = sizes(obs + act, 1)
    multiplications = 3 * actor + actor_inner + 8 * critic + 3 * critic_inner + act * setting["net_arch"][0]
    return 2.0 * batch * multiplications


def agents(setting: dict[str, Any]) -> dict[str, SAC]:
    """The variants on equal random transitions."""
    env, arch = Still(setting["obs"], setting["act"]), list(setting["net_arch"])
    stock = SAC("MlpPolicy", env, buffer_size=TRANSITIONS, policy_kwargs={"net_arch": arch}, seed=0, device="cpu")
    stock.set_logger(Logger(None, []))
    ours: dict[str, PreferenceSAC] = {
        name: make("agent", "sac", env=env, seed=0, net_arch=arch, **STOCK, precision=precision)
        for name, precision in (
            ("autograd", "fp32"),
            ("fp32", "fp32"),
            ("bf16", "bf16"),
            ("fp32 compiled", "fp32"),
            ("bf16 compiled", "bf16"),
        )
    }
    ours["autograd"]._fast = None
    for name, agent in ours.items():
        if name.endswith("compiled"):
            assert agent._fast is not None
            agent._fast.compile(setting["batch"])
    rng = np.random.default_rng(0)
    fill(stock.replay_buffer, rng)
    for agent in ours.values():
        fill(agent.replay_buffer, np.random.default_rng(0))
    return {"stock": stock, **ours}


def fill(replay: Any, rng: np.random.Generator) -> None:
    """Random observations and actions in (−1, 1), random rewards, no ends."""
    for field in (replay.observations, replay.next_observations, replay.actions, replay.rewards):
        field[:] = rng.uniform(-1, 1, field.shape)
    replay.full = True


def run(settings: tuple[str, ...] = tuple(SETTINGS), threads: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """One row per setting, number of threads and variant."""
    before = torch.get_num_threads()
    rows = [row for name in settings for row in compared(name, threads)]
    torch.set_num_threads(before)
    return rows


def compared(name: str, threads: tuple[int, ...]) -> list[dict[str, Any]]:
    """The rows of one setting."""
    setting, rows = SETTINGS[name], []
    batch, width = setting["batch"], max(setting["net_arch"])
    left, right = torch.randn(batch, width), torch.randn(width, width)
    halves = left.bfloat16(), right.bfloat16()
    for count in threads:
        torch.set_num_threads(count)
        made = agents(setting)
        variants: dict[str, Any] = {key: (lambda agent=agent: agent.train(1, batch)) for key, agent in made.items()}
        variants |= {"fp32 product": lambda: left @ right, "bf16 product": lambda: halves[0] @ halves[1]}
        times = interleaved(variants)
        for key in made:
            product = times["bf16 product" if key.startswith("bf16") else "fp32 product"]
            row = {"setting": name, "threads": count, "variant": key, **times[key]}
            row["updates_per_second"] = 1e3 / times[key]["ms"]
            for clock in ("ms", "cpu_ms"):
                row[f"ratio_{clock}"] = times["stock"][clock] / times[key][clock]
                bound = product[clock] * products(setting) / (2 * batch * width**2)
                row[f"roofline_{clock}"] = bound / times[key][clock]
            rows.append(row)
    return rows
