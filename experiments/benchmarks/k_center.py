"""How much an incremental k-centre saves over computing all distances again for every pick.

    python -m experiments.benchmarks.k_center [--pairs 50] [--pool 10] [--known 100 500 2000] [--obs-dim 39]

Both pick the same pairs (checked). Segments have 50 steps. Prints seconds and the ratio; best of `--repeats`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from pbrl.queries import k_center

HORIZON = 50  # environment steps per segment

Features = tuple[np.ndarray, np.ndarray]


def recomputed(candidates: Features, known: Features, count: int) -> np.ndarray:
    """Farthest-first, the distances to all centres computed anew for each pick (as published, but vectorised)."""
    total, difference = candidates
    left, centres = np.arange(len(total)), known
    picks = []
    for _ in range(count):
        norms = [(f**2).sum(axis=1) for f in (total[left], difference[left], *centres)]
        squares = (norms[0] + norms[1])[:, None] + (norms[2] + norms[3])[None]
        squares -= 2 * total[left] @ centres[0].T + 2 * np.abs(difference[left] @ centres[1].T)
        best = left[int(squares.min(axis=1).argmax())]
        picks.append(best)
        left = left[left != best]
        centres = tuple(np.concatenate([c, f[best : best + 1]]) for c, f in zip(centres, candidates, strict=True))  # type: ignore[assignment]
    return np.array(picks)


def features(count: int, size: int, rng: np.random.Generator) -> Features:
    """Random pairs' sums and differences, float32 [count, size] each."""
    first, second = (rng.standard_normal((count, size), dtype=np.float32) for _ in range(2))
    return first + second, first - second


def seconds(run: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """Best time of several, and what the run returned."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = run()
        times.append(time.perf_counter() - start)
    return min(times), found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50, help="asked per session")
    parser.add_argument("--pool", type=int, default=10, help="candidates per pair asked")
    parser.add_argument("--known", type=int, nargs="+", default=[100, 500, 2000], help="pairs asked before")
    parser.add_argument("--obs-dim", type=int, default=39, help="Meta-World: 39, walker: 24")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    print(f"{options.pairs} of {options.pairs * options.pool} candidates, {options.obs_dim} numbers an observation")
    for count in options.known:
        candidates = features(options.pairs * options.pool, HORIZON * options.obs_dim, rng)
        known = features(count, HORIZON * options.obs_dim, rng)
        fast, picks = seconds(lambda c=candidates, k=known: k_center(c, k, options.pairs), options.repeats)  # type: ignore[misc]
        slow, expected = seconds(lambda c=candidates, k=known: recomputed(c, k, options.pairs), 1)  # type: ignore[misc]
        if picks.tolist() != expected.tolist():
            raise AssertionError("the two pick different pairs")
        print(
            f"{count:6} known   incremental {fast:7.3f} s   recomputed {slow:7.3f} s   {slow / fast:6.1f} times faster"
        )


if __name__ == "__main__":
    main()
