"""When the second term of a hypergradient may touch the reward: only while two disjoint estimates of it agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Gate:
    """Open while the split-half cosine exceeded `threshold` in each of the last `consecutive` updates.

    Args:
        threshold: cosine in [−1, 1) between the two estimates that must be exceeded.
        consecutive: updates in a row, ≥ 1; one disagreement closes the gate and starts the count anew.

    Raises:
        ValueError: for a number out of range.
    """

    threshold: float = 0.3
    consecutive: int = 3
    streak: int = field(default=0, init=False)  # agreeing updates in a row so far

    def __post_init__(self) -> None:
        if not -1 <= self.threshold < 1:
            raise ValueError(f"gate.threshold={self.threshold}; expected a cosine in [-1, 1)")
        if self.consecutive < 1:
            raise ValueError(f"gate.consecutive={self.consecutive}; expected at least 1 update")

    def observe(self, cosine: float) -> bool:
        """Take in this update's split-half cosine (nan: there was no estimate); whether the gate is open now."""
        self.streak = self.streak + 1 if math.isfinite(cosine) and cosine > self.threshold else 0
        return self.streak >= self.consecutive


def as_gate(value: Gate | str | bool | None) -> Gate | None:
    """A gate, or None where the config says `gate: off` (YAML reads that as False): the term is then always applied.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, Gate):
        return value
    if value in ("off", False):
        return None
    raise ValueError(f"updater.gate={value!r}; expected off, or threshold and consecutive of second_term.gate.Gate")


def as_limit(value: float | str) -> float:
    """A positive number; the command line's `.inf` arrives as text.

    Raises:
        ValueError: for anything else.
    """
    limit = math.inf if value in ("inf", ".inf") else value
    if not isinstance(limit, int | float) or not limit > 0:
        raise ValueError(f"updater.clip={value}; expected a positive multiple of Term 1's norm, or .inf")
    return float(limit)
