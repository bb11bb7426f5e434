"""What a reward update costs: PEBBLE, A-PARL and the penalty method on the same answers and rollouts.

    python -m experiments.benchmarks.reward_update

One thread; walker-walk's sizes (24 observations, 6 actions); 10,000 on-policy steps in ten episodes, 100 pairs of 50
steps, actor of 2×256, ensemble of three 3×256 networks, a fixed number of epochs. Updates are timed in turn, so that
whatever else the machine does meets all of them. `peak` is the growth of the
process's memory at its highest while one runs (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from pbrl.agent.exploration import StateEntropy
from pbrl.launch.shipped import make
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.rollouts import Rollouts
from pbrl.session import AgentSession
from pbrl.types import Answer

OBS, ACT, STEPS, EPISODE, PAIRS, SEGMENT = 24, 6, 10_000, 1000, 100, 50


class Walk(gym.Env[np.ndarray, np.ndarray]):
    """Random observations of walker-walk's size: the simulator's own time is not the question."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACT,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        return self._obs(), float(action[0]), False, self.t == EPISODE, {}

    def _obs(self) -> np.ndarray:
        return self.np_random.standard_normal(OBS, dtype=np.float32)


def session(steps: int = STEPS) -> tuple[AgentSession, Preferences]:
    """A session whose fresh rollouts and answers are those of the module's text."""
    agent = make("agent", "sac", env=Walk(), seed=0, learning_starts=0, buffer_size=2 * steps, compile=False)
    agent.attach(Rollouts(3 * steps, OBS, ACT))
    found = AgentSession(agent, np.random.default_rng(0), StateEntropy(agent.replay_buffer))
    found.collect_fresh(steps)
    query = replace(
        found.rollouts.query(PAIRS, SEGMENT, np.random.default_rng(1)), fresh=torch.ones(PAIRS, dtype=torch.bool)
    )
    labels = (query.task_rewards[:, 0].sum(1) > query.task_rewards[:, 1].sum(1)).float()
    preferences = Preferences()
    preferences.add(query, Answer(labels, torch.ones(PAIRS, dtype=torch.bool)), 0)
    return found, preferences


def updaters(epochs: int) -> dict[str, Any]:
    """The updates to compare; stop_accuracy above 1: all epochs are done."""
    fit = {"epochs": epochs, "stop_accuracy": 2.0, "batch_size": 128, "least_steps": 0, "crop": None, "shrink": 0.0}
    aparl, penalty = (partial(make, "updater", name, fit=fit) for name in ("aparl", "penalty"))
    return {
        "pebble": make("updater", "pebble", fit=fit, pairs="fresh"),
        "aparl, gated (closed)": aparl(),
        "aparl, gate off (Term 2 at every step)": aparl(gate="off"),
        "aparl, full Hessian, gated": aparl(implicit={"estimator": "full"}),
        "penalty, gated (closed)": penalty(),
        "penalty, gate off": penalty(gate="off"),
    }


def measured(update: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of processor time (other processes do not lengthen it), and MB by which memory grew at its highest."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, start = memory("VmRSS"), time.process_time()
    update()
    return time.process_time() - start, memory("VmHWM") - before


def memory(name: str) -> float:
    """A line of /proc/self/status (Linux), in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="optimiser steps per update (100 pairs are one batch)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, preferences = session()
    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.repeats):
        for name, updater in updaters(options.epochs).items():
            reward = RewardEnsemble(OBS, ACT)
            metrics: dict[str, float] = {}

            def update(updater: Any = updater, reward: Any = reward, metrics: Any = metrics) -> None:
                metrics |= updater.update(reward, preferences, found)

            results.setdefault(name, []).append(measured(update))
            cosines = [value for key, value in metrics.items() if key.endswith("/split_cosine")]
            if name != "pebble" and not np.isfinite(cosines).all():
                raise RuntimeError(f"{name} left its second term out: {metrics}")
    base = statistics.median(seconds for seconds, _ in results["pebble"])
    parameters = sum(value.numel() for value in found.policy.parameters().values())
    print(f"{options.epochs} optimiser steps per update; dim(theta)² floats would be {4e-9 * parameters**2:.0f} GB")
    for name, values in results.items():
        seconds = statistics.median(second for second, _ in values)
        grown = max(megabytes for _, megabytes in values)
        row = {"update": name, "seconds": round(seconds, 2), "times pebble": round(seconds / base, 2)}
        print(json.dumps(row | {"peak MB": round(grown)}))


if __name__ == "__main__":
    main()
