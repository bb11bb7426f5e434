"""Figures of a comparison, each drawn from rows of its tables and from nothing else.

Every panel has the same size in inches, whatever stands around it: the figure grows by what its labels and its legend,
which lies below all panels, really need. Twelve methods have twelve colours, distinct also to the colour-blind: six of
Okabe and Ito (2008), and six found by search; line style and marker differ as well. Text is never read as TeX.
matplotlib's object interface is used throughout: no global state, no window, any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from pbrl.comparing.runs import ORACLE
from pbrl.comparing.tables import Row

COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#330000", "#000099", "#990000", "#9966FF", "#660033", "#3333CC"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p", "h")
Line = Literal["-", "--", "-.", ":"]
LINES: tuple[Line, ...] = ("-", "--", "-.")
MARKS = 6  # markers per curve
CROWD = 4  # methods in a panel whose bands can be told apart
COLUMNS = 4  # panels per row
WIDTH, HEIGHT = 2.8, 2.1  # inches, of a panel
GAP = 0.12  # inches between what is drawn and what is around it
LONGEST = 32  # letters of a name in a figure
AXIS_NAMES = {"steps": "environment steps", "labels": "labels received"}
METRIC_NAMES = {
    "eval/return": "episode return",
    "eval/success": "success rate",
    "reward/holdout_accuracy": "accuracy on new answers",
    "reward/calibration_error": "calibration error",
    "reward/rank_correlation": "rank correlation",
    "reward/loss": "reward loss (nats)",
    "reward/gap": "gap (standard deviations)",
    "reward/learned_per_step": "learned reward per step",
    "reward/true_per_step": "task reward per step",
}
SHARES = ("eval/success", "reward/holdout_accuracy", "reward/calibration_error")  # between 0 and 1


@dataclass(frozen=True)
class Look:
    """How a method is drawn in every figure."""

    color: str
    line: Line
    marker: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """One look per method, by position; the oracle is grey and dotted. Beyond 12 methods colours come again, dashed."""
    size = len(COLORS)
    found = {m: Look(COLORS[i % size], LINES[i // size % len(LINES)], MARKERS[i % size]) for i, m in enumerate(methods)}
    return found | {ORACLE: Look("#666666", ":", "")}


def short(name: str) -> str:
    """A name of at most LONGEST letters, cut in its middle."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def curves_figure(rows: Sequence[Row], axis: str, metrics: Mapping[str, str], methods: Sequence[str]) -> Figure:
    """Learning curves, tasks side by side (PARL, figure 2): the estimate over seeds and its interval.

    Args:
        rows: of the table curves_steps or curves_labels, whose x column is `axis`.
        metrics: each task's metric.
    """
    tasks = _unique(rows, "task")
    figure, panels = _panels(len(tasks))
    for task, panel in zip(tasks, panels, strict=True):
        _draw_curves(panel, [row for row in rows if row["task"] == task], axis, looks(methods))
        _title(panel, task)
        panel.set_xlabel(AXIS_NAMES[axis])
        panel.set_ylabel(METRIC_NAMES[metrics[task]])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if metrics[task] in SHARES:
            _share_axis(panel)
        else:
            panel.yaxis.set_major_formatter(EngFormatter(sep=""))
    return _arranged(figure, panels, _unique(rows, "method"), methods)


def measures_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Measures of the reward model over training: a row of panels per task, a column per measure."""
    tasks, metrics = _unique(rows, "task"), _unique(rows, "metric")
    figure, panels = _panels(len(tasks) * len(metrics))
    for index, panel in enumerate(panels):
        task, metric = tasks[index // len(metrics)], metrics[index % len(metrics)]
        chosen = [row for row in rows if row["task"] == task and row["metric"] == metric]
        _draw_curves(panel, chosen, "steps", looks(methods))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if metric in SHARES:
            _share_axis(panel)
        if task == tasks[0]:
            _title(panel, METRIC_NAMES[metric])
        if task == tasks[-1]:
            panel.set_xlabel(AXIS_NAMES["steps"])
        if metric == metrics[0]:
            panel.set_ylabel(short(task), parse_math=False)
    return _arranged(figure, panels, _unique(rows, "method"), methods, columns=len(metrics))


def samples_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Steps needed to reach each share of the oracle; a method's points end where it does not get further.

    Only tasks on which a method gets to one of the shares have a panel.
    """
    reached = [row for row in rows if math.isfinite(row["steps"])]
    tasks, shares, styles = _unique(reached, "task"), _unique(rows, "share"), looks(methods)
    figure, panels = _panels(len(tasks))
    for task, panel in zip(tasks, panels, strict=True):
        for method in methods:
            chosen, look = [r for r in reached if (r["task"], r["method"]) == (task, method)], styles[method]
            x, y = [r["share"] for r in chosen], [r["steps"] for r in chosen]
            panel.plot(x, y, color=look.color, linestyle=look.line, marker=look.marker)
        _title(panel, task)
        panel.set_xlabel("share of the oracle's score (%)")
        panel.set_ylabel("environment steps needed")
        panel.set_xticks(shares)
        panel.set_xlim(min(shares) - 0.03, max(shares) + 0.03)
        panel.margins(y=0.1)
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_ylim(bottom=0)
    return _arranged(figure, panels, _unique(reached, "method"), methods)


def profiles_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Performance profiles: the share of runs above each normalised score; higher is better everywhere."""
    figure, panels = _panels(1)
    _draw_curves(panels[0], rows, "threshold", looks(methods), "share")
    panels[0].set_xlabel("τ, share of the oracle's score")
    panels[0].set_ylabel("runs scoring above τ")
    _share_axis(panels[0])
    return _arranged(figure, panels, methods, methods, width=4.2, height=2.8)


def aggregate_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Normalised final score and area under the curve, with their intervals."""
    names = {"final_normalized": "final score", "auc_normalized": "area under the curve"}
    figure, panels = _panels(2)
    for (name, title), panel in zip(names.items(), panels, strict=True):
        _draw_intervals(panel, [(r["method"], r[name], r[f"{name}_low"], r[f"{name}_high"]) for r in rows], methods)
        _title(panel, title)
        panel.set_xlabel("share of the oracle's")
    panels[1].set_yticklabels([])
    return _arranged(figure, panels, (), methods, height=0.25 * len(rows) + 0.1)


def improvement_figure(rows: Sequence[Row], base: str, methods: Sequence[str]) -> Figure:
    """P(a method's run beats one of the baseline's), with its interval; 0.5 is a draw."""
    chosen = [row for row in rows if row["second"] == base]
    figure, panels = _panels(1)
    _draw_intervals(panels[0], [(r["first"], r["probability"], r["low"], r["high"]) for r in chosen], methods)
    panels[0].axvline(0.5, color="#666666", linestyle=":", linewidth=1)
    panels[0].set_xlim(-0.03, 1.03)
    panels[0].set_xlabel(f"P(method > {short(base)})", parse_math=False)
    return _arranged(figure, panels, (), methods, height=0.25 * len(chosen) + 0.1)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, which `_arranged` puts in their places when all is drawn."""
    figure = Figure()
    FigureCanvasAgg(figure)  # measures text
    panels = [figure.add_axes((0.0, 0.0, 1.0, 1.0), label=str(index)) for index in range(count)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=8)
        panel.xaxis.label.set_fontsize(9)
        panel.yaxis.label.set_fontsize(9)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.yaxis.set_major_locator(MaxNLocator(5))
    return figure, panels


def _title(panel: Axes, text: str) -> None:
    panel.set_title(short(text), fontsize=10, parse_math=False)


def _share_axis(panel: Axes) -> None:
    """From 0 to 100 %, so that panels can be compared and noise looks like noise."""
    panel.set_ylim(0, 1)
    panel.set_yticks(np.linspace(0, 1, 6))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    for line in panel.lines:
        line.set_clip_on(line.get_marker() in ("", "None"))  # markers at 0 and 1 in full


def _arranged(
    figure: Figure,
    panels: Sequence[Axes],
    shown: Iterable[str],
    methods: Sequence[str],
    columns: int = COLUMNS,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Figure:
    """Give every panel `width` × `height` inches and the figure what labels and the legend of `shown` need around."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure.set_size_inches(20, 20)  # while measuring, nothing is squeezed
    for panel in panels:
        panel.set_position((0.3, 0.3, width / 20, height / 20))
    margins = np.array([_margins(figure, panel) for panel in panels])  # left, bottom, right, top in inches
    left = [max(margins[column::columns, 0]) for column in range(columns)]
    right = [max(margins[column::columns, 2]) for column in range(columns)]
    bottom = [max(margins[row * columns : (row + 1) * columns, 1]) for row in range(rows)]
    top = [max(margins[row * columns : (row + 1) * columns, 3]) for row in range(rows)]
    total = sum(left) + sum(right) + columns * width + (columns + 1) * GAP
    legend, legend_width, legend_height = _legend(figure, shown, methods, total)
    full = max(total, legend_width + 2 * GAP)
    tall = sum(bottom) + sum(top) + rows * height + (rows + 1) * GAP + legend_height
    figure.set_size_inches(full, tall)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        x = (full - total) / 2 + GAP * (column + 1) + sum(left[: column + 1]) + sum(right[:column]) + width * column
        y = tall - GAP * (row + 1) - sum(top[: row + 1]) - sum(bottom[:row]) - height * (row + 1)
        panel.set_position((x / full, y / tall, width / full, height / tall))
    if legend is not None:
        legend.set_bbox_to_anchor((0.5, GAP / 2 / tall))
    return figure


def _margins(figure: Figure, panel: Axes) -> tuple[float, float, float, float]:
    """How far titles, labels and ticks reach beyond the panel: left, bottom, right, top in inches."""
    box = panel.get_tightbbox(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    frame = panel.get_window_extent()
    assert box is not None
    reach = (frame.x0 - box.x0, frame.y0 - box.y0, box.x1 - frame.x1, box.y1 - frame.y1)
    left, bottom, right, top = (max(float(pixels), 0.0) / figure.dpi for pixels in reach)
    return left, bottom, right, top


def _legend(figure: Figure, shown: Iterable[str], methods: Sequence[str], width: float) -> tuple[Any, float, float]:
    """One legend of as many columns as fit into `width` inches, the oracle last; with its width and height."""
    styles, wanted = looks(methods), set(shown)
    names = [m for m in (*methods, ORACLE) if m in wanted]
    if not names:
        return None, 0.0, 0.0
    handles = [Line2D([], [], color=styles[m].color, linestyle=styles[m].line, marker=styles[m].marker) for m in names]
    for columns in range(len(names), 0, -1):
        legend = figure.legend(
            handles,
            [short(m) for m in names],
            loc="lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
            borderpad=0,
            borderaxespad=0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        box = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        if box.width / figure.dpi <= width or columns == 1:
            break
        legend.remove()
    return legend, box.width / figure.dpi, box.height / figure.dpi


def _draw_curves(panel: Axes, rows: Sequence[Row], axis: str, styles: Mapping[str, Look], value: str = "value") -> None:
    """Lines over bands; where more than CROWD methods' bands would bury each other, a bar beside the last points.

    The vertical axis is that of the lines; a wider band or bar is cut at its ends.
    """
    drawn, methods, end = [], _unique(rows, "method"), max(row[axis] for row in rows)
    for place, method in enumerate(methods, start=1):
        chosen, look = [row for row in rows if row["method"] == method], styles[method]
        x, y, low, high = (np.array([row[key] for row in chosen]) for key in (axis, value, "low", "high"))
        panel.plot(
            x,
            y,
            color=look.color,
            linestyle=look.line,
            marker=look.marker,
            markevery=max(1, len(x) // MARKS),
            markersize=4,
            linewidth=1.4,
            zorder=3,
        )
        if len(methods) <= CROWD:
            panel.fill_between(x, low, high, color=look.color, alpha=0.13, linewidth=0)
        elif not np.isnan(low[-1]):
            beside = end + (end - x[0]) * (0.01 + 0.02 * place)
            panel.plot([beside, beside], [low[-1], high[-1]], color=look.color, linewidth=2, alpha=0.6)
        drawn.append(y)
    lowest, highest = min(map(np.nanmin, drawn)), max(map(np.nanmax, drawn))
    margin = 0.06 * (highest - lowest) or 0.5
    panel.set_ylim(lowest - margin, highest + margin)


def _draw_intervals(panel: Axes, points: Sequence[tuple[str, float, float, float]], methods: Sequence[str]) -> None:
    """One line per (method, value, low, high), the first at the top."""
    styles = looks(methods)
    for height, (method, value, low, high) in enumerate(points):
        look = styles[method]
        panel.plot([low, high], [height, height], color=look.color, linewidth=6, alpha=0.3, solid_capstyle="butt")
        panel.plot([value], [height], color=look.color, marker=look.marker, markersize=6, clip_on=False)
    panel.set_yticks(range(len(points)), [short(method) for method, *_ in points])
    for label in panel.get_yticklabels():
        label.set_parse_math(False)
    panel.set_ylim(len(points) - 0.5, -0.5)


def _unique(rows: Sequence[Row], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))
