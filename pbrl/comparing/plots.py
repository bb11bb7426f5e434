"""Figures of a comparison, each drawn from rows of its tables and from nothing else.

Colours are those of Okabe and Ito (2008), told apart by the colour-blind; line style and marker differ as well.
matplotlib's object interface is used throughout: no global state, no window, any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from pbrl.comparing.runs import ORACLE
from pbrl.comparing.tables import Row

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Line = Literal["-", "--", "-.", ":"]
LINES: tuple[Line, ...] = ("-", "--", "-.")
MARKS = 6  # markers per curve
COLUMNS = 4  # panels per row
AXIS_NAMES = {"steps": "environment steps", "labels": "labels received"}
METRIC_NAMES = {
    "eval/return": "episode return",
    "eval/success": "success rate",
    "reward/holdout_accuracy": "accuracy on held-out answers",
    "reward/calibration_error": "calibration error",
    "reward/rank_correlation": "rank correlation with task reward",
    "reward/loss": "reward loss (nats)",
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn in every figure."""

    color: str
    line: Line
    marker: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """One look per method, by position; the oracle is grey and dotted. Beyond 7 methods the line style changes."""
    size = len(OKABE_ITO)
    found = {
        m: Look(OKABE_ITO[i % size], LINES[i // size % len(LINES)], MARKERS[i % size]) for i, m in enumerate(methods)
    }
    return found | {ORACLE: Look("#555555", ":", "")}


def curves_figure(rows: Sequence[Row], axis: str, metrics: Mapping[str, str], methods: Sequence[str]) -> Figure:
    """Learning curves, tasks side by side (PARL, figure 2): interquartile mean and interval over seeds.

    Args:
        rows: of the table curves_steps or curves_labels, whose x column is `axis`.
        metrics: each task's metric.
    """
    tasks = _unique(rows, "task")
    figure, panels = _panels(len(tasks))
    for task, panel in zip(tasks, panels, strict=True):
        _draw_curves(panel, [row for row in rows if row["task"] == task], axis, looks(methods))
        panel.set_title(task)
        panel.set_xlabel(AXIS_NAMES[axis])
        panel.set_ylabel(METRIC_NAMES[metrics[task]])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if metrics[task] == "eval/success":
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, _unique(rows, "method"), methods)
    return figure


def health_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """The reward model over training: a row of panels per task, a column per measure."""
    tasks, metrics = _unique(rows, "task"), _unique(rows, "metric")
    figure, panels = _panels(len(tasks) * len(metrics), columns=len(metrics), height=2.3)
    for index, panel in enumerate(panels):
        task, metric = tasks[index // len(metrics)], metrics[index % len(metrics)]
        chosen = [row for row in rows if row["task"] == task and row["metric"] == metric]
        _draw_curves(panel, chosen, "steps", looks(methods))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if task == tasks[0]:
            panel.set_title(METRIC_NAMES[metric], fontsize="medium")
        if task == tasks[-1]:
            panel.set_xlabel(AXIS_NAMES["steps"])
        if metric == metrics[0]:
            panel.set_ylabel(task)
    _legend(figure, _unique(rows, "method"), methods)
    return figure


def samples_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Steps needed to reach each share of the oracle; a method's points end where it does not get further."""
    tasks = _unique(rows, "task")
    figure, panels = _panels(len(tasks))
    styles = looks(methods)
    for task, panel in zip(tasks, panels, strict=True):
        for method in methods:
            chosen = [r for r in rows if (r["task"], r["method"]) == (task, method) and math.isfinite(r["steps"])]
            look = styles[method]
            reached, steps = [r["share"] for r in chosen], [r["steps"] for r in chosen]
            panel.plot(reached, steps, color=look.color, linestyle=look.line, marker=look.marker)
        panel.set_title(task)
        panel.set_xlabel("share of the oracle's score (%)")
        panel.set_ylabel("steps needed")
        shares = _unique(rows, "share")
        panel.set_xticks(shares)
        panel.set_xlim(min(shares) - 0.03, max(shares) + 0.03)
        panel.margins(y=0.1)
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_ylim(bottom=0)
    _legend(figure, methods, methods)
    return figure


def profiles_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Performance profiles: the share of runs above each normalised score; higher is better everywhere."""
    figure, (panel,) = _panels(1, width=5.5, height=3.4)
    _draw_curves(panel, rows, "threshold", looks(methods), "share")
    panel.set_xlabel("τ, share of the oracle's score")
    panel.set_ylabel("share of runs scoring above τ")
    panel.set_ylim(-0.02, 1.02)
    _legend(figure, methods, methods)
    return figure


def aggregate_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Interquartile means of normalised final score and area under the curve, with their intervals."""
    names = {"final_normalized": "final score", "auc_normalized": "area under the curve"}
    figure, panels = _panels(2, height=0.9 + 0.4 * len(methods))
    for (name, title), panel in zip(names.items(), panels, strict=True):
        _draw_intervals(panel, [(r["method"], r[name], r[f"{name}_low"], r[f"{name}_high"]) for r in rows], methods)
        panel.set_title(title)
        panel.set_xlabel("share of the oracle (interquartile mean)")
    panels[1].set_yticklabels([])
    return figure


def improvement_figure(rows: Sequence[Row], base: str, methods: Sequence[str]) -> Figure:
    """P(a method's run beats one of the baseline's), with its interval; 0.5 is a draw."""
    chosen = [row for row in rows if row["second"] == base]
    figure, (panel,) = _panels(1, width=5.5, height=0.9 + 0.4 * len(chosen))
    _draw_intervals(panel, [(r["first"], r["probability"], r["low"], r["high"]) for r in chosen], methods)
    panel.axvline(0.5, color="#555555", linestyle=":", linewidth=1)
    panel.set_xlim(-0.02, 1.02)
    panel.set_xlabel(f"P(method > {base})")
    return figure


def _panels(count: int, columns: int = COLUMNS, width: float = 3.6, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, of the given size in inches each."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(width * columns, height * rows + 0.5), layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06)
    )
    panels = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.xaxis.set_major_locator(MaxNLocator(5))
    return figure, panels


def _draw_curves(panel: Axes, rows: Sequence[Row], axis: str, styles: Mapping[str, Look], value: str = "iqm") -> None:
    for method in _unique(rows, "method"):
        chosen, look = [row for row in rows if row["method"] == method], styles[method]
        x, y, low, high = (np.array([row[key] for row in chosen]) for key in (axis, value, "low", "high"))
        every = max(1, len(x) // MARKS)
        panel.plot(
            x,
            y,
            color=look.color,
            linestyle=look.line,
            marker=look.marker,
            markevery=every,
            markersize=4.5,
            linewidth=1.6,
        )
        panel.fill_between(x, low, high, color=look.color, alpha=0.18, linewidth=0)


def _draw_intervals(panel: Axes, points: Sequence[tuple[str, float, float, float]], methods: Sequence[str]) -> None:
    """One line per (method, value, low, high), the first at the top."""
    styles = looks(methods)
    for height, (method, value, low, high) in enumerate(points):
        panel.plot(
            [low, high], [height, height], color=styles[method].color, linewidth=7, alpha=0.35, solid_capstyle="butt"
        )
        panel.plot([value], [height], color=styles[method].color, marker=styles[method].marker, markersize=7)
    panel.set_yticks(range(len(points)), [method for method, *_ in points])
    panel.set_ylim(len(points) - 0.5, -0.5)


def _legend(figure: Figure, shown: Iterable[str], methods: Sequence[str]) -> None:
    """One legend below all panels, the oracle last."""
    styles, names = looks(methods), [m for m in (*methods, ORACLE) if m in set(shown)]
    handles = [Line2D([], [], color=styles[m].color, linestyle=styles[m].line, marker=styles[m].marker) for m in names]
    columns = max(1, int(figure.get_figwidth() * 9 / (6 + max(map(len, names)))))  # about 9 letters to the inch
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), columns), frameon=False)


def _unique(rows: Sequence[Row], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))
