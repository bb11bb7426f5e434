"""Teachers who see the task's own reward: the six of B-Pref (Lee et al., NeurIPS 2021 datasets track), in one class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pbrl.types import Answer, Query, Teacher

STREAM = 0x7EAC  # sets this generator apart from others made from the same seed


class SimulatedTeacher(Teacher):
    """Prefers the segment with the larger sum of task rewards, with the human failings of B-Pref.

    For each pair, with R the undiscounted sum of a segment's task rewards and H its steps, in this order:

    1. skipped, if neither R exceeds `skip` · base, where base = (task reward per step of the last ten episodes) · H;
    2. remembered as equal, if the two R differ by less than `equal` · base;
    3. returns W = Σ_h gamma^(H−1−h) r_h: a forgetful teacher weighs the last step fully and the first least;
    4. the first is preferred if W1 ≥ W2 (a tie goes to the first); with beta > 0 instead with probability
       sigmoid(beta (W1 − W2));
    5. with probability `mistake` the answer is turned round;
    6. the pairs of step 2 are answered 0.5, so that mistakes never touch them.

    Until an episode is finished, and while the agent's mean reward is not positive, base is unknown or meaningless:
    nothing is skipped or called equal.

    Args:
        beta: rationality, 1 / task reward: the smaller, the more random. Negative: perfectly rational.
        gamma: weight of a step relative to the next one, in (0, 1].
        mistake: probability of a turned answer, in [0, 1].
        skip, equal: thresholds as a share of base, in [0, 1].
        beta_per_std: beta counts in standard deviations of W over the segments of the query (pairs of one query are
            judged on their own scale), not in units of reward. An absolute beta of 1 is nearly deterministic for
            tasks that pay ~1 a step. With one pair per query the scale is the pair itself.
        bpref_compat: from the second query on, thresholds are skip² · base and equal² · base, as the published code
            of B-Pref and its descendants has it (by a slip: they multiply by the share twice). Each call counts as
            a query.
        seed: of the teacher's own generator.
    """

    def __init__(
        self,
        beta: float = -1.0,
        gamma: float = 1.0,
        mistake: float = 0.0,
        skip: float = 0.0,
        equal: float = 0.0,
        beta_per_std: bool = False,
        bpref_compat: bool = False,
        seed: int = 0,
    ) -> None:
        if not math.isfinite(beta) or beta == 0:
            raise ValueError(f"beta is {beta}; expected a positive number, or -1 for a perfectly rational teacher")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}; expected a weight in (0, 1]")
        for name, share in (("mistake", mistake), ("skip", skip), ("equal", equal)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; expected a share in [0, 1]")
        self.beta, self.gamma, self.mistake, self.skip, self.equal = beta, gamma, mistake, skip, equal
        self.beta_per_std, self.bpref_compat = beta_per_std, bpref_compat
        self._rng = np.random.default_rng([seed, STREAM])
        self._queries = 0
        self._metrics: dict[str, float] = {}

    def __call__(self, query: Query) -> Answer:
        """The answers.

        Raises:
            ValueError: if a task reward is not finite.
        """
        rewards = query.task_rewards.detach().cpu().numpy().astype(np.float64)  # [N, 2, H]
        if not np.isfinite(rewards).all():
            pair = int(np.argmin(np.isfinite(rewards).all((1, 2))))
            raise ValueError(f"a task reward of pair {pair} is not finite")
        returns = rewards.sum(2)  # [N, 2]
        skip, equal = self._thresholds(query.mean_task_reward * rewards.shape[2])
        given = returns.max(1) > skip
        labels = self._choose(rewards)
        labels[np.abs(returns[:, 0] - returns[:, 1]) < equal] = 0.5
        self._queries += 1
        self._metrics = _effective_rates(returns, labels, given)
        return Answer(torch.from_numpy(labels.astype(np.float32)), torch.from_numpy(given))

    def _thresholds(self, base: float) -> tuple[float, float]:
        """What a return must exceed not to be skipped, and a difference reach not to be equal; ∓inf: switched off."""
        power = 2 if self.bpref_compat and self._queries > 0 else 1
        skip, equal = (share**power * base if base > 0 else 0.0 for share in (self.skip, self.equal))
        return (skip if skip > 0 else -math.inf), (equal if equal > 0 else -math.inf)

    def _choose(self, rewards: np.ndarray) -> np.ndarray:
        """Steps 3 to 5: labels 1 or 0, float64 [N]."""
        size, _, length = rewards.shape
        weighted = rewards @ self.gamma ** np.arange(length - 1, -1, -1.0)  # [N, 2]
        gap = weighted[:, 0] - weighted[:, 1]
        chance, slip = self._rng.random((2, size))  # always drawn, so that options do not shift each other's numbers
        if self.beta > 0:
            scale = weighted.std() if self.beta_per_std and size else 1.0
            # u < sigmoid(x) is log(u / (1 - u)) < x, which cannot overflow
            with np.errstate(divide="ignore"):
                first = np.log(chance) - np.log1p(-chance) < self.beta * gap / (scale or 1.0)
        else:
            first = gap >= 0
        return (first ^ (slip < self.mistake)).astype(np.float64)

    def metrics(self) -> dict[str, float]:
        """What the teacher did to the last query, against the true order of undiscounted returns.

        `teacher/skip_rate`: pairs skipped / pairs asked. `teacher/equal_rate`: pairs answered 0.5 / pairs answered.
        `teacher/error_rate`: wrong answers / pairs answered 0 or 1 whose returns differ. A rate whose denominator is
        zero is absent.
        """
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rng": self._rng.bit_generator.state, "queries": self._queries, "metrics": self.metrics()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._queries, self._metrics = state["queries"], state["metrics"]


def _effective_rates(returns: np.ndarray, labels: np.ndarray, given: np.ndarray) -> dict[str, float]:
    truth = np.sign(returns[:, 0] - returns[:, 1])  # 1: first better, -1: second
    equal = given & (labels == 0.5)
    decided = given & (labels != 0.5) & (truth != 0)
    wrong = decided & ((labels == 1) != (truth > 0))
    rates = (("skip", ~given, len(given)), ("equal", equal, given.sum()), ("error", wrong, decided.sum()))
    return {f"teacher/{name}_rate": float(hits.sum() / of) for name, hits, of in rates if of}
