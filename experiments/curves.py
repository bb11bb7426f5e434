"""Keep the curves of finished runs in git: `python -m experiments.curves RUNS… --out experiments/results/NAME.csv`.

One row per evaluation: run, method, env, teacher, seed, env_step, return, success, labels, and the commit and command
of the run. With `--oracle` the mean over the runs goes to pbrl/oracles/<env>.csv, from where every run
reads its `eval/oracle_return`. With `--keep FOLDER` the runs themselves go there without what is large (checkpoints,
steps, training rows): `python -m pbrl.compare FOLDER` reads them.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

import pbrl
from pbrl.comparing.tables import neutral
from pbrl.launch.stored import command_of

COLUMNS = ("run", "env", "updater", "query", "teacher", "seed", "env_step", "return", "success", "labels")
ORACLE = pbrl.ORACLES


def curve(run: Path) -> list[dict[str, Any]]:
    """One row per evaluation of the run, with the labels given until then."""
    config = OmegaConf.load(run / "config.yaml")
    origin = {
        "run": run.name,
        **{key: config.choices[key] for key in ("env", "updater", "query", "teacher")},
        "seed": config.seed,
        "commit": json.loads((run / "versions.json").read_text())["commit"],
        "command": command_of(run),
    }
    labels, rows = 0, []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        labels = row.get("feedback/labels", labels)
        if "eval/return" in row:
            measured = {"return": round(row["eval/return"], 3), "success": row.get("eval/success"), "labels": labels}
            rows.append({**origin, "env_step": row["env_step"], **measured})
    return rows


def write(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: neutral(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows)
    print(path)


def clash(runs: Sequence[Path], folder: Path) -> str | None:
    """What is wrong if `keep` would put one of the runs in another's place in `folder`: one line that names both."""
    taken: dict[str, Path] = {}
    for run in runs:
        other, kept = taken.setdefault(run.name, run), folder / run.name
        if other.resolve() != run.resolve():
            return f"{other} and {run} would both be kept as {kept}; rename one"
        if (kept / "config.yaml").exists() and (kept / "config.yaml").read_bytes() != (
            run / "config.yaml"
        ).read_bytes():
            return f"{run} would be kept in the place of {kept}, which holds a run of another config; rename one"
    return None


def keep(run: Path, folder: Path) -> None:
    """Copy to folder/<run's name> what `pbrl.compare` reads: its config, origin, and evaluation and session rows."""
    target = folder / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "command.txt", "versions.json", "summary.json"):
        shutil.copyfile(run / name, target / name)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    wanted = [line for line in lines if {"eval/return", "feedback/session"} & set(json.loads(line))]
    (target / "metrics.jsonl").write_text("".join(wanted))
    print(target)


def oracle(rows: list[dict[str, Any]]) -> None:
    """Mean over runs at each step that all runs of an environment have reached."""
    by_env: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_env[row["env"]][row["env_step"]].append(row)
    for env, steps in by_env.items():
        count = max(len(found) for found in steps.values())
        means = []
        for step, found in sorted(steps.items()):
            if len(found) == count:
                success = [row["success"] for row in found]
                mean = None if None in success else float(np.mean(success))
                means.append(
                    {"env_step": step, "return": float(np.mean([r["return"] for r in found])), "success": mean}
                )
        write(ORACLE / f"{env}.csv", ("env_step", "return", "success"), means)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="CSV of all evaluations")
    parser.add_argument("--oracle", action="store_true", help="also write the mean as the oracle's curve")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="also keep the runs there, without what is large")
    options = parser.parse_args(arguments)
    if options.keep and (reason := clash(options.runs, options.keep)):
        parser.error(f"--keep: {reason}")
    rows = [row for run in options.runs for row in curve(run)]
    if options.out:
        write(options.out, (*COLUMNS, "commit", "command"), rows)
    if options.keep:
        for run in options.runs:
            keep(run, options.keep)
    if options.oracle:
        oracle(rows)


if __name__ == "__main__":
    main()
