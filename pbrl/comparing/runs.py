"""Finished runs, read back from their folders or from W&B, and sorted into tasks and methods that may be compared.

A run's folder holds `config.yaml` (resolved, with the names chosen on the command line under `choices`),
`metrics.jsonl` (one row per line, each with `env_step`) and, once finished, `summary.json`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf

from pbrl.comparing.statistics import Array

ORACLE = "oracle"  # the updater that is paid the task's own reward
MUST_MATCH = ("total_steps", "feedback.budget", "teacher")  # in all runs on one task but the oracle's
METHOD_CHOICES = ("query", "teacher", "agent", "reward")  # named in the label where runs of one updater differ in them


class ComparisonError(ValueError):
    """The runs given cannot be read or compared; the message says which and what to do."""


@dataclass(frozen=True)
class Run:
    """One training run. `config` and `rows` are as stored; nothing is filled in."""

    source: str  # its folder, or its address at W&B
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = field(repr=False)  # in the order of env_step
    complete: bool

    @property
    def updater(self) -> str:
        return str(self.setting("updater"))

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    def setting(self, name: str) -> Any:
        """A group's choice ("updater") or the value of a config path ("feedback.budget"); None if there is neither."""
        if name in self.config["choices"]:
            return self.config["choices"][name]
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def series(self, key: str) -> tuple[Array, Array]:
        """Steps [n], strictly increasing, and finite values [n] of one metric; of two rows at one step, the later."""
        points = {row["env_step"]: row[key] for row in self.rows if _is_number(row.get(key))}
        return np.array(list(points), dtype=np.float64), np.array(list(points.values()), dtype=np.float64)

    def last(self, key: str) -> float:
        """The last value of a metric, NaN if it was never logged."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else math.nan

    def labels_at(self, steps: Array) -> Array:
        """Labels received before each of `steps`; what a session teaches shows only after its step."""
        asked_at, labels = self.series("feedback/labels")
        return np.concatenate([[0.0], labels])[np.searchsorted(asked_at, steps, side="left")]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(folder: Path) -> Run:
    """The run stored in `folder`.

    Raises:
        ComparisonError: if its config names no choices or a line of its log (other than a torn last one) is broken.
    """
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True))
    _check_config(config, str(folder))
    summary_file = folder / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    return Run(str(folder), config, read_rows(folder / "metrics.jsonl"), bool(summary.get("complete")))


def _check_config(config: Mapping[str, Any], source: str) -> None:
    choices = config.get("choices")
    if not isinstance(choices, Mapping) or not {"env", "updater"} <= set(choices) or "seed" not in config:
        raise ComparisonError(
            f"{source}: its config has no seed, choices.env and choices.updater; did pbrl.train write it?"
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl.

    A torn last line (the run was killed while writing, or writes just now) is dropped. Where env_step goes back, the
    run was resumed from a checkpoint, and what it had logged beyond that step is dropped: it was done again.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = row["env_step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ComparisonError(f"{path}, line {number}: expected a JSON object with env_step ({error!r})") from error
        while rows and rows[-1]["env_step"] > step:
            rows.pop()
        rows.append(row)
    return rows


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """Every run in or below the given folders, in the order of their paths, each once."""
    folders: dict[Path, Path] = {}
    for path in paths:
        below = sorted(log.parent for log in path.rglob("metrics.jsonl") if (log.parent / "config.yaml").exists())
        if not below:
            raise ComparisonError(f"{path}: no run in or below it (a folder with config.yaml and metrics.jsonl)")
        folders.update({folder.resolve(): folder for folder in below})
    return [read_run(folder) for folder in folders.values()]


def wandb_runs(project: str, timeout: int = 30) -> list[Run]:
    """Every run of the W&B project "entity/project", through W&B's API.

    Raises:
        ComparisonError: if W&B cannot be reached, does not know the project or accepts no login.
    """
    import wandb
    from requests.exceptions import RequestException

    try:
        found = wandb.Api(timeout=timeout).runs(project)
        return [_from_wandb(run) for run in found]
    except (wandb.errors.Error, RequestException, ValueError) as error:
        raise ComparisonError(
            f"W&B project {project!r} could not be read ({type(error).__name__}: {error}). Check the network, the name "
            "(entity/project) and `wandb login`, or compare the runs' local folders without --wandb."
        ) from error


def _from_wandb(run: Any) -> Run:
    _check_config(run.config, run.url)
    rows = sorted((row for row in run.scan_history() if row.get("env_step") is not None), key=lambda r: r["env_step"])
    return Run(run.url, run.config, rows, run.state == "finished")


def without_copies(local: Sequence[Run], remote: Sequence[Run]) -> list[Run]:
    """Local runs, then those at W&B that are not one of them (same choices, seed, steps and budget)."""

    def identity(run: Run) -> str:
        settings = [run.setting(name) for name in ("choices", "seed", "total_steps", "feedback.budget")]
        return json.dumps(settings, sort_keys=True, default=str)

    known = {identity(run) for run in local}
    return [*local, *(run for run in remote if identity(run) not in known)]


@dataclass(frozen=True)
class Selection:
    """The runs to compare: `groups[task][method]`, the oracle is a method too; and what was left out."""

    groups: dict[str, dict[str, list[Run]]]
    names: dict[str, str]  # a run's source -> its short name in every table ("r01")
    notes: list[str]
    method_keys: tuple[str, ...]  # what the methods' labels are made of


def select(
    runs: Sequence[Run], method_keys: Sequence[str] | None = None, allow_mixed: bool = False, baseline: str = "pebble"
) -> Selection:
    """Sort runs into tasks and methods.

    Args:
        method_keys: choices or config paths that make up a method's label, "updater" first among them as a rule.
            Default: the updater, and whichever of METHOD_CHOICES differ between runs of one updater on one task.
        allow_mixed: keep unfinished runs, and tolerate what MUST_MATCH and the seeds forbid.
        baseline: the method listed first.

    Raises:
        ComparisonError: naming the runs, if they differ where they must not, or one seed occurs twice in a method.
    """
    kept, notes = _usable(runs, allow_mixed)
    by_task = _by_task(kept)
    keys = tuple(method_keys) if method_keys else ("updater", *_differing(by_task))
    problems = [line for task, members in by_task.items() for line in _mismatches(task, members, keys)]
    groups = {task: _by_method(members, keys, baseline) for task, members in sorted(by_task.items())}
    problems += [line for task, methods in groups.items() for line in _repeated_seeds(task, methods)]
    if problems and not allow_mixed:
        raise ComparisonError(
            "these runs are not comparable:\n  " + "\n  ".join(problems) + "\nCompare them apart, make the difference "
            "part of the method (--method-keys updater,feedback.budget), or mix them knowingly with --allow-mixed."
        )
    ordered = [run for methods in groups.values() for members in methods.values() for run in members]
    names = {run.source: f"r{number:02d}" for number, run in enumerate(ordered, start=1)}
    return Selection(groups, names, notes + [f"Mixed knowingly: {line}" for line in problems], keys)


def _usable(runs: Sequence[Run], allow_mixed: bool) -> tuple[list[Run], list[str]]:
    notes = [
        f"Left out, no evaluation logged yet: {run.source}" for run in runs if not len(run.series("eval/return")[0])
    ]
    kept = [run for run in runs if len(run.series("eval/return")[0])]
    unfinished = [run.source for run in kept if not run.complete]
    if allow_mixed:
        notes += [f"Unfinished, its task is compared up to its end: {source}" for source in unfinished]
    else:
        notes += [f"Left out, unfinished (--allow-mixed keeps it): {source}" for source in unfinished]
        kept = [run for run in kept if run.complete]
    if not any(run.updater != ORACLE for run in kept):
        raise ComparisonError("no finished run that learns from preferences\n  " + "\n  ".join(notes))
    return kept, notes


def _by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by task: an environment's choice, and, where one choice was configured in several ways, what differs."""
    choices: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        choices[str(run.setting("env"))].append(run)
    tasks: dict[str, list[Run]] = defaultdict(list)
    for choice, members in choices.items():
        options = [run.config.get("env") or {} for run in members]
        names = sorted({name for option in options for name in option})
        differing = [name for name in names if len({str(option.get(name)) for option in options}) > 1]
        for run, option in zip(members, options, strict=True):
            suffix = ", ".join(f"{name}={option.get(name)}" for name in differing)
            tasks[f"{choice} ({suffix})" if suffix else choice].append(run)
    return dict(tasks)


def _differing(by_task: Mapping[str, Sequence[Run]]) -> list[str]:
    values: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for task, runs in by_task.items():
        for run in (run for run in runs if run.updater != ORACLE):
            for name in METHOD_CHOICES:
                values[name, task, run.updater].add(str(run.setting(name)))
    return [name for name in METHOD_CHOICES if any(len(v) > 1 for key, v in values.items() if key[0] == name)]


def method_label(run: Run, keys: Sequence[str]) -> str:
    """A run's method: its choices by value, other settings as name=value."""
    if run.updater == ORACLE:
        return ORACLE
    named = run.config["choices"]
    return ", ".join(str(named[k]) if k in named else f"{k.rpartition('.')[2]}={run.setting(k)}" for k in keys)


def _by_method(runs: Sequence[Run], keys: Sequence[str], baseline: str) -> dict[str, list[Run]]:
    methods: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.updater != baseline, method_label(run, keys), run.seed)):
        methods[method_label(run, keys)].append(run)
    return dict(methods)


def _mismatches(task: str, runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    lines = []
    for name in MUST_MATCH:
        if name in keys:
            continue
        sources: dict[str, list[str]] = defaultdict(list)
        for run in runs:
            if run.updater != ORACLE:
                sources[json.dumps(run.setting(name), sort_keys=True, default=str)].append(run.source)
        if len(sources) > 1:
            listed = "; ".join(f"{value} in {', '.join(where)}" for value, where in sources.items())
            lines.append(f"{task}: {name} is {listed}")
    return lines


def _repeated_seeds(task: str, methods: Mapping[str, Sequence[Run]]) -> list[str]:
    lines = []
    for method, runs in methods.items():
        for seed, count in Counter(run.seed for run in runs).items():
            if count > 1:
                where = ", ".join(run.source for run in runs if run.seed == seed)
                lines.append(f"{task}, {method}: seed {seed} occurs {count} times, in {where}")
    return lines
