"""A method, a teacher and an environment of somebody's own: one file and its YAML, elsewhere nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY

pytestmark = pytest.mark.slow


def trained(folder: Path, group: str, option: str, *more: str) -> dict[str, Any]:
    """The summary of `python -m pbrl.train -cd conf GROUP=OPTION` in this folder, at tiny settings."""
    tiny = [word for word in TINY if not word.startswith(f"{group}=")]
    words = ["-m", "pbrl.train", "-cd", "conf", *tiny, f"{group}={option}", "run_dir=run", *more]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["complete"] is True
    return summary


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())


def test_a_method(tmp_path: Path) -> None:
    write(
        tmp_path,
        "own.py",
        """
        from pbrl.fitting import train_epochs
        from pbrl.interfaces import Updater
        from pbrl.losses import bradley_terry_loss, correct


        class Hinge(Updater):
            def __init__(self, epochs: int) -> None:
                self.epochs, self.updates = epochs, 0

            def update(self, reward, preferences, session):
                first, second, labels = preferences.first, preferences.second, preferences.prefers_first

                def loss(member, index):
                    a, b = (reward.member(member, side[index].obs, side[index].actions) for side in (first, second))
                    gap = a.sum(1) - b.sum(1)
                    value = (1 - (2 * labels[index] - 1) * gap).clamp_min(0).mean()
                    return value, *correct(gap.detach(), labels[index])

                self.updates += 1
                found = train_epochs(
                    reward, loss, len(preferences), batch_size=8, max_epochs=self.epochs, stop_accuracy=2.0,
                    rng=session.rng,
                )
                return found | {"hinge/updates": float(self.updates)}

            def state_dict(self):
                return {"updates": self.updates}

            def load_state_dict(self, state):
                self.updates = state["updates"]
        """,
    )
    write(tmp_path, "conf/updater/hinge.yaml", "_target_: own.Hinge\nepochs: 5\n")
    summary = trained(tmp_path, "updater", "hinge", "updater.epochs=4")
    assert summary["hinge/updates"] == 3
    assert summary["reward/epochs"] == 4


def test_a_teacher(tmp_path: Path) -> None:
    write(
        tmp_path,
        "own.py",
        """
        import torch
        from pbrl.types import Answer


        class Alternating:
            def __init__(self, skip_every: int) -> None:
                self.skip_every = skip_every

            def __call__(self, query):
                turn = torch.arange(len(query))
                return Answer((turn % 2).float(), turn % self.skip_every != 0)

            def metrics(self):
                return {"teacher/own": 1.0}
        """,
    )
    write(tmp_path, "conf/teacher/alternating.yaml", "_target_: own.Alternating\nskip_every: 5\n")
    summary = trained(tmp_path, "teacher", "alternating")
    assert (summary["feedback/asked"], summary["feedback/skipped"], summary["teacher/own"]) == (15, 3, 1.0)


def test_an_environment(tmp_path: Path) -> None:
    write(
        tmp_path,
        "own.py",
        """
        import gymnasium as gym
        import numpy as np


        class Line(gym.Env):
            observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
            action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
            horizon = 20

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.x, self.steps = self.np_random.uniform(-1, 1), 0
                return np.array([self.x], np.float32), {}

            def step(self, action):
                self.x, self.steps = float(np.clip(self.x + 0.1 * action[0], -1, 1)), self.steps + 1
                return np.array([self.x], np.float32), -abs(self.x), False, self.steps == self.horizon, {}
        """,
    )
    write(tmp_path, "conf/env/line.yaml", "_target_: own.Line\n")
    summary = trained(tmp_path, "env", "line")
    assert summary["env_step"] == 600
    assert -40 < summary["eval/return"] < 0
