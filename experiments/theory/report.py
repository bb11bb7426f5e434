"""What a claim's check hands back, and how it is written down: table.md, one CSV and one figure per claim."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

# Okabe and Ito's palette: told apart by colour-blind readers; black last
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "x"]


@dataclass(frozen=True)
class Finding:
    """One measured number beside what theory says of it."""

    quantity: str
    measured: str
    theory: str
    holds: bool | None  # None: reported, not claimed


@dataclass(frozen=True)
class Result:
    """The check of one claim."""

    key: str  # "i" … "ix"
    title: str
    findings: list[Finding]
    rows: list[dict]  # the CSV: one dict per measurement
    words: str  # what it means, in a few sentences
    draw: Callable[[Axes], None]


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Least-squares slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def interval(values: ArrayLike, seed: int = 0) -> tuple[float, float, float]:
    """Mean and a 95 % bootstrap interval of it (percentiles over 10,000 resamples)."""
    sample = np.asarray(values, dtype=float)
    index = np.random.default_rng(seed).integers(len(sample), size=(10_000, len(sample)))
    low, high = np.percentile(sample[index].mean(1), [2.5, 97.5])
    return float(sample.mean()), float(low), float(high)


def lines(axes: Axes, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], x: str, y: str) -> None:
    """Log-log curves with markers, labels and a legend."""
    for (name, (xs, ys)), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        axes.loglog(xs, ys, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8, frameon=False)


def write(results: list[Result], out: Path, command: str) -> Path:
    """Write everything to `out`; returns the table's path."""
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# The papers' claims, where the truth is known", f"Written by `{command}`. Float64, one thread."]
    for result in results:
        stem = f"claim_{result.key}"
        _write_csv(out / f"{stem}.csv", result.rows)
        _write_figure(out / f"{stem}.png", result)
        parts += [f"## ({result.key}) {result.title}", _markdown(result.findings), result.words]
        parts.append(f"Data: [{stem}.csv]({stem}.csv), figure: [{stem}.png]({stem}.png).")
    table = out / "table.md"
    table.write_text("\n\n".join(parts) + "\n")
    return table


def _markdown(findings: list[Finding]) -> str:
    verdict = {True: "yes", False: "**no**", None: "–"}
    rows = [f"| {f.quantity} | {f.measured} | {f.theory} | {verdict[f.holds]} |" for f in findings]
    return "\n".join(["| quantity | measured | theory or requirement | holds |", "|---|---|---|---|", *rows])


def _write_csv(path: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _write_figure(path: Path, result: Result) -> None:
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    result.draw(axes)
    axes.set_title(f"({result.key}) {result.title}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
