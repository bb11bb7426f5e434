"""How often the gate opens on noise, and how soon on agreement: simulated pairs of estimates.

An estimate is a signal along one axis plus standard normal noise in d dimensions; what a reward's gradient has of
those is few, as most of it lies along a few directions. The signal is set so that the expected cosine is the one named.
"""

from __future__ import annotations

import numpy as np

from pbrl.second_term.gate import Gate

DIMENSIONS = (1, 3, 8, 20)
UPDATES = {0.0: (10, 50, 200), 0.3: (10, 20, 30), 0.6: (5, 10, 20)}  # true cosine: after how many updates


def cosines(rng: np.random.Generator, runs: int, updates: int, dimensions: int, signal: float) -> np.ndarray:
    """Of two independent estimates at each update, float64 [runs, updates]."""

    def estimate() -> np.ndarray:
        drawn = rng.standard_normal((runs, updates, dimensions))
        drawn[..., 0] += signal
        return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)

    return (estimate() * estimate()).sum(-1)


def signal_for(cosine: float, dimensions: int) -> float:
    """By bisection on 60,000 draws."""
    low, high = 0.0, 20.0
    for _ in range(20):
        middle = (low + high) / 2
        found = cosines(np.random.default_rng(0), 1000, 60, dimensions, middle).mean()
        low, high = (middle, high) if found < cosine else (low, middle)
    return low


def opened(found: np.ndarray) -> np.ndarray:
    """Whether the gate had been open by each update: bool [runs, updates]."""
    states = []
    for run in found:
        gate = Gate()
        states.append([gate.observe(float(cosine)) for cosine in run])
    return np.logical_or.accumulate(np.array(states), axis=1)


def simulated(runs: int) -> list[dict]:
    """Share of runs in which the gate opened."""
    rows = []
    for dimensions in DIMENSIONS:
        for cosine, updates in UPDATES.items():
            signal = signal_for(cosine, dimensions) if cosine else 0.0
            ever = opened(cosines(np.random.default_rng(1), runs, updates[-1], dimensions, signal))
            rows += [
                {"dimensions": dimensions, "true_cosine": cosine, "updates": n, "opened": float(ever[:, n - 1].mean())}
                for n in updates
            ]
    return rows
