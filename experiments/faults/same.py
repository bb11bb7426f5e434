"""Are two runs the same, bit for bit? Wall time aside, and what depends on its digits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pbrl.records.checkpoint import Loaded, load_latest

TIMED = ("seconds", "metrics_bytes")  # of run.json


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without time/*."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [_timeless(row) for row in rows]


def _timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two runs: log rows, and everything in their newest checkpoints and step files."""
    found = []
    first, second = metrics(one), metrics(other)
    if len(first) != len(second):
        found.append(f"metrics.jsonl has {len(first)} and {len(second)} rows")
    found += [f"row {i} of metrics.jsonl" for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
    ours, theirs = load_latest(one), load_latest(other)
    found += unequal("", _content(ours), _content(theirs))
    return found + _different_steps(ours, theirs)


def _different_steps(one: Loaded, other: Loaded) -> list[str]:
    """Names of the step files that differ; the rewards in them are those of the moment of writing and do not count."""
    folders = [loaded.folder.parents[1] / "steps" for loaded in (one, other)]
    names = sorted(set.intersection(*({path.name for path in folder.iterdir()} for folder in folders)))
    if not names:  # how far back they reach depends on when the last checkpoint but one was written
        return ["steps: no file in common"]
    records = json.loads((one.folder / "manifest.json").read_text())["steps"]
    found = []
    for name in names:
        width = records[name.partition("-")[0]]["row_bytes"]
        first, second = (np.fromfile(folder / name, np.uint8).reshape(-1, width) for folder in folders)
        if name.startswith("replay"):  # …, reward, done, timeout: float32 each
            first, second = (np.delete(rows, range(width - 12, width - 8), axis=1) for rows in (first, second))
        if not np.array_equal(first, second):
            found.append(f"steps/{name}")
    return found


def _content(loaded: Loaded) -> dict[str, Any]:
    run = {key: value for key, value in loaded.run.items() if key not in TIMED}
    return {"run": {**run, "last": _timeless(run["last"])}, "state": loaded.state, "arrays": loaded.arrays}


def unequal(name: str, a: Any, b: Any) -> list[str]:
    """Dotted names of the values that differ between nested tables and lists of tensors, arrays and plain values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return [f"{name}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in unequal(f"{name}.{key}", a[key], b[key])]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in unequal(f"{name}[{i}]", x, y)]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return [] if np.array_equal(a, b, equal_nan=a.dtype.kind == "f") else [name]
    return [] if a == b else [name]
