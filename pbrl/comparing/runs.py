"""Finished runs, read back from their folders or from W&B, and sorted into tasks and methods that may be compared.

A run's folder holds `config.yaml` (resolved, with the names chosen on the command line under `choices`),
`metrics.jsonl` (one row per line, each with `env_step`) and, once finished, `summary.json`. All three may be a
stranger's: they are read as plain data of bounded size, nothing of theirs is imported or followed (where a constructor
is ours, its default values are looked at), and no text of theirs is shown before `shown` has made it one short line.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import get_object

from pbrl.comparing.statistics import Array
from pbrl.files import is_complete, read_yaml
from pbrl.upgrade import upgrade

ORACLE = "oracle"  # the updater that is paid the task's own reward
UNEQUAL = 1.05  # times as many questions as another method's are told
MUST_MATCH = ("total_steps", "feedback.budget", "teacher")  # in all runs on one task but the oracle's
NO_JUDGEMENT = {  # settings of a teacher that say where and how it is reached, not how it answers
    *("seed", "env", "url", "timeout", "retries", "backoff", "pairs_per_request"),
    *("host", "port", "lease", "undo_seconds", "task"),
}
METHOD_CHOICES = ("query", "teacher", "agent", "reward")  # named in the label where runs of one updater differ in them
PARTS = ("updater", *METHOD_CHOICES, "feedback", "pretraining", "segment_length")  # whose values are a method's
ELSEWHERE = ("run_dir", "resume", "trust", "threads", "device", "logger", "launcher")  # where and how a run is computed

HUGE = 1e100  # no metric: sums and squares of such numbers overflow
LONGEST = 160  # characters of a text from a run that is shown
LARGEST = 256 * 2**20  # bytes of a log that is read
LARGEST_CONFIG = 2**20  # bytes
OURS = ("pbrl", "envs", "teachers")  # packages whose constructors may be looked at
ABSENT = "absent"


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
        """Labels received before the evaluation at each of `steps`, float [n]; at infinity: all.

        In the order of the rows: a session that takes no steps of its own comes after the evaluation at its step, one
        that takes some is logged where they end, before the evaluation there.
        """
        labels, at = 0.0, {}
        for row in self.rows:
            if _is_number(row.get("feedback/labels")):
                labels = float(row["feedback/labels"])
            if "eval/return" in row:
                at[row["env_step"]] = labels
        return np.array([at.get(step, labels) for step in steps])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < HUGE


def shown(text: Any, longest: int = LONGEST) -> str:
    """A text that came with a run as one printable line of at most `longest` characters."""
    line = "".join(letter if letter.isprintable() else "�" for letter in str(text)[: longest + 1])
    return line if len(line) <= longest else line[: longest - 1] + "…"


def read_run(folder: Path) -> Run:
    """The run stored in `folder`.

    Raises:
        ComparisonError: in one line, if one of its files is no plain file or too large, its config names no choices, or
            a line of its log (other than a torn last one) is broken.
    """
    try:
        _refuse_link(folder / "config.yaml", LARGEST_CONFIG)
        config = read_yaml(folder / "config.yaml")
        summary_file = folder / "summary.json"
        summary = json.loads(_text(summary_file, LARGEST_CONFIG)) if summary_file.exists() else {}
    except (ValueError, OSError, RecursionError) as error:
        raise ComparisonError(f"{folder}: its config or summary is damaged ({shown(error)})") from error
    _check_config(config, str(folder))
    return Run(str(folder), config, read_rows(folder / "metrics.jsonl"), is_complete(summary, config))


def _text(path: Path, largest: int = LARGEST) -> str:
    """A file's text; a link, pipe or device is not opened.

    Raises:
        ComparisonError: if it is not a plain file of bounded size.
    """
    _refuse_link(path, largest)
    return path.read_text(encoding="utf-8", errors="replace")


def _refuse_link(path: Path, largest: int) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > largest:
        raise ComparisonError(
            f"{shown(path)}: expected a plain file of at most {largest // 2**20} MiB, not a link or device"
        )


def _check_config(config: Any, source: str) -> None:
    choices = config.get("choices") if isinstance(config, Mapping) else None
    if not isinstance(choices, Mapping) or not {"env", "updater"} <= set(choices) or not _is_seed(config.get("seed")):
        raise ComparisonError(
            f"{shown(source)}: its config has no seed (a whole number), choices.env and choices.updater; did "
            "pbrl.train write it?"
        )
    if not isinstance(config.get("env") or {}, Mapping):
        raise ComparisonError(f"{shown(source)}: its config's env is no table")


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**63


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl.

    A torn last line (the run was killed while writing, or writes just now) is dropped. Where env_step goes back, the
    run was resumed from a checkpoint, and what it had logged beyond that step is dropped: it was done again.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = _text(path).splitlines()
    except OSError as error:
        raise ComparisonError(f"{shown(path)}: {shown(error)}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = row["env_step"]
            if not _is_number(step) or step < 0:
                raise TypeError(f"env_step {shown(step)}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                break
            raise ComparisonError(
                f"{shown(path)}, line {number}: expected a JSON object with env_step ({shown(repr(error))})"
            ) from error
        while rows and rows[-1]["env_step"] > step:
            rows.pop()
        rows.append(row)
    return rows


def find_runs(paths: Iterable[Path], damaged: list[str] | None = None) -> list[Run]:
    """Every run in or below the given folders, in the order of their paths, each once.

    Args:
        damaged: receives a line for each run that cannot be read, which is then left out; None: the first one raises.

    Raises:
        ComparisonError: if there is no run below one of the folders, or none that can be read.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        below = sorted(log.parent for log in path.rglob("metrics.jsonl") if (log.parent / "config.yaml").exists())
        if not below:
            raise ComparisonError(f"{path}: no run in or below it (a folder with config.yaml and metrics.jsonl)")
        folders.update({folder.resolve(): folder for folder in below})
    runs = []
    for folder in folders.values():
        try:
            runs.append(read_run(folder))
        except ComparisonError as error:
            if damaged is None:
                raise
            damaged.append(f"Left out, damaged: {shown(error)}")
    if damaged and not runs:
        raise ComparisonError("no run can be read\n  " + "\n  ".join(damaged))
    return runs


def wandb_runs(project: str, timeout: int = 30, foreign: list[str] | None = None) -> list[Run]:
    """Every run of the W&B project "entity/project", through W&B's API.

    Args:
        foreign: receives a line for each run that pbrl.train did not write, which is left out; None: the first raises.

    Raises:
        ComparisonError: if W&B cannot be reached, does not know the project or accepts no login.
    """
    import wandb
    from requests.exceptions import RequestException

    runs = []
    try:
        for found in wandb.Api(timeout=timeout).runs(project):
            try:
                runs.append(_from_wandb(found))
            except ComparisonError as error:
                if foreign is None:
                    raise
                foreign.append(f"Left out: {shown(error)}")
        return runs
    except ComparisonError:
        raise
    except (wandb.errors.Error, RequestException, ValueError) as error:
        raise ComparisonError(
            f"W&B project {project!r} could not be read ({type(error).__name__}: {error}). Check the network, the name "
            "(entity/project) and `wandb login`, or compare the runs' local folders without --wandb."
        ) from error


def _from_wandb(run: Any) -> Run:
    _check_config(run.config, run.url)
    rows = sorted((row for row in run.scan_history() if row.get("env_step") is not None), key=lambda r: r["env_step"])
    # W&B calls a run finished that has saved itself after Ctrl-C
    return Run(run.url, run.config, rows, run.state == "finished" and run.summary.get("complete") is not False)


def without_copies(local: Sequence[Run], remote: Sequence[Run], notes: list[str] | None = None) -> list[Run]:
    """Local runs, then those at W&B that are not one of them: their configs differ in more than ELSEWHERE.

    Args:
        notes: receives a line for each copy that is left out.
    """

    def identity(run: Run) -> str:
        settings = {key: value for key, value in run.config.items() if key not in ELSEWHERE}
        settings["choices"] = {key: value for key, value in run.config["choices"].items() if key not in ELSEWHERE}
        return json.dumps(_plain(settings), sort_keys=True, default=str)

    known = {identity(run): run.source for run in local}
    kept = list(local)
    for run in remote:
        if (original := known.get(identity(run))) is None:
            kept.append(run)
        elif notes is not None:
            notes.append(f"Left out, a copy of {shown(original)}: {shown(run.source)}")
    return kept


def _plain(value: Any) -> Any:
    """A setting as both a YAML file and W&B have it: 3 is 3.0."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return float(value) if _is_number(value) else value


@dataclass(frozen=True)
class Selection:
    """The runs to compare: `groups[task][method]`, the oracle is a method too; and what was left out."""

    groups: dict[str, dict[str, list[Run]]]
    names: dict[str, str]  # a run's source -> its short name in every table ("r01")
    notes: list[str]
    method_keys: tuple[str, ...]  # what the methods' labels are made of
    prefix: str = ""  # the folder that all labels began with, left off


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
    prefix = _common_folder({method_label(run, keys) for run in kept if run.updater != ORACLE})
    groups = {task: _by_method(members, keys, baseline, prefix) for task, members in sorted(by_task.items())}
    problems += [line for task, methods in groups.items() for line in _repeated_seeds(task, methods)]
    if problems and not allow_mixed:
        raise ComparisonError(
            "these runs are not comparable:\n  " + "\n  ".join(problems) + "\nCompare them apart, make the difference "
            "part of the method (--method-keys updater,feedback.budget), or mix them knowingly with --allow-mixed."
        )
    notes += [line for task, methods in groups.items() for line in _averaged(task, methods, keys)]
    notes += [line for task, methods in groups.items() for line in _unequal(task, methods)]
    ordered = [run for methods in groups.values() for members in methods.values() for run in members]
    names = {run.source: f"r{number:02d}" for number, run in enumerate(ordered, start=1)}
    return Selection(groups, names, notes + [f"Mixed knowingly: {line}" for line in problems], keys, prefix)


def _averaged(task: str, methods: Mapping[str, Sequence[Run]], keys: Sequence[str]) -> list[str]:
    """A line for each method whose runs name different values for one key: are they one method?"""
    lines = []
    for method, members in methods.items():
        parts = ("agent",) if members[0].updater == ORACLE else PARTS  # the oracle is asked and fitted nothing
        tables = [_values({part: run.config.get(part) for part in parts if part in run.config}) for run in members]
        found: dict[str, set[str]] = defaultdict(set)
        for name in {name for table in tables for name in table}:
            for run, table in zip(members, tables, strict=True):
                if name.split(".")[0] in run.config:
                    found[name].add(table[name] if name in table else _value(_unnamed(run.config, name)))
        differing = sorted(name for name in found if len(found[name]) > 1)
        if differing:
            values = shown(", ".join(sorted(found[differing[0]])))
            apart = shown(",".join([*keys, differing[0]]))
            lines.append(
                f"Averaged as one method, {method} on {task}, although its runs differ in "
                f"{shown(', '.join(differing))} ({values}); to tell them apart: --method-keys {apart}"
            )
    return lines


def _unequal(task: str, methods: Mapping[str, Sequence[Run]]) -> list[str]:
    """A line if the methods were not asked alike: a budget may outlast a run whose sessions take steps of their own."""
    asked = {
        method: float(np.mean([run.last("feedback/asked") for run in members]))
        for method, members in methods.items()
        if members[0].updater != ORACLE
    }
    if not asked or not max(asked.values()) > UNEQUAL * min(asked.values()):
        return []
    listed = ", ".join(f"{method} {number:.0f}" for method, number in asked.items())
    return [f"Asked unequally on {task}, questions per run: {listed}"]


def _values(node: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """The values of nested tables by their dotted paths."""
    found: dict[str, str] = {}
    for name, value in node.items():
        path = f"{above}{name}"
        found |= _values(value, f"{path}.") if isinstance(value, Mapping) else {path: _value(value)}
    return found


def _unnamed(config: Mapping[str, Any], path: str) -> Any:
    """The value of a key that a config of an earlier version does not name, as a resumed run would take it."""
    *above, name = path.split(".")
    try:
        node: Any = copy.deepcopy(dict(config))
        upgrade(node)
        for part in above:
            node = node[part]
        if name not in node and str(node["_target_"]).split(".")[0] in OURS:
            node = {name: inspect.signature(get_object(node["_target_"])).parameters[name].default}
        value = node[name]
    except Exception:  # there is no such part, it has moved or takes no such: a stranger's config may be anything
        return ABSENT
    return ABSENT if value is inspect.Parameter.empty else value


def _value(value: Any) -> str:
    return str(float(value) if _is_number(value) else value)  # 3 is 3.0


def _common_folder(labels: Iterable[str]) -> str:
    """What comes up to a slash at the start of every label: "first-light/"; empty if there is a single label."""
    folders = [label.rpartition("/")[0] for label in labels]
    return f"{folders[0]}/" if len(folders) > 1 and folders[0] and len(set(folders)) == 1 else ""


def _usable(runs: Sequence[Run], allow_mixed: bool) -> tuple[list[Run], list[str]]:
    notes = [
        f"Left out, no evaluation logged yet: {shown(run.source)}"
        for run in runs
        if not len(run.series("eval/return")[0])
    ]
    kept = [run for run in runs if len(run.series("eval/return")[0])]
    unfinished = [shown(run.source) for run in kept if not run.complete]
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
        names = sorted({name for option in options for name in option}, key=str)
        shown_of = [
            {name: str(option[name] if name in option else _unnamed(run.config, f"env.{name}")) for name in names}
            for run, option in zip(members, options, strict=True)
        ]
        differing = [name for name in names if len({values[name] for values in shown_of}) > 1]
        for run, values in zip(members, shown_of, strict=True):
            suffix = ", ".join(f"{name}={values[name]}" for name in differing)
            tasks[shown(f"{choice} ({suffix})" if suffix else choice)].append(run)
    return dict(tasks)


def _differing(by_task: Mapping[str, Sequence[Run]]) -> list[str]:
    values: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for task, runs in by_task.items():
        for run in (run for run in runs if run.updater != ORACLE):
            for name in METHOD_CHOICES:
                values[name, task, run.updater].add(str(run.setting(name)))
    return [name for name in METHOD_CHOICES if any(len(v) > 1 for key, v in values.items() if key[0] == name)]


def method_label(run: Run, keys: Sequence[str]) -> str:
    """A run's method, as it is shown: its choices by value, other settings as name=value."""
    if run.updater == ORACLE:
        return ORACLE
    named = run.config["choices"]
    parts = (str(named[k]) if k in named else f"{k.rpartition('.')[2]}={shown(run.setting(k))}" for k in keys)
    return shown(", ".join(parts))


def _by_method(runs: Sequence[Run], keys: Sequence[str], baseline: str, prefix: str) -> dict[str, list[Run]]:
    methods: dict[str, list[Run]] = defaultdict(list)
    labels = {run.source: method_label(run, keys) for run in runs}
    for run in sorted(
        runs, key=lambda run: (baseline not in (run.updater, labels[run.source]), labels[run.source], run.seed)
    ):
        methods[labels[run.source].removeprefix(prefix)].append(run)
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
            lines.append(f"{task}: {name} is {_listed(sources)}")
    return lines + _unlike_teachers(task, runs, keys)


def _unlike_teachers(task: str, runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """A line for each setting in which the teachers of one option differ."""
    by_option: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.updater != ORACLE and isinstance(run.config.get("teacher"), Mapping):
            by_option[str(run.setting("teacher"))].append(run)
    lines = []
    for members in by_option.values():
        tables = [_values({"teacher": run.config["teacher"]}) for run in members]
        for name in sorted({name for table in tables for name in table} - set(keys)):
            if NO_JUDGEMENT & set(name.split(".")):
                continue
            sources: dict[str, list[str]] = defaultdict(list)
            for run, table in zip(members, tables, strict=True):
                value = table[name] if name in table else _value(_unnamed(run.config, name))
                sources[value].append(run.source)
            if len(sources) > 1:
                lines.append(f"{task}: {name} is {_listed(sources)}")
    return lines


def _listed(sources: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{shown(value)} in {', '.join(map(shown, where))}" for value, where in sources.items())


def _repeated_seeds(task: str, methods: Mapping[str, Sequence[Run]]) -> list[str]:
    lines = []
    for method, runs in methods.items():
        for seed, count in Counter(run.seed for run in runs).items():
            if count > 1:
                where = ", ".join(shown(run.source) for run in runs if run.seed == seed)
                lines.append(f"{task}, {method}: seed {seed} occurs {count} times, in {where}")
    return lines
