"""The numbers of a comparison, as tables of plain rows: each table is a CSV, and all that the report shows is a row.

What stands for several seeds and its 95 % interval (`_low`, `_high`) are those of the comparison's one estimator, named
in the column `estimator`: mean and Student's t, or interquartile mean and bootstrap where every method has ten runs. An
interval is NaN where there is none: a single seed, or seeds that are all equal. `sources` are the runs' short names.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pbrl.comparing.curves import Comparison, Curves
from pbrl.comparing.runs import ORACLE
from pbrl.comparing.statistics import (
    Array,
    common_grid,
    first_reached,
    improvement_interval,
    last_observation,
    performance_profile,
    probability_of_improvement,
    share_interval,
)

Row = dict[str, Any]
Tables = dict[str, list[Row]]
AXES = ("steps", "labels")
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)  # of the oracle's score
HEALTH = ("reward/holdout_accuracy", "reward/calibration_error", "reward/rank_correlation", "reward/loss")
FORMULA = tuple("=+-@\t\r\n")  # what a spreadsheet evaluates, at the start of a cell
GAP = ("reward/gap", "reward/learned_per_step", "reward/true_per_step")  # is the policy what the reward takes it for?
THRESHOLDS = np.linspace(0, 1.2, 61)  # of the performance profiles, in shares of the oracle


def all_tables(data: Comparison, seed: int = 0) -> Tables:
    """Every table by its name; `seed` is the bootstrap's."""
    rng = np.random.default_rng(seed)
    shared = [task for task in data.references if set(data.methods) <= set(data.curves[task])]
    left_out = [task for task in data.curves if task not in shared]
    if left_out and len(data.curves) > 1:
        data.notes.append(f"Not in scores over all tasks (no oracle, or a method is missing): {', '.join(left_out)}.")
    return {
        "runs": run_rows(data),
        "evaluations": evaluation_rows(data),
        "oracle": oracle_rows(data),
        "curves_steps": curve_rows(data, "steps", rng),
        "curves_labels": curve_rows(data, "labels", rng),
        "scores": score_rows(data, rng),
        "aggregate": aggregate_rows(data, shared, rng),
        "improvement": improvement_rows(data),
        "profiles": profile_rows(data, shared),
        "samples": sample_rows(data, rng),
        "health": measure_rows(data, HEALTH, rng),
        "gap": measure_rows(data, GAP, rng),
    }


def run_rows(data: Comparison) -> list[Row]:
    """One row per run: where it comes from, what it was given, what it reached."""
    reached = {
        run.source: (final, area)
        for methods in data.curves.values()
        for group in methods.values()
        for run, final, area in zip(group.runs, group.final, group.area, strict=True)
    }
    rows = []
    for task, methods in data.selection.groups.items():
        for method, run in ((method, run) for method, runs in methods.items() for run in runs):
            final, area = reached.get(run.source, (math.nan, math.nan))
            rows.append(
                {
                    "run": data.selection.names[run.source],
                    "task": task,
                    "method": method,
                    "seed": run.seed,
                    "complete": run.complete,
                    "steps": int(run.rows[-1]["env_step"]),
                    "total_steps": run.setting("total_steps"),
                    "labels": run.last("feedback/labels"),
                    "budget": run.setting("feedback.budget"),
                    "asked": run.last("feedback/asked"),
                    "skipped": run.last("feedback/skipped"),
                    "equal": run.last("feedback/equal"),
                    "metric": data.metrics.get(task, ""),
                    "final": final,
                    "auc": area,
                    "final_normalized": final / data.oracle_score(task),
                    "auc_normalized": area / data.oracle_score(task),
                    "wall_hours": run.last("time/wall") / 3600,
                    "source": run.source,
                }
            )
    return rows


def evaluation_rows(data: Comparison) -> list[Row]:
    """Every evaluation of every run, as it was logged."""
    rows = []
    for task, methods in data.selection.groups.items():
        for method, run in ((method, run) for method, runs in methods.items() for run in runs):
            origin = {"run": data.selection.names[run.source], "task": task, "method": method, "seed": run.seed}
            steps, returns = run.series("eval/return")
            success = dict(zip(*run.series("eval/success"), strict=True))
            for step, labels, value in zip(steps, run.labels_at(steps), returns, strict=True):
                logged = {"return": value, "success": success.get(step, math.nan)}
                rows.append(origin | {"env_step": int(step), "labels": int(labels)} | logged)
    return rows


def oracle_rows(data: Comparison) -> list[Row]:
    """What scores are divided by."""
    return [
        {
            "task": task,
            "metric": data.metrics[task],
            "score": reference.score,
            "steps": int(reference.steps[-1]),
            "runs": len(reference.by_step),
            "sources": reference.sources,
        }
        for task, reference in data.references.items()
    ]


def curve_rows(data: Comparison, axis: str, rng: np.random.Generator) -> list[Row]:
    """The estimate over seeds and its interval at every point of the grid ("steps" or "labels")."""
    rows = []
    for task, methods in data.curves.items():
        for method, group in methods.items():
            origin = {"task": task, "method": method}
            rows += _pointwise(data, origin, axis, *group.over(axis), data.sources(group.runs), rng)
        if axis == "steps" and task in data.references:
            oracle, origin = data.references[task], {"task": task, "method": ORACLE}
            rows += _pointwise(data, origin, axis, oracle.steps, oracle.by_step, oracle.sources, rng)
    return rows


def _pointwise(
    data: Comparison, origin: Row, axis: str, grid: Array, values: Array, sources: str, rng: np.random.Generator
) -> list[Row]:
    """A row per grid point for `values` [runs, points]."""
    ends = _within(origin, data, *data.estimator.interval([values], rng))
    columns = (axis, "value", "low", "high")
    about = {"runs": len(values), "estimator": data.estimator.name, "sources": sources}
    return [
        origin | dict(zip(columns, point, strict=True)) | about
        for point in zip(grid, data.estimator.point(values), *ends, strict=True)
    ]


def _within(origin: Row, data: Comparison, low: Array, high: Array) -> tuple[Array, Array]:
    """The interval, cut to [0, 1] where the score is a success rate."""
    if "metric" not in origin and data.metrics.get(origin["task"]) == "eval/success":
        return np.maximum(low, 0), np.minimum(high, 1)
    return low, high


def _summary(data: Comparison, name: str, strata: Sequence[Array], rng: np.random.Generator) -> Row:
    """Estimate of the pooled runs and its interval, as columns name, name_low, name_high."""
    low, high = data.estimator.interval(strata, rng)
    point = data.estimator.point(np.concatenate(list(strata)))
    return {name: float(point), f"{name}_low": float(low), f"{name}_high": float(high)}


def score_rows(data: Comparison, rng: np.random.Generator) -> list[Row]:
    """Final score and area under the curve of every method on every task, raw and in shares of the oracle."""
    rows = []
    for task, methods in data.curves.items():
        for method, group in methods.items():
            row: Row = {"task": task, "method": method, "metric": data.metrics[task], "runs": len(group.runs)}
            for name, values in (("final", group.final), ("auc", group.area)):
                summary = _summary(data, name, [values], rng)
                if data.metrics[task] == "eval/success":  # nothing lies outside
                    summary[f"{name}_low"], summary[f"{name}_high"] = np.clip(list(summary.values())[1:], 0, 1).tolist()
                shares = {
                    k.replace(name, f"{name}_normalized"): v / data.oracle_score(task) for k, v in summary.items()
                }
                row |= summary | shares
            rows.append(row | {"estimator": data.estimator.name, "sources": data.sources(group.runs)})
    return rows


def aggregate_rows(data: Comparison, tasks: Sequence[str], rng: np.random.Generator) -> list[Row]:
    """Normalised scores over all of `tasks`, each run counted once."""
    rows = []
    for method in data.methods if tasks else []:
        row = _origin(data, tasks, method)
        for name, scores in (("final_normalized", "final"), ("auc_normalized", "area")):
            row |= _summary(data, name, _normalized(data, tasks, method, scores), rng)
        rows.append(row | {"estimator": data.estimator.name})
    return rows


def profile_rows(data: Comparison, tasks: Sequence[str]) -> list[Row]:
    """Performance profiles: the share of runs whose normalised final score is above each threshold (Wilson)."""
    rows = []
    for method in data.methods if tasks else []:
        scores = np.concatenate(_normalized(data, tasks, method, "final"))
        shares = performance_profile(scores, THRESHOLDS)
        low, high = share_interval(shares, len(scores))
        for point in zip(THRESHOLDS, shares, low, high, strict=True):
            numbers = dict(zip(("threshold", "share", "low", "high"), point, strict=True))
            rows.append(_origin(data, tasks, method) | numbers)
    return rows


def _normalized(data: Comparison, tasks: Sequence[str], method: str, scores: str) -> list[Array]:
    return [getattr(data.curves[task][method], scores) / data.oracle_score(task) for task in tasks]


def _origin(data: Comparison, tasks: Sequence[str], *methods: str) -> Row:
    runs = [run for task in tasks for method in methods for run in data.curves[task][method].runs]
    named = {"method": methods[0]} if len(methods) == 1 else dict(zip(("first", "second"), methods, strict=True))
    return named | {"tasks": " ".join(tasks), "runs": len(runs), "sources": data.sources(runs)}


def improvement_rows(data: Comparison) -> list[Row]:
    """P(first > second) of final scores (score interval), for every ordered pair of methods, on the tasks both have."""
    rows = []
    for first in data.methods:
        for second in data.methods:
            tasks = [task for task, groups in data.curves.items() if first in groups and second in groups]
            if first == second or not tasks:
                continue
            x, y = ([data.curves[task][method].final for task in tasks] for method in (first, second))
            low, high = improvement_interval(x, y)
            numbers = {"probability": probability_of_improvement(x, y), "low": low, "high": high}
            rows.append(_origin(data, tasks, first, second) | numbers)
    return rows


Need = dict[str, tuple[float, float, float]]  # axis -> where the level is first reached, earliest and latest


def sample_rows(data: Comparison, rng: np.random.Generator) -> list[Row]:
    """Steps and labels at which a method's curve first reaches a share of the oracle's score.

    Infinity: not reached. The interval is read off the curve's own: from where its upper end reaches the level to
    where its lower end does; a single run has none. The ratio is the method's over the baseline's, below 1 where the
    method needs fewer; its interval takes the ends of both against each other. Where the baseline does not reach the
    level, its need is at least all that it had: that is put in its place, and the ratio is an upper bound
    (`_ratio_is_bound`).
    """
    rows = []
    for task, reference in data.references.items():
        bands = {m: {axis: _band(data, group, axis, rng) for axis in AXES} for m, group in data.curves[task].items()}
        for share in SHARES:
            level = share * reference.score
            needs = {m: {axis: _need(*bands[m][axis], level) for axis in AXES} for m in bands}
            base = needs.get(data.base) if data.base else None
            for method, need in needs.items():
                runs = data.curves[task][method].runs
                row: Row = {"task": task, "method": method, "share": share, "level": level}
                for axis in AXES:
                    end = data.curves[task][data.base].end(axis) if base and data.base else math.nan
                    row |= _columns(axis, *need[axis]) | _ratio(axis, need, base, end)
                rows.append(row | {"runs": len(runs), "sources": data.sources(runs)})
    return rows


def _band(data: Comparison, group: Curves, axis: str, rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Grid, estimate, and the ends of its interval (the estimate where all runs are equal; NaN of one run)."""
    grid, values = group.over(axis)
    point, (low, high) = data.estimator.point(values), data.estimator.interval([values], rng)
    if len(values) > 1:
        low, high = (np.where(np.isnan(end), point, end) for end in (low, high))
    return grid, point, low, high


def _need(grid: Array, point: Array, low: Array, high: Array, level: float) -> tuple[float, float, float]:
    """Where the curve, its interval's upper end and its lower end first reach the level; NaN where there is none."""
    reached = float(first_reached(grid, point, level))
    if np.isnan(low).any():
        return reached, math.nan, math.nan
    return reached, float(first_reached(grid, high, level)), float(first_reached(grid, low, level))


def _columns(name: str, point: float, low: float, high: float) -> Row:
    return {name: point, f"{name}_low": low, f"{name}_high": high}


def _ratio(axis: str, need: Need, base: Need | None, end: float) -> Row:
    name = f"{axis}_ratio"
    if base is None or (math.isinf(need[axis][0]) and math.isinf(base[axis][0])):  # neither gets there: nothing to say
        return _columns(name, math.nan, math.nan, math.nan) | {f"{name}_is_bound": False}
    point, low, high = need[axis]
    base_point, base_low, base_high = base[axis]
    if need is base:
        return _columns(name, 1.0, math.nan, math.nan) | {f"{name}_is_bound": False}
    with np.errstate(divide="ignore", invalid="ignore"):  # a level reached at step 0: x/0 is infinite, 0/0 undefined
        ratio = np.divide(point, end if math.isinf(base_point) else base_point)
        ends = np.divide(low, base_high), np.divide(high, end if math.isinf(base_low) else base_low)
    if np.isnan(ends).any():
        ends = np.float64(math.nan), np.float64(math.nan)
    return _columns(name, float(ratio), float(ends[0]), float(ends[1])) | {f"{name}_is_bound": math.isinf(base_point)}


def measure_rows(data: Comparison, metrics: Sequence[str], rng: np.random.Generator) -> list[Row]:
    """Measures of the reward model over training, at the steps all seeds of a method cover."""
    rows = []
    for task, methods in data.curves.items():
        for method, group in methods.items():
            for metric in metrics:
                measured = [run for run in group.runs if len(run.series(metric)[0])]
                series = [run.series(metric) for run in measured]
                grid = common_grid([steps for steps, _ in series]) if series else np.empty(0)
                if len(grid):
                    values = np.stack([last_observation(*points, grid) for points in series])
                    origin = {"task": task, "method": method, "metric": metric}
                    rows += _pointwise(data, origin, "steps", grid, values, data.sources(measured), rng)
    return rows


def write_tables(tables: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """One CSV per table that has rows; NaN is an empty cell."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        if rows:
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):  # numpy's floats are floats too
        return "" if math.isnan(value) else f"{value:.6g}"
    return neutral(value) if isinstance(value, str) else value


def neutral(text: str) -> str:
    """A text cell that no spreadsheet takes for a formula: `=`, `+`, `-` and `@` at its start are quoted."""
    return f"'{text}" if text[:1] in FORMULA else text
