"""The numbers of a comparison, as tables of plain rows: each table is a CSV, and all that the report shows is a row.

An interval (`_low`, `_high`) is the 95 % percentile interval of a bootstrap over seeds, stratified by task; it is NaN
with a single seed. `iqm` is the interquartile mean over seeds. `sources` are the runs' short names.
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
    bootstrap_interval,
    common_grid,
    first_reached,
    improvement_interval,
    interquartile_mean,
    last_observation,
    percentile_interval,
    performance_profile,
    probability_of_improvement,
    resample,
)

Row = dict[str, Any]
Tables = dict[str, list[Row]]
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)  # of the oracle's score
HEALTH = ("reward/holdout_accuracy", "reward/calibration_error", "reward/rank_correlation", "reward/loss")
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
        "improvement": improvement_rows(data, rng),
        "profiles": profile_rows(data, shared, rng),
        "samples": sample_rows(data, rng),
        "health": health_rows(data, rng),
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
    """Interquartile mean over seeds and its interval at every point of the grid ("steps" or "labels")."""
    rows = []
    for task, methods in data.curves.items():
        for method, group in methods.items():
            origin = {"task": task, "method": method}
            rows += _pointwise(origin, axis, *group.over(axis), data.sources(group.runs), data.repetitions, rng)
        if axis == "steps" and task in data.references:
            oracle, origin = data.references[task], {"task": task, "method": ORACLE}
            rows += _pointwise(origin, axis, oracle.steps, oracle.by_step, oracle.sources, data.repetitions, rng)
    return rows


def _pointwise(
    origin: Row, axis: str, grid: Array, values: Array, sources: str, repetitions: int, rng: np.random.Generator
) -> list[Row]:
    """A row per grid point for `values` [runs, points]."""
    low, high = bootstrap_interval([values], interquartile_mean, repetitions, rng)
    columns = (axis, "iqm", "low", "high")
    return [
        origin | dict(zip(columns, point, strict=True)) | {"runs": len(values), "sources": sources}
        for point in zip(grid, interquartile_mean(values), low, high, strict=True)
    ]


def _summary(name: str, strata: Sequence[Array], repetitions: int, rng: np.random.Generator) -> Row:
    """Interquartile mean of the pooled runs and its interval, as columns name, name_low, name_high."""
    low, high = bootstrap_interval(strata, interquartile_mean, repetitions, rng)
    point = interquartile_mean(np.concatenate(list(strata)))
    return {name: float(point), f"{name}_low": float(low), f"{name}_high": float(high)}


def score_rows(data: Comparison, rng: np.random.Generator) -> list[Row]:
    """Final score and area under the curve of every method on every task, raw and in shares of the oracle."""
    rows = []
    for task, methods in data.curves.items():
        for method, group in methods.items():
            row: Row = {"task": task, "method": method, "metric": data.metrics[task], "runs": len(group.runs)}
            for name, values in (("final", group.final), ("auc", group.area)):
                summary = _summary(name, [values], data.repetitions, rng)
                shares = {
                    k.replace(name, f"{name}_normalized"): v / data.oracle_score(task) for k, v in summary.items()
                }
                row |= summary | shares
            rows.append(row | {"sources": data.sources(group.runs)})
    return rows


def aggregate_rows(data: Comparison, tasks: Sequence[str], rng: np.random.Generator) -> list[Row]:
    """Normalised scores over all of `tasks`, each run counted once."""
    rows = []
    for method in data.methods if tasks else []:
        row = _origin(data, tasks, method)
        for name, scores in (("final_normalized", "final"), ("auc_normalized", "area")):
            row |= _summary(name, _normalized(data, tasks, method, scores), data.repetitions, rng)
        rows.append(row)
    return rows


def profile_rows(data: Comparison, tasks: Sequence[str], rng: np.random.Generator) -> list[Row]:
    """Performance profiles: the share of runs whose normalised final score is above each threshold."""
    rows = []
    for method in data.methods if tasks else []:
        strata = _normalized(data, tasks, method, "final")
        low, high = bootstrap_interval(strata, _profile, data.repetitions, rng)
        for point in zip(THRESHOLDS, _profile(np.concatenate(strata), 0), low, high, strict=True):
            numbers = dict(zip(("threshold", "share", "low", "high"), point, strict=True))
            rows.append(_origin(data, tasks, method) | numbers)
    return rows


def _profile(scores: Array, axis: int) -> Array:
    return performance_profile(scores, THRESHOLDS, axis=axis)


def _normalized(data: Comparison, tasks: Sequence[str], method: str, scores: str) -> list[Array]:
    return [getattr(data.curves[task][method], scores) / data.oracle_score(task) for task in tasks]


def _origin(data: Comparison, tasks: Sequence[str], *methods: str) -> Row:
    runs = [run for task in tasks for method in methods for run in data.curves[task][method].runs]
    named = {"method": methods[0]} if len(methods) == 1 else dict(zip(("first", "second"), methods, strict=True))
    return named | {"tasks": " ".join(tasks), "runs": len(runs), "sources": data.sources(runs)}


def improvement_rows(data: Comparison, rng: np.random.Generator) -> list[Row]:
    """P(first > second) of final scores, for every ordered pair of methods, on the tasks both have."""
    rows = []
    for first in data.methods:
        for second in data.methods:
            tasks = [task for task, groups in data.curves.items() if first in groups and second in groups]
            if first == second or not tasks:
                continue
            x, y = ([data.curves[task][method].final for task in tasks] for method in (first, second))
            low, high = improvement_interval(x, y, data.repetitions, rng)
            numbers = {"probability": probability_of_improvement(x, y), "low": low, "high": high}
            rows.append(_origin(data, tasks, first, second) | numbers)
    return rows


Need = dict[str, tuple[float, Array | None]]  # axis -> where the level is first reached, and its bootstrap samples


def sample_rows(data: Comparison, rng: np.random.Generator) -> list[Row]:
    """Steps and labels at which a method's interquartile-mean curve first reaches a share of the oracle's score.

    Infinity: not reached. The ratio is the method's over the baseline's, below 1 where the method needs fewer. Where
    the baseline does not reach the level, its need is at least all that was compared: that is put in its place, and
    the ratio is an upper bound (`_ratio_is_bound`). The same holds in each bootstrap sample.
    """
    rows = []
    for task, reference in data.references.items():
        for share in SHARES:
            level = share * reference.score
            needs = {method: _needs(group, level, data.repetitions, rng) for method, group in data.curves[task].items()}
            base = needs.get(data.base) if data.base else None
            for method, need in needs.items():
                runs = data.curves[task][method].runs
                row: Row = {"task": task, "method": method, "share": share, "level": level}
                for axis in need:
                    end = data.curves[task][method].over(axis)[0][-1]
                    row |= _columns(axis, *need[axis]) | _ratio(axis, need, base, float(end))
                rows.append(row | {"runs": len(runs), "sources": data.sources(runs)})
    return rows


def _needs(group: Curves, level: float, repetitions: int, rng: np.random.Generator) -> Need:
    found: Need = {}
    for axis in ("steps", "labels"):
        grid, values = group.over(axis)
        point = float(first_reached(grid, interquartile_mean(values), level))
        samples = None
        if len(values) > 1:
            samples = first_reached(grid, interquartile_mean(resample([values], repetitions, rng)[0], axis=1), level)
        found[axis] = point, samples
    return found


def _columns(name: str, point: float, samples: Array | None) -> Row:
    """Point and interval; no interval without samples, or where one is undefined (zero over zero)."""
    low, high = math.nan, math.nan
    if samples is not None and not np.isnan(samples).any():
        low, high = (float(end) for end in percentile_interval(samples))
    return {name: point, f"{name}_low": low, f"{name}_high": high}


def _ratio(axis: str, need: Need, base: Need | None, end: float) -> Row:
    name = f"{axis}_ratio"
    if base is None:
        return _columns(name, math.nan, None) | {f"{name}_is_bound": False}
    (point, samples), (base_point, base_samples) = need[axis], base[axis]
    if math.isinf(point) and math.isinf(base_point):  # neither gets there: nothing to say
        return _columns(name, math.nan, None) | {f"{name}_is_bound": False}
    drawn = None
    with np.errstate(divide="ignore", invalid="ignore"):  # a level reached at step 0: x/0 is infinite, 0/0 undefined
        ratio = float(np.divide(point, min(base_point, end)))
        if need is not base and samples is not None and base_samples is not None:
            drawn = np.divide(samples, np.minimum(base_samples, end))
    return _columns(name, ratio, drawn) | {f"{name}_is_bound": math.isinf(base_point)}


def health_rows(data: Comparison, rng: np.random.Generator) -> list[Row]:
    """The reward model's own measures over training, at the sessions all seeds of a method cover."""
    rows = []
    for task, methods in data.curves.items():
        for method, group in methods.items():
            for metric in HEALTH:
                measured = [run for run in group.runs if len(run.series(metric)[0])]
                series = [run.series(metric) for run in measured]
                grid = common_grid([steps for steps, _ in series]) if series else np.empty(0)
                if len(grid):
                    values = np.stack([last_observation(*points, grid) for points in series])
                    origin = {"task": task, "method": method, "metric": metric}
                    rows += _pointwise(origin, "steps", grid, values, data.sources(measured), data.repetitions, rng)
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
    return value
