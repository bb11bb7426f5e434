"""Race candidates against each other: `python -m experiments.race experiments/races/agent.yaml --out FOLDER`.

Successive halving (Jamieson & Talwalkar, 2016): all candidates run for the first rung's steps with its seeds; the
better half goes on to the next rung, with more steps and seeds, and so on. A candidate is a list of overrides of
`python -m pbrl.train`; each is run on every signal (the true reward, say, and 100 answers). Its score on a signal is
the area under the curve of the true return, as a mean over evaluations and seeds, divided by the best candidate's
(where the best is negative, the best's by it); the mean over the signals decides.

All is kept in FOLDER: runs/SIGNAL/CANDIDATE-sSEED (checkpoints included, so that they go on where a rung ended),
curves.csv with every evaluation, race.json with every decision. Started again, the race goes on where it stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from experiments.curves import write

COLUMNS = ("signal", "candidate", "seed", "env_step", "return", "success", "gap")
INTERRUPTED = 130


class Rung(NamedTuple):
    """Environment steps, and how many of the seeds are run."""

    steps: int
    seeds: int


class Run(NamedTuple):
    """One candidate with one seed on one signal."""

    signal: str
    candidate: str
    seed: int


class RaceError(ValueError):
    """The race cannot be run; the message is one line."""


@dataclass
class Race:
    """What races, and where its files lie.

    Args:
        signals, candidates: overrides by name. common: overrides of all runs.
        seeds: the first so many of each rung are run. rungs: steps and seeds, both growing.
    """

    folder: Path
    signals: dict[str, list[str]]
    candidates: dict[str, list[str]]
    common: list[str]
    seeds: Sequence[int]
    rungs: Sequence[Rung]
    failed: dict[str, str] = field(default_factory=dict)  # candidate: why

    def run_dir(self, run: Run) -> Path:
        return self.folder / "runs" / run.signal / f"{run.candidate}-s{run.seed}"

    def evaluations(self, run: Run, steps: int) -> list[dict[str, Any]]:
        """The run's evaluations at steps 1 to `steps`."""
        path = self.run_dir(run) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [row for row in map(json.loads, lines) if row.get("eval/return") is not None]
        return [row for row in rows if 0 < row["env_step"] <= steps]

    def done(self, run: Run, steps: int) -> bool:
        """Whether it has been evaluated at `steps`, its last step on this rung."""
        return any(row["env_step"] == steps for row in self.evaluations(run, steps))

    def command(self, run: Run, steps: int) -> list[str]:
        """Starts it, or goes on where it stopped."""
        start = [sys.executable, "-m", "pbrl.train"]
        folder = self.run_dir(run)
        if (folder / "config.yaml").exists():
            return [*start, f"resume={folder}", f"total_steps={steps}"]
        own = [f"seed={run.seed}", f"run_dir={folder}", f"total_steps={steps}"]
        return [*start, *self.common, *self.signals[run.signal], *self.candidates[run.candidate], *own]

    def runs(self, rung: Rung, candidates: Sequence[str]) -> list[Run]:
        return [Run(s, c, seed) for seed in self.seeds[: rung.seeds] for c in candidates for s in self.signals]

    def scores(self, rung: Rung, candidates: Sequence[str]) -> dict[str, dict[str, float]]:
        """Of each candidate, best first: the mean return on each signal, and the score."""
        returns = {
            c: {
                s: float(
                    np.mean(
                        [
                            np.mean([row["eval/return"] for row in self.evaluations(Run(s, c, seed), rung.steps)])
                            for seed in self.seeds[: rung.seeds]
                        ]
                    )
                )
                for s in self.signals
            }
            for c in candidates
        }
        best = {s: max(found[s] for found in returns.values()) for s in self.signals}
        shares = {c: np.mean([share(found[s], best[s]) for s in best]) for c, found in returns.items()}
        ordered = sorted(candidates, key=lambda c: -shares[c])
        return {c: {**returns[c], "score": float(shares[c])} for c in ordered}

    def race(self, work: Callable[[list[Run], int], dict[Run, str]]) -> list[dict[str, Any]]:
        """Run all rungs; `work` brings runs to a number of steps and returns those that failed, with the reason.

        Returns:
            What race.json holds: for each rung its scores and who goes on.
        """
        left, decided = list(self.candidates), []
        for number, rung in enumerate(self.rungs):
            waiting = [run for run in self.runs(rung, left) if not self.done(run, rung.steps)]
            print(f"rung {number + 1} of {len(self.rungs)}: {rung.steps} steps, {rung.seeds} seeds, {', '.join(left)}")
            self.failed |= {run.candidate: reason for run, reason in work(waiting, rung.steps).items()}
            left = [candidate for candidate in left if candidate not in self.failed]
            if not left:
                raise RaceError(f"every candidate failed: {self.failed}")
            scores = self.scores(rung, left)
            last = number == len(self.rungs) - 1
            left = list(scores)[: 1 if last else math.ceil(len(scores) / 2)]
            decided.append({"steps": rung.steps, "seeds": rung.seeds, "scores": scores, "go_on": left})
            self._keep(decided)
            for candidate, found in scores.items():
                values = "  ".join(f"{name} {value:8.3f}" for name, value in found.items())
                print(f"  {candidate:24} {values}  {'goes on' if candidate in left and not last else ''}")
        print(f"winner: {left[0]}")
        return decided

    def _keep(self, decided: list[dict[str, Any]]) -> None:
        (self.folder / "race.json").write_text(json.dumps({"rungs": decided, "failed": self.failed}, indent=1) + "\n")
        self.write_curves()

    def write_curves(self) -> None:
        """Every evaluation of every run, those of the dropped included."""
        rows = []
        for folder in sorted(path for path in (self.folder / "runs").glob("*/*-s*") if path.is_dir()):  # logs beside
            candidate, _, seed = folder.name.rpartition("-s")
            run = Run(folder.parent.name, candidate, int(seed))
            for row in self.evaluations(run, 2**62):
                measured = (
                    row["env_step"],
                    round(row["eval/return"], 3),
                    row.get("eval/success"),
                    row.get("reward/gap"),
                )
                rows.append(dict(zip(COLUMNS, (*run, *measured), strict=True)))
        write(self.folder / "curves.csv", COLUMNS, rows)


def share(found: float, best: float) -> float:
    """How near a return comes to the best one: at most 1, the larger the better also where returns are negative."""
    if best > 0:
        return found / best
    return best / found if found else 1.0  # 0 is the best there can be here


class Workers:
    """Brings runs to a number of steps in processes of their own, which an interrupt lets save themselves."""

    def __init__(self, race: Race, processes: int) -> None:
        self.race, self.processes = race, processes
        self.children: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def __call__(self, runs: list[Run], steps: int) -> dict[Run, str]:
        began, failed = time.monotonic(), {}
        with concurrent.futures.ThreadPoolExecutor(self.processes) as pool:
            futures = {pool.submit(self._one, run, steps): run for run in runs}
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                run, code = futures[future], future.result()
                if code and code != INTERRUPTED:
                    failed[run] = f"{run.signal}, seed {run.seed}: exit code {code}, see {self.race.run_dir(run)}.log"
                seconds = (time.monotonic() - began) / number * (len(runs) - number)
                print(f"  {run.candidate} on {run.signal}, seed {run.seed}: exit code {code}; {number} of {len(runs)} "
                      f"done, {seconds / 60:.0f} minutes left", flush=True)  # fmt: skip
        if self.stopping.is_set():
            raise KeyboardInterrupt
        return failed

    def _one(self, run: Run, steps: int) -> int:
        if self.stopping.is_set():
            return INTERRUPTED
        log = Path(f"{self.race.run_dir(run)}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            child = subprocess.Popen(self.race.command(run, steps), stdout=file, stderr=file, start_new_session=True)
            self.children.add(child)
            if self.stopping.is_set():
                child.terminate()
            code = child.wait()
            self.children.discard(child)
        return code

    def stop(self, *_: Any) -> None:
        """Let the runs save themselves; nothing new is started."""
        print("\nthe runs save themselves; the same command goes on", file=sys.stderr)
        self.stopping.set()
        for child in list(self.children):
            child.terminate()


def read(path: Path) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """Signals, candidates and common overrides of a YAML file.

    Raises:
        RaceError: if it is not such a file.
    """
    try:
        given: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RaceError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or set(given) - {"common", "signals", "candidates"}:
        raise RaceError(f"{path}: expected the keys common, signals and candidates")
    tables = [{k: v or [] for k, v in (given.get(name) or {}).items()} for name in ("signals", "candidates")]
    if odd := [name for table in tables for name in table if not isinstance(name, str) or "/" in name]:
        raise RaceError(f"{path}: {odd[0]!r} is no name for YAML; put it in quotes, without /")
    lists = [given.get("common") or [], *(value for table in tables for value in table.values())]
    if not all(tables) or not all(isinstance(one, list) and all(isinstance(o, str) for o in one) for one in lists):
        raise RaceError(f"{path}: expected signals and candidates, each a name with a list of overrides (KEY=VALUE)")
    return tables[0], tables[1], lists[0]


def rung(text: str) -> Rung:
    """STEPS:SEEDS."""
    steps, _, seeds = text.partition(":")
    try:
        found = Rung(int(steps), int(seeds or 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}; expected STEPS:SEEDS, such as 20000:1") from None
    if found.steps < 1 or found.seeds < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected at least one step and one seed")
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m experiments.race", description=__doc__, formatter_class=form)
    parser.add_argument("file", type=Path, help="YAML: common, signals, candidates (see experiments/races)")
    parser.add_argument("--out", type=Path, required=True, help="the race's folder; an unfinished race there goes on")
    parser.add_argument("--env", default="walker-walk", help="option of env (default walker-walk)")
    parser.add_argument("--rungs", type=rung, nargs="+", default=[Rung(20_000, 1), Rung(40_000, 2), Rung(100_000, 3)],
                        metavar="STEPS:SEEDS", help="default 20000:1 40000:2 100000:3")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20, 25)), help="default 20 to 24")
    parser.add_argument("--signals", nargs="+", help="only these of the file's")
    parser.add_argument("--candidates", nargs="+", help="only these of the file's")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="runs at a time (default 1)")
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [-- KEY=VALUE ... of all runs]"
    given = sys.argv[1:] if arguments is None else arguments
    own, overrides = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = parser.parse_args(own)
    options.overrides = overrides
    try:
        race = _race(options)
        workers = Workers(race, options.processes)
        before = {kind: signal.signal(kind, workers.stop) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            race.race(workers)
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
    except RaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        race.write_curves()
        return INTERRUPTED
    return 0


def _race(options: argparse.Namespace) -> Race:
    signals, candidates, common = read(options.file)
    for name, table, chosen in (("signals", signals, options.signals), ("candidates", candidates, options.candidates)):
        unknown = sorted(set(chosen or ()) - set(table))
        if unknown:
            raise RaceError(f"--{name} {unknown[0]}: {options.file} has {', '.join(table)}")
    if max(r.seeds for r in options.rungs) > len(options.seeds):
        raise RaceError(
            f"--rungs asks for {max(r.seeds for r in options.rungs)} seeds; --seeds has {len(options.seeds)}"
        )
    if any(b.steps <= a.steps or b.seeds < a.seeds for a, b in zip(options.rungs, options.rungs[1:], strict=False)):
        raise RaceError("--rungs: steps must grow from rung to rung, and seeds must not shrink")
    options.out.mkdir(parents=True, exist_ok=True)
    return Race(
        options.out,
        {name: signals[name] for name in options.signals or signals},
        {name: candidates[name] for name in options.candidates or candidates},
        [f"env={options.env}", *common, *options.overrides],
        options.seeds,
        options.rungs,
    )


if __name__ == "__main__":
    raise SystemExit(main())
