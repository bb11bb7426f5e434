"""How well a reward fitted to a run's answers ranks what its policy did next: `python -m experiments.fitting RUNS`.

For several numbers of sessions it fits new networks to the answers given until then, in several ways, and prints the
rank correlation of learned and true reward on the 5000 steps that followed: of segments' returns, and step by step.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

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
from pbrl.standardise import CLIP


class Way(NamedTuple):
    """How a reward is fitted: changes of `fit=ours`, of the reward's option, and where its statistics come from."""

    fit: dict[str, Any]
    reward: dict[str, Any] = {}  # noqa: RUF012
    option: str = "ensemble"
    moving: bool = False  # statistics of all steps so far, not of those before the first answers
    clip: float = CLIP  # of standardised inputs, in deviations


PLAIN: dict[str, Any] = {"crop": None, "shrink": 0.0}
SCALED: dict[str, Any] = {"normalise": True}
WAYS = {
    "10 steps (about where 97 % stops)": Way(PLAIN | {"least_steps": 10}),
    "50 steps": Way(PLAIN | {"least_steps": 50}),
    "150 steps": Way(PLAIN | {"least_steps": 150}),
    "150 steps, crops": Way({"least_steps": 150, "shrink": 0.0}),
    "150 steps, small rewards": Way({"least_steps": 150, "crop": None}),
    "150 steps, crops, small rewards": Way({"least_steps": 150}),
    "ours (100 steps, crops, small rewards)": Way({}),
    "ours, bf16": Way({}, {"precision": "bf16"}),
    "ours, standardised": Way({}, SCALED),
    "ours, standardised, moving statistics": Way({}, SCALED, moving=True),
    "the same, inputs not clipped": Way({}, SCALED, clip=np.inf),
    "the same, inputs clipped at 5": Way({}, SCALED, clip=5.0),
    "the same, inputs clipped at 2": Way({}, SCALED, clip=2.0),
    "the same, inputs clipped at 1": Way({}, SCALED, clip=1.0),
    "the same, 10 steps": Way({"least_steps": 10}, SCALED),
    "the same, 300 steps": Way({"least_steps": 300}, SCALED),
    "the same, 4 steps a label": Way({"least_steps": 0, "steps_per_label": 4.0}, SCALED),
    "the same, 15.6 steps a label (QPA)": Way({"least_steps": 0, "steps_per_label": 15.6}, SCALED),
    "the same, 8 crops a step": Way({"pieces": 8}, SCALED),
    "the same, 20 crops of 70-90 % a step (QPA)": Way({"pieces": 20, "crop": [0.7, 0.9]}, SCALED),
    "the same, no crops": Way({"crop": None}, SCALED),
    "the same, rewards of any size": Way({"shrink": 0.0}, SCALED),
    "the same, labels smoothed by 0.05": Way({"label_smoothing": 0.05}, SCALED),
    "the same, labels smoothed by 0.1": Way({"label_smoothing": 0.1}, SCALED),
    "the same, three members": Way({}, SCALED | {"members": 3}),
    "the same, mean less one deviation": Way({}, SCALED | {"members": 3, "pessimism": 1.0}),
    "REED": Way({}, {"max_updates": 1000}, "reed"),
    "REED, standardised": Way({}, SCALED | {"max_updates": 1000}, "reed"),
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


def correlations(reward: RewardEnsemble, rollouts: Rollouts, since: int, length: int) -> tuple[float, float]:
    """Spearman's coefficient of segments' returns and of single steps, on the steps from `since` on.

    Of what the agent would be paid.
    """
    starts = np.arange(since, min(since + AFTER, rollouts.total) - length, 25)
    segments, rows = rollouts.segments(starts, length), starts[:, None] + np.arange(length)
    members = reward.predict(segments.obs.flatten(0, 1).numpy(), segments.actions.flatten(0, 1).numpy())
    learned, true = reward.pay(members, since).reshape(rows.shape), rollouts.task_rewards[rows]
    by_segment = spearmanr(learned.sum(1), true.sum(1)).statistic
    return float(by_segment), float(spearmanr(learned.ravel(), true.ravel()).statistic)


def so_far(rollouts: Rollouts, step: int, measured: int, rng: np.random.Generator) -> Any:
    """As much of a `Session` at this step as a reward's `pretrain` uses; statistics of the first `measured` steps."""

    def transitions(count: int) -> dict[str, torch.Tensor]:
        goes_on = np.flatnonzero(rollouts.episode[: step - 1] == rollouts.episode[1:step])
        index = goes_on[rng.integers(len(goes_on), size=count)]
        named = (
            ("obs", rollouts.obs[index]),
            ("actions", rollouts.actions[index]),
            ("next_obs", rollouts.obs[index + 1]),
        )
        return {name: torch.from_numpy(value) for name, value in named}

    def moments() -> Any:
        seen = [column[:measured].astype(np.float64) for column in (rollouts.obs, rollouts.actions)]
        return tuple((column.mean(0), column.std(0)) for column in seen)

    return SimpleNamespace(env_step=step, transitions=transitions, moments=moments)


def measure(run: Path, ways: list[str], sessions: list[int], seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    """One row per way and number of sessions: the means over the seeds."""
    config = OmegaConf.load(run / "config.yaml")
    preferences = Preferences.load(run / "preferences.npz")
    length, obs_dim, act_dim = (
        preferences.length,
        preferences.first.obs.shape[-1],
        preferences.first.actions.shape[-1],
    )
    state_size = 0 if preferences.states is None else preferences.states.shape[-1]
    rollouts = stored_rollouts(run, obs_dim, act_dim, state_size)
    logged = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    asked_at = [row["env_step"] for row in logged if "feedback/session" in row]
    rows: list[dict[str, Any]] = []
    for name, session in itertools.product(ways, sessions):
        way, step = WAYS[name], asked_at[session - 1]
        answered = np.flatnonzero(preferences.session < session)
        found = []
        for seed in seeds:
            sizes = {"obs_dim": obs_dim, "act_dim": act_dim, "seed": seed}
            reward = make("reward", way.option, **({"members": 1} | way.reward | sizes))
            reward.obs_scale.clip = reward.action_scale.clip = way.clip
            rng = np.random.default_rng(seed)
            reward.pretrain(so_far(rollouts, step, step if way.moving else asked_at[0], rng))
            # one pass at the most, so that the number of steps is what the way says
            fit = make("updater", "pebble", fit={"epochs": 1, "stop_accuracy": 2.0} | way.fit).fit
            fit(reward, preferences, rng, answered)
            found.append(correlations(reward, rollouts, step, length))
        by_segment, by_step = np.mean(found, axis=0)
        rows.append({"run": run.name, "env": config.choices.env, "way": name, "answers": len(answered)})
        rows[-1] |= {"by_segment": round(by_segment, 3), "by_step": round(by_step, 3)}
        print(f"{name:45} {len(answered):4} answers: {by_segment:5.2f} by segment, {by_step:5.2f} by step", flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fitting", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--sessions", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help="default: all")
    parser.add_argument("--out", type=Path, help="CSV")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for run in options.runs for row in measure(run, options.ways, options.sessions)]
    if options.out:
        write(options.out, tuple(rows[0]), rows)


if __name__ == "__main__":
    main()
