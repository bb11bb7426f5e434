"""Why the agent goes where it has not been: novelty, before any answer (PEBBLE §4.1), and noise that has a memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbrl.agent.replay import RelabelReplay
from pbrl.nearest import nearest_distances
from pbrl.standardise import CONSTANT

SLIGHT = 0.01  # standardised, the observations' spread along a direction below which it does not count: rounding
GROWTH = 1.1  # the directions are found anew when the replay has grown by so much


def principal_units(stored: Tensor) -> Tensor:
    """What takes observations to their principal directions, each in units of its own spread.

    The directions are those of the standardised observations: a dimension with a deviation below `CONSTANT` and a
    direction along which they vary by less than `SLIGHT` do not count.

    Args:
        stored: float32 [N, obs_dim].

    Returns:
        float32 [obs_dim, D], D ≤ obs_dim: (a − b) @ it has a norm that is the Mahalanobis distance of a and b.
    """
    deviation, mean = torch.std_mean(stored.double(), dim=0, unbiased=False)
    moving = deviation > CONSTANT
    scaled = ((stored.double() - mean) / deviation)[:, moving]
    variances, directions = torch.linalg.eigh(scaled.T @ scaled / len(stored))
    kept = variances > SLIGHT**2
    units = torch.zeros(stored.shape[1], int(kept.sum()), dtype=torch.float64)
    units[moving] = directions[:, kept] / variances[kept].sqrt() / deviation[moving][:, None]
    return units.float()


class StateEntropy:
    """Pays each observation its distance d to the k-th nearest stored one, divided by the running standard deviation.

    PEBBLE eq. (4) without the logarithm, as in its published code; the running moments are Chan et al.'s exact ones
    (the published ones have a slip in the mean). Distances are to all observations stored so far.

    In observations as they are the distance is mostly that of what moves most, a robot's hand; whitened it is as much
    that of what moves seldom, such as what the hand should move (docs/campaign.md, section 9, AO).

    Args:
        replay: where the observations are stored.
        nearest: k ≥ 1.
        bounded: pay clip((d − mean) / (3 std), −1, 1) instead, which a reward network can represent (RIME).
        whiten: distances in `principal_units` of the replay, found anew whenever it has grown by a tenth.
    """

    def __init__(self, replay: RelabelReplay, nearest: int = 5, bounded: bool = False, whiten: bool = False) -> None:
        self.replay, self.nearest, self.bounded, self.whiten = replay, nearest, bounded, whiten
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0
        self.units, self.measured = torch.empty(0), 0  # of so many observations

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """Bonus of a batch of observations: float32 [B]."""
        if self.replay.size() <= self.nearest:
            return torch.zeros(len(obs), device=obs.device)
        distances = self.distances(obs.cpu(), self.nearest)
        self._count(distances.double())
        std = (self.squares / self.count) ** 0.5
        if self.bounded:
            return ((distances - self.mean) / max(3 * std, 1e-8)).clamp(-1, 1).to(obs.device)
        return (distances / std if std > 0 else distances).to(obs.device)

    def distances(self, obs: Tensor, nearest: int) -> Tensor:
        """Of each observation, float32 [B, obs_dim], to its `nearest`-th nearest stored one: float32 [B]."""
        stored = torch.from_numpy(self.replay.observations[: self.replay.size(), 0])
        if self.whiten:
            if len(stored) >= GROWTH * self.measured:
                self.units, self.measured = principal_units(stored), len(stored)
            obs, stored = obs @ self.units, stored @ self.units
        return nearest_distances(obs, stored, nearest)

    def _count(self, values: Tensor) -> None:
        size, mean = len(values), float(values.mean())
        delta, total = mean - self.mean, self.count + size
        self.squares += float((values - mean).square().sum()) + delta**2 * self.count * size / total
        self.mean += delta * size / total
        self.count = total

    def state(self) -> dict[str, Any]:
        """The running moments, and the units."""
        moments = {"count": self.count, "mean": self.mean, "squares": self.squares}
        return moments | {"units": self.units.tolist(), "measured": self.measured}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
        self.units, self.measured = torch.tensor(state.get("units", [])), state.get("measured", 0)  # {}: older runs


def colored_noise(color: float, steps: int, dims: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian sequences whose power falls as 1/f^color, drawn by their Fourier coefficients (Timmer & König, 1995).

    The mean of a sequence varies as its slowest wave does, so that each entry alone is a draw from N(0, 1).

    Args:
        color: 0: white, independent in time; 1: pink; 2: red.
        steps: length. dims: how many independent sequences.

    Returns:
        float32 [steps, dims].
    """
    frequencies = np.fft.rfftfreq(steps)
    frequencies[0] = 1 / steps
    scale = frequencies ** (-color / 2)
    # waves without a phase: the mean and, of an even number, the fastest
    alone = np.isin(2 * np.arange(len(scale)), (0, steps))
    real, imaginary = rng.standard_normal((2, len(scale), dims)) * scale[:, None]
    coefficients = np.where(alone[:, None], np.sqrt(2) * real, real + 1j * imaginary)
    variance = (np.where(alone, 2, 4) * scale**2).sum() / steps**2
    return (np.fft.irfft(coefficients, n=steps, axis=0) / np.sqrt(variance)).astype(np.float32)


class ColoredNoise:
    """Noise for the actions of one episode after another: `colored_noise`, a new sequence for each episode.

    Eberhard et al., "Pink Noise Is All You Need" (ICLR 2023): at each step the policy's own Gaussian, so that a
    transition is as likely as ever; over an episode the hand drifts where independent draws would undo each other.

    Args:
        color: see `colored_noise`.
        steps: of an episode; a longer one goes on with another sequence.
        dims: of an action.
        seed: of a generator of its own.
    """

    def __init__(self, color: float, steps: int, dims: int, seed: np.random.SeedSequence) -> None:
        self.color, self.rng = color, np.random.default_rng(seed)
        self.sequence, self.used = np.zeros((steps, dims), np.float32), steps

    def next(self) -> np.ndarray:
        """The noise of the next step: float32 [dims]."""
        if self.used == len(self.sequence):
            self.sequence, self.used = colored_noise(self.color, *self.sequence.shape, self.rng), 0
        self.used += 1
        return self.sequence[self.used - 1]

    def restart(self) -> None:
        """A new episode begins."""
        self.used = len(self.sequence)

    def state(self) -> dict[str, Any]:
        """Generator, sequence and place in it."""
        return {
            "rng": self.rng.bit_generator.state,
            "sequence": torch.from_numpy(self.sequence.copy()),
            "used": self.used,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.rng.bit_generator.state = state["rng"]
        self.sequence, self.used = state["sequence"].numpy().copy(), state["used"]
