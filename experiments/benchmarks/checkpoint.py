"""What a checkpoint of a long run costs: `python -m experiments.benchmarks.checkpoint [--steps 1000000]`.

A real loop (39 observations and 4 actions, as Meta-World has; default networks; 1000 answered pairs) whose replay and
rollouts are filled with `steps` transitions. Measured: the first checkpoint, which writes everything; the next ones,
25 000 steps apart, which hold up the training loop; resuming; and the bytes on the disk. Writes checkpoint.csv.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module

from envs.base import SimulatorEnv
from pbrl.launch.build import build
from pbrl.launch.configuration import register_resolvers
from pbrl.loop import Loop
from pbrl.types import Answer

OBS, ACT, STATE = 39, 4, 90  # numbers per step; of the simulator's state: Meta-World's door
EVERY = 25_000  # environment steps between checkpoints, the default


class Wide(SimulatorEnv):
    """No simulation at all, but as many numbers per step as a Meta-World task."""

    def __init__(self, horizon: int = 500) -> None:
        super().__init__(OBS, ACT, horizon, STATE - 2, None)

    def _start(self, episode_seed: int) -> Any:
        return np.zeros(OBS)

    def _advance(self, action: Any) -> Any:
        return np.zeros(OBS), 0.0, False, {}

    def _save(self, out: Any) -> None:
        out[:] = 0.0

    def _load(self, saved: Any) -> Any:
        return np.zeros(OBS)

    def render(self, width: int = 256, height: int = 256) -> Any:
        return np.zeros((height, width, 3), np.uint8)


def fill(loop: Loop, steps: int, rng: np.random.Generator) -> None:
    """Take `steps` steps without a simulator."""
    replay, rollouts = loop.agent.replay_buffer, loop.parts.rollouts
    at = (replay.pos + np.arange(steps)) % replay.buffer_size
    replay.rows[at] = rng.random((steps, replay.rows.shape[1]), np.float32)
    replay.full |= replay.pos + steps >= replay.buffer_size
    replay.pos = (replay.pos + steps) % replay.buffer_size
    last = min(steps, rollouts.capacity)
    ring = np.arange(rollouts.total + steps - last, rollouts.total + steps) % rollouts.capacity
    for column in (rollouts.obs, rollouts.actions, rollouts.raw_actions, rollouts.task_rewards, rollouts.states):
        column[ring] = rng.random((last, *column.shape[1:]))
    rollouts.episode[ring] = (rollouts.total + np.arange(last)) // 500
    rollouts.total += steps
    loop.agent.num_timesteps += steps


def ask(loop: Loop, pairs: int, rng: np.random.Generator) -> None:
    query = loop.parts.rollouts.query(pairs, 50, rng)
    loop.parts.preferences.add(query, Answer(torch.ones(pairs), torch.ones(pairs, dtype=torch.bool)), 0)


def made(run_dir: Path, resume: bool, steps: int) -> Loop:
    overrides = ["trust=[experiments.benchmarks.checkpoint]", f"{'resume' if resume else 'run_dir'}={run_dir}"]
    if not resume:
        overrides += [f"total_steps={2 * steps}", "env=pointmass", "threads=1", f"agent.buffer_size={steps}"]
        overrides += ["env._target_=experiments.benchmarks.checkpoint.Wide", "env.horizon=500"]
    register_resolvers()
    with initialize_config_module("pbrl.conf", version_base="1.3"):
        cfg = compose("train", overrides=overrides)
    return build(cfg, {"env": "wide"}, overrides)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    steps = parser.parse_args().steps
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        run_dir = Path(folder) / "run"
        loop = made(run_dir, False, steps)
        loop.agent._setup_learn(1)
        rows = []

        def measure(name: str, seconds: float) -> None:
            rows.append([name, f"{seconds:.2f}", "s"])
            print(*rows[-1])

        for start in range(0, steps, loop.parts.rollouts.capacity):
            fill(loop, min(loop.parts.rollouts.capacity, steps - start), rng)
            for log in loop.step_logs:  # as the checkpoints before would have done
                log.append(loop.parts.rollouts.total)
        ask(loop, 1000, rng)
        for index in range(4):
            began = time.perf_counter()
            loop.save()
            measure(f"checkpoint at step {loop.step}", time.perf_counter() - began)
            if index < 3:
                fill(loop, EVERY, rng)
        replay, rollouts = loop.agent.replay_buffer.rows.nbytes, sum(c.nbytes for c in loop.parts.rollouts.columns)
        for name, value in (
            ("replay in memory", replay),
            ("rollouts in memory", rollouts),
            ("replay on the disk", sum(path.stat().st_size for path in (run_dir / "steps").glob("replay*"))),
            ("all step files on the disk", size(run_dir / "steps")),
            ("two checkpoints on the disk", size(run_dir / "checkpoints")),
        ):
            rows.append([name, f"{value / 1e6:.1f}", "MB"])
            print(*rows[-1])
    with (Path(__file__).parent / "checkpoint.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["what", "value", "unit"], *rows])


if __name__ == "__main__":
    main()
