"""When the second term of a hypergradient may touch the reward: only while two disjoint estimates of it agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pbrl.checks import check


@dataclass
class Gate:
    """Opens on evidence that the two halves agree by more than chance; a sequential test with an error budget.

    The null hypothesis is that the halves' cosine c has expectation 0 or less at every update, given the past: what
    independent noise gives whose direction is not known beforehand. The evidence is the wealth of a bet against it,

        E ← min(E (1 + stake · c), 1 / error),   E = 1 at the start,   open while E = 1 / error.

    Under the null E is a supermartingale, so it reaches 1 / error in a run of whatever length with probability `error`
    at most (Ville's inequality; betting: Waudby-Smith and Ramdas, JRSS B 2024). The cap costs no validity, and lets
    one disagreement close the gate.

    Args:
        error: probability in (0, 1) of ever opening on noise, however many updates a run has.
        stake: share in (0, 1) of the evidence that is bet on each update's cosine. More opens sooner on strong
            agreement; the losses on noise grow with its square. 0.8 is near the best for cosines of 0.3 and of 0.6.

    Raises:
        ValueError: for a number out of range.
    """

    error: float = 0.05
    stake: float = 0.8
    evidence: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        check(
            "gate",
            error=(self.error, 0 < self.error < 1, "a number between 0 and 1"),
            stake=(self.stake, 0 < self.stake < 1, "a number between 0 and 1"),
        )

    def observe(self, cosine: float) -> bool:
        """Take in this update's split-half cosine; whether the gate is open now.

        nan (there was no estimate) leaves the evidence as it is, and the gate closed for this update.
        """
        if not math.isfinite(cosine):
            return False
        self.evidence = min(self.evidence * (1 + self.stake * cosine), 1 / self.error)
        return self.evidence >= 1 / self.error


def as_gate(value: Gate | str | bool | None) -> Gate | None:
    """A gate, or None where the config says `gate: off` (YAML reads that as False): the term is then always applied.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, Gate):
        return value
    if value in ("off", False):
        return None
    raise ValueError(f"updater.gate={value!r}; expected off, or error and stake of second_term.gate.Gate")


def as_limit(value: float | str) -> float:
    """A positive number; the command line's `.inf` arrives as text.

    Raises:
        ValueError: for anything else.
    """
    limit = math.inf if value in ("inf", ".inf") else value
    if not isinstance(limit, int | float) or not limit > 0:
        raise ValueError(f"updater.clip={value}; expected a positive multiple of Term 1's norm, or .inf")
    return float(limit)
