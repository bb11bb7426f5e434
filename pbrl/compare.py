"""Compare finished runs: `python -m pbrl.compare RUNS… [--wandb ENTITY/PROJECT] [--out DIR]`.

Reads the runs (`comparing.runs`), puts them on common axes (`comparing.curves`), computes every number into tables
(`comparing.tables`, one CSV each) and draws and prints those tables (`comparing.plots`, `comparing.report`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pbrl import ORACLES
from pbrl.comparing.curves import Comparison, gather
from pbrl.comparing.report import write_report
from pbrl.comparing.runs import ComparisonError, find_runs, select, wandb_runs, without_copies
from pbrl.comparing.tables import all_tables, write_tables
from pbrl.launch.shipped import changed


def add_run_options(options: argparse.ArgumentParser) -> None:
    """The options that say which runs are compared and how they are grouped and scored."""
    options.add_argument("runs", nargs="*", type=Path, metavar="RUNS", help="run folders, or folders that hold runs")
    options.add_argument("--wandb", metavar="ENTITY/PROJECT", help="also the runs of this W&B project")
    options.add_argument(
        "--allow-mixed", action="store_true", help="keep unfinished runs and different budgets or steps"
    )
    options.add_argument(
        "--method-keys",
        type=lambda text: text.split(","),
        metavar="KEYS",
        help="what tells methods apart: choices or config paths, such as updater,query,feedback.budget "
        "(default: updater, and those of query, teacher, agent, reward whose options differ)",
    )
    options.add_argument("--metric", choices=("auto", "return", "success"), default="auto", help="what scores a run")
    options.add_argument("--baseline", default="pebble", help="the method others are compared to (default: pebble)")
    options.add_argument(
        "--oracle-dir",
        type=Path,
        default=ORACLES,
        help="stored oracle curves, <env>.csv (default: those in pbrl/oracles)",
    )
    options.add_argument(
        "--repetitions",
        type=int,
        default=2000,
        help="of the bootstrap, where every method has ten runs (default: 2000)",
    )


def read_comparison(arguments: argparse.Namespace) -> Comparison:
    """Read, select and align the runs named on the command line.

    Raises:
        ComparisonError: if there are none, or they cannot be read or compared.
    """
    if not arguments.runs and not arguments.wandb:
        raise ComparisonError("no runs given: name run folders, or a project with --wandb ENTITY/PROJECT")
    damaged: list[str] = []
    runs = find_runs(arguments.runs, damaged)
    if arguments.wandb:
        runs = without_copies(runs, wandb_runs(arguments.wandb, foreign=damaged), damaged)
        if damaged and not runs:
            raise ComparisonError("no run can be read\n  " + "\n  ".join(damaged))
    selection = select(runs, arguments.method_keys, arguments.allow_mixed, arguments.baseline)
    folder, other = arguments.oracle_dir, changed if arguments.oracle_dir == ORACLES else None  # one's own are trusted
    data = gather(selection, folder, arguments.metric, arguments.baseline, arguments.repetitions, other)
    data.notes[:0] = damaged
    return data


def main(argv: Sequence[str] | None = None) -> None:
    """Write CSVs, figures and both reports, and say where."""
    options = argparse.ArgumentParser(prog="python -m pbrl.compare", description="Compare finished runs.")
    add_run_options(options)
    options.add_argument("--out", type=Path, default=Path("comparison"), help="folder to write (default: comparison)")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = options.parse_args(words)
    try:
        data = read_comparison(arguments)
    except ComparisonError as error:
        sys.exit(f"pbrl.compare: {error}")
    tables = all_tables(data)
    write_tables(tables, arguments.out)
    write_report(data, tables, arguments.out, shlex.join(["python", "-m", "pbrl.compare", *words]))
    for note in data.notes:
        print(f"note: {note}")
    print(f"{len(tables['runs'])} runs compared in {arguments.out}: report.html, report.md, *.csv, figures/")


if __name__ == "__main__":
    main()
