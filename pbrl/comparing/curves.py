"""The runs of a comparison on common axes: their curves over steps and labels, and the oracle's.

Definitions:

* score: `eval/success` where every run on the task has it, else `eval/return`; `--metric` overrides.
* grid: on each task, the evaluation steps that all runs cover; between evaluations the last one holds.
* grid of labels: up to the most that a run had received by the grid's end; a run with fewer keeps its last score.
* scores of a run: of its own evaluations up to the last step that all runs on the task cover. Final score: their mean
  in the last tenth of the steps.
* oracle score: the same of SAC paid the task's own reward; normalised score = score / oracle score.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pbrl.comparing.runs import ORACLE, ComparisonError, Run, Selection
from pbrl.comparing.statistics import (
    FEW,
    Array,
    Estimator,
    area_under_curve,
    common_grid,
    last_observation,
)

TAIL = 0.1  # share of the steps, at the end, that makes up the final score


@dataclass(frozen=True)
class Curves:
    """All runs of one method on one task, on the task's grids."""

    runs: Sequence[Run]
    steps: Array  # float [g], environment steps
    by_step: Array  # float [runs, g], scores
    labels: Array  # float [k], labels received
    by_label: Array  # float [runs, k], the last score measured with at most that many labels
    own: Sequence[tuple[Array, Array]]  # each run's own evaluations up to the grid's end: steps and scores

    def over(self, axis: str) -> tuple[Array, Array]:
        """Grid and scores over "steps" or "labels"."""
        return (self.steps, self.by_step) if axis == "steps" else (self.labels, self.by_label)

    def end(self, axis: str) -> float:
        """Up to where every run was measured, over "steps" or "labels"."""
        if axis == "steps":
            return float(self.steps[-1])
        return float(min(run.labels_at(at)[-1] for run, (at, _) in zip(self.runs, self.own, strict=True)))

    @property
    def final(self) -> Array:
        """Final score of each run, float [runs]."""
        return np.array([float(tail_mean(*evaluations)) for evaluations in self.own])

    @property
    def area(self) -> Array:
        """Area under each run's curve over steps, as its mean height, float [runs]."""
        return np.array([float(area_under_curve(*evaluations)) for evaluations in self.own])


@dataclass(frozen=True)
class Reference:
    """The oracle on one task: float [runs, g] on steps [g]. A stored mean curve counts as one run."""

    steps: Array
    by_step: Array
    sources: str
    score: float  # what scores are divided by: by the comparison's one estimator


@dataclass
class Comparison:
    """All that the tables are computed from."""

    selection: Selection
    baseline: str  # the updater that improvements and sample ratios refer to
    repetitions: int = 2000  # of the bootstrap
    metrics: dict[str, str] = field(default_factory=dict)  # task -> "eval/success" or "eval/return"
    curves: dict[str, dict[str, Curves]] = field(default_factory=dict)  # task -> method -> curves, without the oracle
    references: dict[str, Reference] = field(default_factory=dict)  # task -> oracle, where there is one
    notes: list[str] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        """Every method once, the baseline first, without the oracle."""
        return sorted({m for groups in self.curves.values() for m in groups}, key=lambda m: (m != self.base, m))

    @property
    def base(self) -> str | None:
        """The label of the baseline: its updater alone, or the one label that begins with it; None if not unique."""
        labels = {method for groups in self.curves.values() for method in groups}
        baseline = self.baseline.removeprefix(self.selection.prefix)
        found = [label for label in labels if label.split(", ")[0] == baseline]
        return baseline if baseline in labels else found[0] if len(found) == 1 else None

    @property
    def estimator(self) -> Estimator:
        """One for all tables: that of the method and task with the fewest runs."""
        fewest = min((len(group.runs) for groups in self.curves.values() for group in groups.values()), default=0)
        return Estimator(fewest >= FEW, self.repetitions)

    def oracle_score(self, task: str) -> float:
        """NaN where the task has no oracle."""
        return self.references[task].score if task in self.references else math.nan

    def sources(self, runs: Sequence[Run]) -> str:
        """The runs' short names, as in the table of runs."""
        return " ".join(self.selection.names[run.source] for run in runs)


def gather(
    selection: Selection,
    oracle_folder: Path,
    metric: str = "auto",
    baseline: str = "pebble",
    repetitions: int = 2000,
    changed: Callable[[Mapping[str, Any], str], bool] | None = None,
) -> Comparison:
    """Put the selected runs on common axes.

    Args:
        oracle_folder: holds <env>.csv with columns env_step, return, success; used where no run is an oracle's.
        metric: "return", "success" or "auto".
        baseline, repetitions: see `Comparison`.
        changed: whether an environment, as a run describes it, is not what the stored curve is about; None: it is.
    """
    result = Comparison(selection, baseline, repetitions, notes=list(selection.notes))
    for task, methods in selection.groups.items():
        learners = {method: runs for method, runs in methods.items() if method != ORACLE}
        if not learners:
            result.notes.append(f"{task}: the oracle alone, nothing to compare.")
            continue
        result.metrics[task] = score_metric(methods, metric)
        result.curves[task] = on_common_grid(task, learners, result.metrics[task])
    for task, curves in result.curves.items():  # all of them are there: the estimator is settled
        methods = selection.groups[task]
        last_step = next(iter(curves.values())).steps[-1]
        runs, stored = methods.get(ORACLE, []), oracle_folder / f"{task}.csv"
        described = [run.config.get("env") or {} for group in curves.values() for run in group.runs]
        if changed and not runs and stored in oracle_folder.glob("*.csv") and any(changed(e, task) for e in described):
            result.notes.append(
                f"{task}: its environment is not the shipped one, which {stored} is about, so nothing is normalised "
                "here. Add runs with updater=oracle of this environment, or their curve with --oracle-dir."
            )
            continue
        reference = find_reference(task, runs, result, last_step, stored)
        if reference is not None:
            result.references[task] = reference
    if result.base is None:
        result.notes.append(f"No one method is the baseline {baseline!r}; no ratios to it. See --baseline.")
    return result


def tail_mean(steps: Array, values: Array) -> Array:
    """Mean of `values` [..., n] over the points in the last TAIL of `steps` [n]: float [...]."""
    return np.asarray(values[..., steps >= (1 - TAIL) * steps[-1]].mean(axis=-1))


def score_metric(methods: Mapping[str, Sequence[Run]], metric: str) -> str:
    """The key that scores runs on this task."""
    if metric != "auto":
        return f"eval/{metric}"
    runs = [run for members in methods.values() for run in members]
    return "eval/success" if all(len(run.series("eval/success")[0]) for run in runs) else "eval/return"


def on_common_grid(task: str, methods: Mapping[str, Sequence[Run]], metric: str) -> dict[str, Curves]:
    """Every method's curves, over steps and over labels, where all runs on the task can be seen.

    Raises:
        ComparisonError: if a run lacks the metric or the runs have no step in common.
    """
    by_step = {run.source: run.series(metric) for runs in methods.values() for run in runs}
    for source, (steps, _) in by_step.items():
        if not len(steps):
            raise ComparisonError(f"{source} ({task}) never logged {metric}; choose another --metric")
    steps = common_grid([axis for axis, _ in by_step.values()])
    if not len(steps):
        raise ComparisonError(f"{task}: the runs' evaluations have no environment steps in common")
    own = {source: (at[at <= steps[-1]], values[at <= steps[-1]]) for source, (at, values) in by_step.items()}
    by_label = {run.source: over_labels(run, *own[run.source]) for runs in methods.values() for run in runs}
    labels = np.unique(np.concatenate([axis for axis, _ in by_label.values()]))
    labels = labels[labels >= max(axis[0] for axis, _ in by_label.values())]
    return {
        method: Curves(
            runs,
            steps,
            np.stack([last_observation(*by_step[run.source], steps) for run in runs]),
            labels,
            np.stack([last_observation(*by_label[run.source], labels) for run in runs]),
            [own[run.source] for run in runs],
        )
        for method, runs in methods.items()
    }


def over_labels(run: Run, steps: Array, values: Array) -> tuple[Array, Array]:
    """The run's scores over labels received: at each number of labels, the last score measured with it."""
    labels = run.labels_at(steps)
    last = np.append(labels[1:] != labels[:-1], True)
    return labels[last], values[last]


def find_reference(
    task: str, runs: Sequence[Run], result: Comparison, last_step: float, stored: Path
) -> Reference | None:
    """The oracle's curve up to `last_step`: from oracle runs among those compared, else from the stored curve.

    None, with a note, if there is neither or its score is not positive.
    """
    metric = result.metrics[task]
    series = [run.series(metric) for run in runs]
    if not runs and stored.exists():
        series = [_read_curve(stored, metric)]
    series = [(steps, values) for steps, values in series if len(steps) and steps[0] <= last_step]
    if not series:
        result.notes.append(
            f"{task}: no oracle for {metric}, so nothing is normalised here. Add runs with updater=oracle, or {stored}."
        )
        return None
    grid = common_grid([steps for steps, _ in series])
    grid = grid[grid <= last_step]
    if grid[-1] < (1 - TAIL) * last_step:
        result.notes.append(
            f"{task}: the oracle ends at {grid[-1]:.0f} of {last_step:.0f} steps; its last scores are used."
        )
    values = np.stack([last_observation(*points, grid) for points in series])
    score = float(result.estimator.point(tail_mean(grid, values)))
    reference = Reference(grid, values, result.sources(runs) if runs else str(stored), score)
    if reference.score <= 0:
        result.notes.append(f"{task}: the oracle's {metric} is {reference.score:.3g}; shares of it mean nothing.")
        return None
    return reference


def _read_curve(path: Path, metric: str) -> tuple[Array, Array]:
    column = metric.removeprefix("eval/")
    with path.open(newline="", encoding="utf-8") as file:
        points = {float(row["env_step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}
    return np.array(sorted(points)), np.array([points[step] for step in sorted(points)])
