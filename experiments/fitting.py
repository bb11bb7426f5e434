"""How well a reward fitted to a run's answers ranks what its policy did next: `python -m experiments.fitting RUN`.

For several numbers of sessions it fits a new network to the answers given until then, in several ways, and prints the
rank correlation of learned and true reward on the 5000 steps that followed: of segments' returns, and step by step.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from experiments.curves import write
from pbrl.launch.shipped import make
from pbrl.preferences import Preferences
from pbrl.records.checkpoint import StepLog
from pbrl.reward import RewardEnsemble
from pbrl.rollouts import Rollouts

CROP = (0.7, 1.0)
WAYS = {  # optimiser steps, crop, shrink, precision
    "10 steps (about where 97 % stops)": (10, None, 0.0, "fp32"),
    "50 steps": (50, None, 0.0, "fp32"),
    "150 steps": (150, None, 0.0, "fp32"),
    "150 steps, crops": (150, CROP, 0.0, "fp32"),
    "150 steps, small rewards": (150, None, 0.3, "fp32"),
    "150 steps, crops, small rewards": (150, CROP, 0.3, "fp32"),
    "100 steps, crops, small rewards (A-PARL's)": (100, CROP, 0.3, "fp32"),
    "A-PARL's in bf16": (100, CROP, 0.3, "bf16"),
}
AFTER = 5000  # environment steps
SEEDS = (0, 1)


def stored_rollouts(run: Path, obs_dim: int, act_dim: int, state_size: int) -> Rollouts:
    """All steps of a run from its folder.

    Raises:
        FileNotFoundError: if it was so long that its first steps are no longer kept.
    """
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    record = json.loads((newest / "manifest.json").read_text())["steps"]["rollouts"]
    rollouts = Rollouts(int(record["rows"]), obs_dim, act_dim, state_size)
    StepLog(run / "steps", "rollouts", rollouts.columns).load(record)
    rollouts.total = int(record["rows"])
    return rollouts


def correlations(reward: RewardEnsemble, rollouts: Rollouts, since: int, horizon: int) -> tuple[float, float]:
    """Spearman's coefficient of segments' returns and of single steps, on the steps from `since` on."""
    starts = np.arange(since, min(since + AFTER, rollouts.total) - horizon, 25)
    segments, rows = rollouts.segments(starts, horizon), starts[:, None] + np.arange(horizon)
    with torch.no_grad():
        learned = reward.mean(segments.obs, segments.actions).numpy()
    true = rollouts.task_rewards[rows]
    by_segment = spearmanr(learned.sum(1), true.sum(1)).statistic
    return float(by_segment), float(spearmanr(learned.ravel(), true.ravel()).statistic)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fitting", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sessions", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--out", type=Path, help="CSV")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = OmegaConf.load(options.run / "config.yaml")
    preferences = Preferences.load(options.run / "preferences.npz")
    horizon, (obs_dim, act_dim) = (
        preferences.horizon,
        (preferences.first.obs.shape[-1], preferences.first.actions.shape[-1]),
    )
    state_size = 0 if preferences.states is None else preferences.states.shape[-1]
    rollouts = stored_rollouts(options.run, obs_dim, act_dim, state_size)
    asked_at = [
        row["env_step"]
        for row in map(json.loads, (options.run / "metrics.jsonl").read_text().splitlines())
        if "feedback/session" in row
    ]
    rows = []
    for (way, (steps, crop, shrink, precision)), session in itertools.product(WAYS.items(), options.sessions):
        answered = np.flatnonzero(preferences.session < session)
        found = []
        for seed in SEEDS:
            reward = RewardEnsemble(obs_dim, act_dim, members=1, seed=seed, precision=precision)
            fit = make("updater", "pebble", fit={"epochs": 1, "least_steps": steps, "crop": crop, "shrink": shrink}).fit
            fit(reward, preferences, np.random.default_rng(seed), answered)
            found.append(correlations(reward, rollouts, asked_at[session - 1], horizon))
        by_segment, by_step = np.mean(found, axis=0)
        rows.append({"run": options.run.name, "env": config.choices.env, "way": way, "answers": len(answered)})
        rows[-1] |= {"by_segment": round(by_segment, 3), "by_step": round(by_step, 3)}
        print(f"{way:45} {len(answered):4} answers: {by_segment:5.2f} by segment, {by_step:5.2f} by step", flush=True)
    if options.out:
        write(options.out, tuple(rows[0]), rows)


if __name__ == "__main__":
    main()
