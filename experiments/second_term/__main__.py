"""`python -m experiments.second_term WHAT`: the CSVs behind docs/second-term.md (its tables: `experiments.tables`).

exact: estimators against central differences; sampled: against the truth by size; robot RUN: on a run's rollouts;
gate: how often it opens.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.curves import write
from experiments.second_term import opening, robot, tabular

OUT = Path("experiments/results/second-term")
ROBOT_COLUMNS = (
    "env",
    "trained_steps",
    "answers",
    "estimator",
    "steps",
    "stretch",
    "seconds",
    "split_cosine",
    "cosine_to_term_1",
    "norm_over_term_1",
    "converged",
    "value_accuracy",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.second_term",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["exact", "sampled", "robot", "gate"])
    parser.add_argument("run", type=Path, nargs="?", help="robot: a run's folder with a checkpoint; it is copied first")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000], help="environment steps")
    parser.add_argument("--blocks", type=int, default=32, help="robot: thousands of steps to roll out")
    parser.add_argument("--most", type=int, default=8, help="robot: stretches of each size at the most")
    names = list(robot.SETTINGS)
    parser.add_argument("--estimators", nargs="+", choices=names, default=names, help="robot: only these")
    parser.add_argument("--repeats", type=int, default=30, help="sampled: estimates of each size")
    parser.add_argument("--seeds", type=int, default=20, help="exact, sampled: random MDPs")
    parser.add_argument("--out", type=Path, help=f"CSV; by default in {OUT}")
    chosen = parser.parse_args(arguments)
    columns: tuple[str, ...]
    torch.set_num_threads(1)
    if chosen.what == "robot":
        if chosen.run is None or not (chosen.run / "checkpoints").is_dir():
            parser.error(f"robot needs a run's folder with a checkpoint; {chosen.run} is none")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(chosen.run, Path(folder) / chosen.run.name))
            rows = robot.study(copy, chosen.sizes, chosen.blocks, chosen.most, chosen.estimators)
        columns, name = ROBOT_COLUMNS, f"{rows[0]['env']}.csv"
        rows = [{key: row.get(key, "") for key in columns} for row in rows]
    elif chosen.what == "gate":
        rows, name = opening.simulated(2000), "gate.csv"
        columns = tuple(rows[0])
    elif chosen.what == "exact":
        rows, columns, name = tabular.exact(chosen.seeds), ("estimator", "seed", "relative_error"), "exact.csv"
    else:
        rows, name = tabular.sampled(tuple(chosen.sizes), chosen.repeats, chosen.seeds), "sampled.csv"
        columns = tuple(rows[0])
        for row in rows:
            print(row)
    write(chosen.out or OUT / name, columns, rows)


if __name__ == "__main__":
    main()
