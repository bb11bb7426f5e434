"""What the agent is paid from the members' rewards: caution and curiosity in one place.

An agent climbs its learned reward wherever that is too high, which answers about other steps never correct: where the
members disagree, caution pays less than their mean. RUNE (Liang et al., ICLR 2022) pays more there, for exploration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pbrl.checks import check

Values = TypeVar("Values", np.ndarray, Tensor)


@dataclass(frozen=True)
class Pay:
    """The agent's pay at environment step t, for new and relabelled steps alike.

        pay(s, a) = low_n(r_1, …, r_M) + (β (1 − ρ)^t − k (1 − δ)^t) · std_m r_m(s, a)

    low_n is the lowest of n members drawn at random without replacement, in expectation over the draw (a draw of its
    own for each step would be noise that the replay keeps until it is relabelled): the mean for n = 1, the minimum for
    n = M. std is the members' own deviation (divided by M). With β = k the pay turns from the mean to caution.

    With a convexity c > 0 the pay is (exp(c·x) − 1) / c of that x. Answers tell which clip is better, not by how much:
    what a reward fitted to them adds for the best steps is as little as orders the clips, and an agent paid so little
    more for them stays at what it does surely (docs/campaign.md, section 9, AK). It keeps the order of the steps.

    Where β or k decays the replay keeps low_n and std apart, and each update of the agent weighs them anew at its own
    step (RUNE, as published).

    Args:
        pessimism: k ≥ 0. pessimism_decay: δ in [0, 1), per environment step; 0: fixed.
        lowest_of: n ≥ 1.
        disagreement_bonus: β ≥ 0, RUNE's. disagreement_decay: ρ in [0, 1), per environment step.
        convexity: c ≥ 0; 0: x itself.

    Raises:
        ValueError: for a number out of range, or a convexity of a pay that moves.
    """

    pessimism: float = 0.0
    pessimism_decay: float = 0.0
    lowest_of: int = 1
    disagreement_bonus: float = 0.0
    disagreement_decay: float = 1e-5
    convexity: float = 0.0

    def __post_init__(self) -> None:
        check(
            "reward",
            pessimism=(self.pessimism, self.pessimism >= 0, "at least 0"),
            pessimism_decay=(self.pessimism_decay, 0 <= self.pessimism_decay < 1, "a share in [0, 1)"),
            lowest_of=(self.lowest_of, self.lowest_of >= 1, "at least 1"),
            disagreement_bonus=(
                self.disagreement_bonus,
                self.disagreement_bonus >= 0,
                "at least 0 (reward.pessimism pays less)",
            ),
            disagreement_decay=(self.disagreement_decay, 0 <= self.disagreement_decay < 1, "a share in [0, 1)"),
            convexity=(
                self.convexity,
                self.convexity == 0 or (self.convexity > 0 and not self.moves),
                "at least 0, and 0 where reward.pessimism or reward.disagreement_bonus decays",
            ),
        )

    @property
    def compares(self) -> bool:
        """Whether it depends on how the members differ, so that one member alone would make no sense."""
        return bool(self.pessimism or self.disagreement_bonus or self.lowest_of > 1)

    @property
    def moves(self) -> bool:
        """Whether the same step is paid otherwise later on, by the same members."""
        decays = (self.disagreement_bonus, self.disagreement_decay), (self.pessimism, self.pessimism_decay)
        return any(size and decay for size, decay in decays)

    def weight(self, step: int) -> float:
        """What one deviation adds at environment step `step`: positive pays for disagreement, negative charges it."""
        bonus = self.disagreement_bonus * (1 - self.disagreement_decay) ** step
        return bonus - self.pessimism * (1 - self.pessimism_decay) ** step

    def __call__(self, rewards: np.ndarray, step: int) -> np.ndarray:
        """Pay for the members' rewards, float32 [M, N], at environment step `step`: float32 [N].

        Raises:
            ValueError: if there are fewer than `lowest_of` members.
        """
        pay, weight = self._low(rewards), self.weight(step)
        return self.convex(pay + np.float32(weight) * rewards.std(axis=0) if weight else pay)

    def convex(self, pay: Values) -> Values:
        """(exp(c·x) − 1) / c of each x, float of any shape; of a tensor with its graph."""
        expm1 = torch.expm1 if isinstance(pay, Tensor) else np.expm1
        return expm1(self.convexity * pay) / self.convexity if self.convexity else pay

    def apart(self, rewards: np.ndarray) -> np.ndarray:
        """low_n and std for the members' rewards, float32 [M, N]: float32 [2, N]. The pay is low_n + weight · std.

        Raises:
            ValueError: if there are fewer than `lowest_of` members.
        """
        return np.stack([self._low(rewards), rewards.std(axis=0)])

    def _low(self, rewards: np.ndarray) -> np.ndarray:
        if self.lowest_of == 1:
            return rewards.mean(axis=0)
        return self.shares(len(rewards)) @ np.sort(rewards, axis=0)

    def shares(self, members: int) -> np.ndarray:
        """Weight of each of the sorted members, the lowest first, in low_n: float32 [M].

        The i-th lowest of M is the lowest of n with probability C(M − i, n − 1) / C(M, n).

        Raises:
            ValueError: if there are fewer than `lowest_of` members.
        """
        n = self.lowest_of
        if n > members:
            raise ValueError(f"reward.lowest_of={n} of reward.members={members}; expected at most as many")
        chances = [math.comb(members - i, n - 1) / math.comb(members, n) for i in range(1, members + 1)]
        return np.array(chances, np.float32)
