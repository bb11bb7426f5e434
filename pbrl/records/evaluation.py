"""How good is the policy by the task's own reward, and how good is the learned reward? Nothing here trains anything."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from pbrl.agent.sac import PreferenceSAC
from pbrl.episodes import play
from pbrl.losses import calibration_error, correct
from pbrl.reward import NEARLY_SATURATED, RewardEnsemble
from pbrl.types import Answer, Query


@torch.no_grad()
def act(agent: PreferenceSAC, obs: np.ndarray) -> np.ndarray:
    """The policy's mean action for one observation [obs_dim]: float32 [act_dim], in the environment's units."""
    mean, _, _ = agent.actor.get_action_dist_params(torch.from_numpy(obs[None]).to(agent.device))
    return agent.policy.unscale_action(torch.tanh(mean).cpu().numpy())[0]


def episode(
    agent: PreferenceSAC, env: Any, seed: int, states: list[np.ndarray] | None = None
) -> tuple[float, bool | None]:
    """One episode of the mean policy: its undiscounted task return, and whether any step was a success.

    Success is None where the task does not define it. `states`, if given, receives the simulator's state at each step.
    """
    keep = (lambda: None) if states is None else (lambda: states.append(env.get_state()))
    played = play(env, partial(act, agent), seed, keep)
    return played.task_return, played.success


def evaluate(
    agent: PreferenceSAC, env: Any, episodes: int, seed: int, states: list[np.ndarray] | None = None
) -> dict[str, float]:
    """Mean return (task units per episode) and success share over episodes seeded seed, seed + 1, …

    `env` is an environment of its own: training is not disturbed, and every evaluation sees the same episodes.
    `states`, if given, receives the simulator's state at each step of the first one.
    """
    kept = [states] + [None] * (episodes - 1)
    returns, successes = zip(*(episode(agent, env, seed + i, kept[i]) for i in range(episodes)), strict=True)
    metrics = {"eval/return": float(np.mean(returns)), "eval/return_std": float(np.std(returns))}
    if None not in successes:
        metrics["eval/success"] = float(np.mean(successes))
    return metrics


class OracleCurve:
    """The oracle's true return against environment steps.

    Args:
        path: a CSV with columns env_step, return[, success], or the folder of a run with updater=oracle.

    Raises:
        ValueError: if there are no numbers in it. OSError: if it is not there.
    """

    def __init__(self, path: Path) -> None:
        try:
            rows = _evaluations(path) if path.is_dir() else _table(path)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: expected columns env_step and return with numbers ({error})") from error
        if len(rows) == 0:
            raise ValueError(f"{path}: no evaluations in it")
        self.steps, self.returns = np.array(rows, dtype=float).T

    def metrics(self, step: int, mean_return: float) -> dict[str, float]:
        """The oracle's return at this step (interpolated) and the run's return as a share of the oracle's last.

        The share is NaN where the oracle's last return is not positive: a worse run would have a larger one.
        """
        final = float(self.returns[-1])
        return {
            "eval/oracle_return": float(np.interp(step, self.steps, self.returns)),
            "eval/normalized_return": mean_return / final if final > 0 else float("nan"),
        }


def _table(path: Path) -> list[tuple[float, float]]:
    with path.open(newline="") as file:
        return [(float(row["env_step"]), float(row["return"])) for row in csv.DictReader(file)]


def _evaluations(run: Path) -> list[tuple[float, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written
    return [(row["env_step"], row["eval/return"]) for row in rows if "eval/return" in row]


def reward_health(reward: RewardEnsemble, query: Query, answer: Answer) -> dict[str, float]:
    """How well the reward predicts answers it has not been trained on yet: call before they are added.

    A query rule that asks where the reward is unsure (disagreement, entropy) picks the hardest pairs: an accuracy near
    0.5 on them is what it is for. How good the reward is says `pair_accuracy`.

    Returns:
        reward/holdout_accuracy (of decided answers), reward/calibration_error (of given answers); NaN without any.
    """
    index = answer.given.nonzero().squeeze(1).numpy()
    logits = reward.preference_logits(query.first[index], query.second[index]).mean(dim=0)
    labels = answer.prefers_first[answer.given]
    hits, decided = correct(logits, labels)
    return {
        "reward/holdout_accuracy": float(hits / decided) if decided else float("nan"),
        "reward/calibration_error": calibration_error(logits, labels),
    }


Steps = tuple[np.ndarray, np.ndarray, np.ndarray]  # observations [N, ·], actions [N, ·], task rewards [N]


def over_optimisation(reward: RewardEnsemble, step: int, recent: Steps, kept: Steps) -> dict[str, float]:
    """What the reward makes of the present policy's steps, beside what the task does.

    Args:
        step: the environment step, for what the agent is paid.
        recent: the present policy's steps. kept: all kept steps.

    Returns:
        reward/learned_per_step, reward/true_per_step: mean over the recent steps, the members' mean and the task's.
        reward/gap: how many standard deviations of the kept steps' rewards the recent steps lie above their mean, by
        the learned reward, less the same by the task's: above 0 the policy looks better than it is. NaN where either
        reward is constant.
        reward/saturated: share of the recent steps, over all members, at which the output's slope is below
        `NEARLY_SATURATED`: there answers hardly move the reward any more.
        reward/paid_below: share of the recent steps paid less than the members' mean would be;
        reward/paid_below_by: how much less, on average over those steps (0 if there are none).
    """
    members, before = (reward.predict(obs, actions) for obs, actions, _ in (recent, kept))
    learned, true = members.mean(axis=0), recent[2]
    below = reward.pay.convex(learned) - reward.pay(members, step)
    short = below[below > 0]
    return {
        "reward/learned_per_step": float(learned.mean()),
        "reward/true_per_step": float(true.mean()),
        "reward/gap": _standing(learned, before.mean(axis=0)) - _standing(true, kept[2]),
        "reward/saturated": float((reward.slope(members) < NEARLY_SATURATED).mean()),
        "reward/paid_below": len(short) / len(below),
        "reward/paid_below_by": float(short.mean()) if len(short) else 0.0,
    }


def _standing(values: np.ndarray, among: np.ndarray) -> float:
    """How many standard deviations of `among` the mean of `values` lies above its mean; NaN if it has none."""
    deviation = float(among.std())
    return (float(values.mean()) - float(among.mean())) / deviation if deviation > 0 else float("nan")


PAIR_COLUMNS = ["session", "true return 1", "true return 2", "learned return 1", "learned return 2", "answer"]


def pair_rows(reward: RewardEnsemble, query: Query, answer: Answer, session: int) -> list[list[Any]]:
    """One row of PAIR_COLUMNS per pair, with the reward as it was when the pair was asked about.

    Returns are sums over a segment; the answer is 1, 2, equal, skipped, or a soft label's weight of the first.
    """
    true = query.task_rewards.sum(dim=2).tolist()
    learned = [reward.returns(segments).mean(dim=0).tolist() for segments in (query.first, query.second)]
    words = {1.0: "1", 0.0: "2", 0.5: "equal"}
    labels = answer.prefers_first.tolist()
    answers = [
        words.get(label, f"{label:g}") if given else "skipped"
        for label, given in zip(labels, answer.given.tolist(), strict=True)
    ]
    return [[session, *true[i], learned[0][i], learned[1][i], answers[i]] for i in range(len(query))]


def pair_accuracy(reward: RewardEnsemble, query: Query) -> float:
    """Share of the pairs that the learned reward orders as the task does, in [0, 1]; NaN if all are equally good."""
    true = query.task_rewards.sum(dim=2)
    logits = reward.preference_logits(query.first, query.second).mean(dim=0)
    labels = torch.where(true[:, 0] == true[:, 1], 0.5, (true[:, 0] > true[:, 1]).float())
    hits, decided = correct(logits, labels)
    return float(hits / decided) if decided else float("nan")


def rank_correlation(reward: RewardEnsemble, query: Query) -> float:
    """Spearman correlation of learned and true return over the query's segments; NaN if either is constant."""
    learned = np.concatenate([reward.returns(s).mean(dim=0).numpy() for s in (query.first, query.second)])
    true = query.task_rewards.sum(dim=2).T.reshape(-1).numpy()
    if np.ptp(learned) == 0 or not np.ptp(true) > 0:
        return float("nan")
    return float(spearmanr(learned, true).statistic)
