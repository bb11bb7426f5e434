"""Claim (vii): what following the exact hypergradient does to the true return, on an enumerated 5×5 grid world.

Deterministic moves, no discount, a reward per cell: the soft-optimal policy draws a trajectory from its start cell with
probability proportional to exp(R_phi / alpha), so policy, objective and gradients are closed forms (docs/theory.md).
Trajectories that visit the same cells equally often have the same return under every reward and are counted together.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logsumexp

from experiments.theory.report import COLOURS, Finding, Result, interval

Array = NDArray[np.float64]
SIDE = 5  # cells
METHODS = {
    "off_policy": "Term 1, pairs of a uniform policy",
    "on_policy": "Term 1, on-policy pairs",
    "full": "full hypergradient (exact)",
    "win_rate": "win-rate utility (exact)",
}


@dataclass(frozen=True)
class Grid:
    """K groups of trajectories; those of one start cell beside each other."""

    visits: Array  # [K, 25]: how often each cell is entered
    log_count: Array  # [K]: log of the number of trajectories in the group
    start: NDArray[np.int64]  # [K]: index of the start cell
    task_reward: Array  # [25]
    prefers: Array  # [K, K]: y, 1 where the teacher prefers row to column, 0.5 for equals
    alpha: float

    def policy(self, phi: Array) -> Array:
        """P(group) of the soft-optimal policy for phi, start cells equally likely: [K], sums to 1."""
        score = self.log_count + self.visits @ phi / self.alpha
        p = np.empty_like(score)
        for s in range(self.start.max() + 1):
            rows = self.start == s
            p[rows] = np.exp(score[rows] - logsumexp(score[rows])) / (self.start.max() + 1)
        return p

    def true_return(self, p: Array) -> float:
        """Expected task return, scaled so that the uniform policy has 0 and the best trajectories have 1."""
        returns = self.visits @ self.task_reward
        best = np.mean([returns[self.start == s].max() for s in range(self.start.max() + 1)])
        uniform = self.policy(np.zeros(SIDE**2)) @ returns
        return float((p @ returns - uniform) / (best - uniform))


def grid(seed: int, *, teacher: str = "exact", horizon: int = 4, starts: int = 2, alpha: float = 0.5) -> Grid:
    """A grid world with normal cell rewards and `starts` random start cells.

    The "exact" teacher compares true returns without error, the "noisy" one after Bradley and Terry.
    """
    rng = np.random.default_rng(seed)
    task_reward = rng.normal(size=SIDE**2)
    visits, log_count, start = [], [], []
    for index, cell in enumerate(rng.choice(SIDE**2, size=starts, replace=False)):
        groups, counts = np.unique(trajectories(int(cell), horizon), axis=0, return_counts=True)
        visits.append(groups)
        log_count.append(np.log(counts))
        start.append(np.full(len(groups), index))
    stacked = np.concatenate(visits).astype(float)
    returns = stacked @ task_reward
    better = np.round(returns[:, None] - returns[None, :], 9)
    prefers = expit(better) if teacher == "noisy" else 0.5 + 0.5 * np.sign(better)
    return Grid(stacked, np.concatenate(log_count), np.concatenate(start), task_reward, prefers, alpha)


def trajectories(cell: int, horizon: int) -> NDArray[np.int64]:
    """Cell counts of all 4^horizon move sequences from `cell`; a move into the wall stays: [4^horizon, 25]."""
    found = np.zeros((4**horizon, SIDE**2), dtype=np.int64)
    for row, moves in enumerate(itertools.product(((0, 1), (0, -1), (1, 0), (-1, 0)), repeat=horizon)):
        y, x = divmod(cell, SIDE)
        for dy, dx in moves:
            y, x = min(max(y + dy, 0), SIDE - 1), min(max(x + dx, 0), SIDE - 1)
            found[row, SIDE * y + x] += 1
    return found


def preference(world: Grid, phi: Array, p: Array) -> float:
    """G: expected log-likelihood of the labels of pairs drawn from p."""
    return float(p @ _log_likelihood(world, phi) @ p)


def hypergradient(world: Grid, phi: Array, method: str) -> Array:
    """The direction in which `method` moves phi: [25]."""
    p = _pairs(world, phi, method)
    if method == "win_rate":
        # (1/alpha) Cov(w, dR/dphi | s0), both segments from one start cell; mean over start cells
        same = world.start[:, None] == world.start[None, :]
        win = (world.prefers * same) @ p / np.bincount(world.start, p)[world.start]
        return world.visits.T @ (p * _centred(world, win, p)) / world.alpha
    returns = world.visits @ phi
    # f is symmetric in the pair, so both segments give the same gradient
    surprise = world.prefers - expit(returns[:, None] - returns[None, :])
    direct = world.visits.T @ (2 * p * (surprise @ p))
    if method != "full":
        return direct
    f_bar = _log_likelihood(world, phi) @ p
    return direct + world.visits.T @ (p * _centred(world, f_bar, p)) * (2 / world.alpha)


def _pairs(world: Grid, phi: Array, method: str) -> Array:
    return world.policy(np.zeros_like(phi) if method == "off_policy" else phi)


def _log_likelihood(world: Grid, phi: Array) -> Array:
    returns = world.visits @ phi
    difference = returns[:, None] - returns[None, :]
    return log_expit(difference) - (1 - world.prefers) * difference  # log(1 − P) = log P − difference


def _centred(world: Grid, values: Array, p: Array) -> Array:
    """values minus their mean under p within each start cell."""
    mean = np.bincount(world.start, p * values) / np.bincount(world.start, p)
    return values - mean[world.start]


def follow(world: Grid, method: str, seed: int, steps: int, lr: float, longest: float = 0.25) -> list[dict]:
    """Gradient ascent from a small random phi; no step is longer than `longest`. True return and G along the way."""
    phi = 0.1 * np.random.default_rng(1000 + seed).normal(size=SIDE**2)
    rows = []
    for step in range(steps + 1):
        if step % max(steps // 20, 1) == 0:
            p = world.policy(phi)
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "step": step,
                    "true_return": world.true_return(p),
                    "G": preference(world, phi, p),
                }
            )
        move = lr * hypergradient(world, phi, method)
        phi = phi + move * min(1.0, longest / max(float(np.linalg.norm(move)), 1e-12))
    return rows


SETTINGS = [("exact", 0.5), ("exact", 0.2), ("noisy", 0.5), ("noisy", 0.2)]  # teacher, alpha
COMPARED = [("on_policy", "off_policy"), ("full", "on_policy"), ("win_rate", "on_policy")]


def claim_vii(quick: bool = False) -> Result:
    """What following each objective's gradient does to the true return."""
    settings, seeds, steps = (SETTINGS[-1:], 10, 60) if quick else (SETTINGS, 12, 100)
    rows = []
    for (teacher, alpha), seed, method in itertools.product(settings, range(seeds), METHODS):
        path = follow(grid(seed, teacher=teacher, alpha=alpha), method, seed, steps, lr=0.15)
        rows += [{"teacher": teacher, "alpha": alpha, **row} for row in path]

    def final(name: str, method: str, setting: tuple[str, float]) -> Array:
        return np.array(
            [
                row[name]
                for row in rows
                if row["step"] == steps and row["method"] == method and (row["teacher"], row["alpha"]) == setting
            ]
        )

    findings = []
    for setting in settings:
        for method, label in METHODS.items():
            mean, low, high = interval(final("true_return", method, setting))
            g = final("G", method, setting).mean()
            findings.append(
                Finding(
                    f"{setting[0]} teacher, alpha {setting[1]:g}: {label}",
                    f"true return {mean:.2f} [{low:.2f}, {high:.2f}], G {g:.2f}",
                    "–",
                    None,
                )
            )
    for method, reference in COMPARED:
        # one number per seed: the mean over the settings, which share their worlds
        gain = np.mean([final("true_return", method, s) - final("true_return", reference, s) for s in settings], axis=0)
        mean, low, high = interval(gain)
        gamed = method == "full"
        findings.append(
            Finding(
                f"{METHODS[method]} minus {METHODS[reference]}, paired over {seeds} seeds",
                f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
                "below 0: the objective is gamed" if gamed else "–",
                high < 0 if gamed else None,
            )
        )
    gained = [final("G", "full", s) - final("G", "on_policy", s) for s in settings]
    mean, low, high = interval(np.mean(gained, axis=0))
    findings.append(
        Finding(
            "G, full hypergradient minus Term 1 on-policy",
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
            "above 0: it does raise G",
            low > 0,
        )
    )
    words = (
        "The papers' upper objective is the expected log-likelihood of the teacher's labels on the policy's *own* "
        "pairs. Its exact hypergradient raises it, as it must, and the true return falls behind that of Term 1 on "
        "the same pairs: a policy that is good throughout makes pairs nobody can tell apart, so the implicit term "
        "steers towards pairs whose labels are easy to predict instead of towards good behaviour. Fresh on-policy "
        "pairs do help Term 1 on average. The win-rate utility means what it says and is not gamed in this way; "
        "it gains most while the entropy is high (alpha 0.5), and at alpha 0.2 it ends where Term 1 on-policy "
        "ends."
    )

    def draw(axes: Axes) -> None:
        shown = settings[-1]
        for (method, label), colour in zip(METHODS.items(), COLOURS, strict=False):
            chosen = [row for row in rows if row["method"] == method and (row["teacher"], row["alpha"]) == shown]
            marks = sorted({row["step"] for row in chosen})
            stats = [interval([row["true_return"] for row in chosen if row["step"] == mark]) for mark in marks]
            axes.plot(marks, [s[0] for s in stats], color=colour, label=label)
            axes.fill_between(
                marks, [s[1] for s in stats], [s[2] for s in stats], color=colour, alpha=0.15, linewidth=0
            )
        axes.set_xlabel("reward updates")
        axes.set_ylabel(f"true return ({shown[0]} teacher, alpha {shown[1]:g})")
        axes.legend(fontsize=7, frameon=False)

    return Result("vii", "what the exact hypergradient does to the true return", findings, rows, words, draw)
