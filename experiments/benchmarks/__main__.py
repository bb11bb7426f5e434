"""`python -m experiments.benchmarks [names…]`: prints each benchmark and stores experiments/results/benchmarks/*.json.

Names: see BENCHMARKS and SCRIPTS; none: all. Ratios (`ratio_…`) are of interleaved medians in one run; `cpu` is
processor time, which other processes disturb less than wall time; `crowded` is the share of samples taken while others
used the cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks import end_to_end, kinds, labelling, parts, timing, update
from experiments.benchmarks.timing import machine, store

BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "update": update.run,
    "kinds": kinds.run,
    "simulators": end_to_end.simulators,
    "pay": parts.pay,
    "reward_training": parts.reward_training,
    "entropy": parts.entropy,
    "replay": parts.replay,
    "end_to_end": end_to_end.run,
    "labelling": labelling.run,
}
SCRIPTS = ("k_center", "reward_update", "checkpoint")  # with options of their own; run here with their defaults


def table(rows: list[dict[str, Any]]) -> str:
    """The rows under their column names, numbers to three digits."""
    shown = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in shown)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS, *SCRIPTS], help="none: all")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each variant")
    parser.add_argument("--seconds", type=float, default=0.2, help="processor time of one sample")
    options = parser.parse_args()
    names = options.names or [*BENCHMARKS, *SCRIPTS]
    timing.rounds_and_seconds[:] = [options.rounds, options.seconds]
    torch.set_num_threads(1)
    print(machine())
    for name in names:
        if name in SCRIPTS:
            print(f"\n{name}", flush=True)
            subprocess.run([sys.executable, "-m", f"experiments.benchmarks.{name}"], check=True)
            continue
        rows = BENCHMARKS[name]()
        store(name, rows)
        print(f"\n{name}\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
