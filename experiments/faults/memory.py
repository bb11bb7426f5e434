"""Does a long run's memory grow? `python -m experiments.faults.memory [--steps 200000]`.

A whole preference run on the point mass, with 200 feedback sessions, evaluations and checkpoints, whose rings are full
after 20 000 steps. To save time only every twentieth gradient step is done. The resident memory is written to
memory.csv every 5000 steps; the exit code is 1 if it grows by 2 % or more after the warm-up of 40 000 steps.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from experiments.faults.runs import TINY
from pbrl.launch.build import build
from pbrl.launch.configuration import register_resolvers
from pbrl.loop import Loop

WARM_UP = 40_000  # environment steps
EVERY = 5000  # environment steps between readings
UPDATES = 20  # calls of the agent's update of which one is done
LIMIT = 0.02  # growth of the resident memory
SMALL = (
    *TINY,
    "agent.buffer_size=20000",
    "agent.learning_starts=500",
    "reward.hidden=[16]",
    "pretraining.steps=500",
    "pretraining.updates=100",
    "feedback.memory_steps=20000",
    "feedback.every=1000",
    "feedback.budget=2000",
    "feedback.per_session=10",
    "updater.fit.epochs=1",
    "eval.every=5000",
    "checkpoint_every=5000",
    "log_every=1000",
)


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def rarely(loop: Loop) -> None:
    """Do only one of UPDATES calls of the agent's update."""
    train, calls = loop.agent.train, itertools.count()

    def some(*args: Any) -> None:
        if next(calls) % UPDATES == 0:
            train(*args)

    vars(loop.agent)["train"] = some


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.faults.memory", description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000)
    steps = parser.parse_args().steps
    register_resolvers()
    readings: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*SMALL, f"total_steps={steps}", f"run_dir={folder}/run"]
        with initialize_config_module("pbrl.conf", version_base="1.3"):
            cfg = compose("train", overrides=overrides)
        loop = build(cfg, {"env": "pointmass"}, overrides)
        rarely(loop)

        def read() -> bool:
            if loop.step % EVERY == 0 and (not readings or readings[-1][0] < loop.step):
                readings.append((loop.step, resident()))
            return False

        loop.stop = read
        loop.run()
        loop.close(True)
    with Path("experiments/results/faults/memory.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["env_step", "resident_mb"], *((step, f"{mb:.1f}") for step, mb in readings)])
    warm = [mb for step, mb in readings if step >= WARM_UP]
    growth = max(warm) / warm[0] - 1
    print(f"\nresident memory {warm[0]:.1f} MB after {WARM_UP} steps, at most {max(warm):.1f} MB later: {growth:+.2%}")
    return 0 if growth < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
