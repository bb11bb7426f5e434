"""Parts that fail on demand: a teacher, a simulator and a callback that read the fault from the variable PBRL_FAULT.

The same config therefore runs with the fault and, resumed without the variable, without it.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from envs.pointmass import PointMass
from pbrl.types import Answer, Query
from pbrl.updaters.pebble import Pebble
from teachers.simulated import SimulatedTeacher


def fault(name: str) -> bool:
    """Whether this fault is switched on."""
    return os.environ.get("PBRL_FAULT") == name


def kill_at_write(number: int) -> None:
    """SIGKILL to this process before call `number`, from 1, of those that make changes to the disk take place."""
    calls = itertools.count(1)

    def counted(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


class FailingTeacher(SimulatedTeacher):
    """Fails at its query number `at`: hang, raise or malformed; answered is appended to `count_file` when given."""

    def __init__(self, at: int = 2, count_file: str | None = None, seed: int = 0) -> None:
        super().__init__(mistake=0.1, seed=seed)
        self.at, self.count_file = at, count_file

    def __call__(self, query: Query) -> Answer:
        answer = super().__call__(query)  # draws: a failed call must not change what follows
        if self._queries > self.at:
            if fault("hang"):
                time.sleep(3600)
            if fault("raise"):
                raise ConnectionError("the judge hung up")
            if fault("malformed"):
                return Answer(torch.full((len(query),), 2.0), torch.ones(len(query), dtype=torch.bool))
        if self.count_file is not None:
            with Path(self.count_file).open("a") as file:
                file.write(f"{len(query)}\n")
        return answer


class Remembering:
    """Answers that depend on all earlier ones; the state is the teacher's own list, which grows while it answers."""

    def __init__(self) -> None:
        self.said: list[float] = []

    def __call__(self, query: Query) -> Answer:
        for i in range(len(query)):
            gap = float(query.first.obs[i].sum() - query.second.obs[i].sum())
            self.said.append(float(np.sin(1e3 * (sum(self.said) + gap)) > 0))
        return Answer(torch.tensor(self.said[-len(query) :]), torch.ones(len(query), dtype=torch.bool))

    def metrics(self) -> dict[str, float]:
        return {"teacher/said": sum(self.said)}

    def state_dict(self) -> dict[str, Any]:
        return {"said": self.said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.said = state["said"]


def prefers_less_motion(query: Query) -> Answer:
    """A teacher that is a function."""
    first, second = (side.actions.square().sum((1, 2)) for side in (query.first, query.second))
    return Answer((first < second).float(), torch.ones(len(query), dtype=torch.bool))


class FailingPointMass(PointMass):
    """Returns NaN as observation or reward (nan-obs, nan-reward) in the 31st step of its episodes, `at` steps on."""

    def __init__(self, at: int = 250, horizon: int = 50, seed: int | None = None) -> None:
        super().__init__(horizon, seed)
        self.at, self.taken = at, 0

    def _advance(self, action: Any) -> Any:
        obs, reward, terminated, info = super()._advance(action)
        self.taken += 1
        if self.taken > self.at and self._elapsed == 30:
            obs = obs * np.nan if fault("nan-obs") else obs
            reward = float("nan") if fault("nan-reward") else reward
        return obs, reward, terminated, info


class PoisonedGradient(BaseCallback):
    """From environment step `at` on, one batch gives NaN gradients: of the critics only (nan-critic) or of all."""

    def __init__(self, at: int = 300) -> None:
        super().__init__()
        self.at, self.done = at, False

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at and not self.done:
            self.done = True
            replay: Any = self.model.replay_buffer  # type: ignore[attr-defined]
            draw = replay.draw

            def poisoned(*args: Any) -> Any:
                batch = draw(*args)
                rewards = batch.rewards * float("nan") if fault("nan-critic") else batch.rewards
                obs = batch.obs * float("nan") if fault("nan-all") else batch.obs
                replay.draw = draw
                return batch._replace(obs=obs, rewards=rewards)

            replay.draw = poisoned
        return True


class PoisonedPebble(Pebble):
    """In its update number `at` the reward's last gradient is NaN (nan-reward-gradient)."""

    def __init__(self, at: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.at, self.updates = at, 0

    def update(self, reward: Any, preferences: Any, session: Any) -> dict[str, float]:
        metrics = super().update(reward, preferences, session)
        self.updates += 1
        if self.updates > self.at and fault("nan-reward-gradient"):
            reward.optimizer.zero_grad()
            for weight in reward.parameters():
                weight.grad = torch.full_like(weight, float("nan"))
            reward.optimizer.step()
        return metrics
