"""The report of a comparison: Markdown with picture files, and one self-contained HTML page (no external request).

Names and settings of runs may be a stranger's: every text is escaped for the page or file it goes into.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pbrl.comparing import plots
from pbrl.comparing.curves import Comparison
from pbrl.comparing.tables import AXES, GAP, HEALTH, Row, Tables

SEEDS_FOR_A_CLAIM = 5
DPI = 200  # of the pictures


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and what is shown below them."""

    title: str
    text: str
    figures: Mapping[str, Figure]  # by file name without ending
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None  # header, rows
    origin: str  # the CSV the numbers are in


def write_report(data: Comparison, tables: Tables, folder: Path, command: str) -> None:
    """Write report.md, report.html and every figure as PNG and SVG into `folder`."""
    sections = build_sections(data, tables)
    figures = {name: figure for section in sections for name, figure in section.figures.items()}
    for name, figure in figures.items():
        save_figure(figure, folder / "figures" / f"{name}.png")
    pictures = {name: (folder / "figures" / f"{name}.png").read_bytes() for name in figures}
    introduction = summary(data, tables)
    (folder / "report.md").write_text(markdown(introduction, data.notes, sections, command), encoding="utf-8")
    page = webpage(introduction, data.notes, sections, pictures, command)
    (folder / "report.html").write_text(page, encoding="utf-8")


def save_figure(figure: Figure, path: Path) -> None:
    """Write the picture `path` (.png, .pdf, …) and beside it the same as SVG, in which text stays text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pbrl", "pdf.fonttype": 42}):
        figure.savefig(path, dpi=DPI)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def summary(data: Comparison, tables: Tables) -> str:
    """What was compared, in a sentence or two."""
    learners = tables["scores"]
    fewest = min(row["runs"] for row in learners)
    text = (
        f"{sum(row['runs'] for row in learners)} runs: {len(data.methods)} methods ({', '.join(data.methods)}) on "
        f"{len(data.curves)} task{'s' * (len(data.curves) != 1)} ({', '.join(data.curves)}), told apart by "
        f"{', '.join(data.selection.method_keys)}."
    )
    if fewest < SEEDS_FOR_A_CLAIM:
        text += (
            f" A method has as few as {fewest} seeds on a task: too few for a claim, which takes {SEEDS_FOR_A_CLAIM}."
        )
    return text


def build_sections(data: Comparison, tables: Tables) -> list[Section]:
    """The report's sections in order, without those that have no rows."""
    builders: dict[str, Callable[[Comparison, Tables], Section]] = {
        "curves_steps": _curves_section,
        "scores": _scores_section,
        "aggregate": _aggregate_section,
        "improvement": _improvement_section,
        "samples": _samples_section,
        "profiles": _profiles_section,
        "health": _health_section,
        "gap": _gap_section,
        "runs": _sources_section,
    }
    return [build(data, tables) for name, build in builders.items() if tables[name]]


def _curves_section(data: Comparison, tables: Tables) -> Section:
    figures = {
        name: plots.curves_figure(tables[name], name.removeprefix("curves_"), data.metrics, data.methods)
        for name in ("curves_steps", "curves_labels")
    }
    text = (
        f"{_method(data)} Curves end where the task's shortest run ends. Between two evaluations the last one holds. "
        "Over labels, a point is the last score measured with at most that many labels, so the last point is the end "
        "of the curves over steps."
    )
    return Section("Learning curves", text, figures, None, "curves_steps.csv, curves_labels.csv, evaluations.csv")


def _scores_section(data: Comparison, tables: Tables) -> Section:
    header = ["task", "method", "seeds", "metric", "final", "of oracle", "AUC", "AUC of oracle", "runs"]
    rows = [
        [
            row["task"],
            row["method"],
            str(row["runs"]),
            plots.METRIC_NAMES[row["metric"]],
            *(_estimate(row, name) for name in ("final", "final_normalized", "auc", "auc_normalized")),
            row["sources"],
        ]
        for row in tables["scores"]
    ]
    text = (
        f"{_method(data)} The final score of a run is its mean over the evaluations in the last "
        "tenth of the steps; AUC is the mean height of its curve over steps. "
    ) + " ".join(
        f"The oracle reaches {_number(row['score'])} on {row['task']} ({row['sources']})." for row in tables["oracle"]
    )
    return Section(
        "Scores on each task", text, {}, (header, rows), "scores.csv" + ", oracle.csv" * bool(tables["oracle"])
    )


def _aggregate_section(data: Comparison, tables: Tables) -> Section:
    rows = [
        [row["method"], row["tasks"], str(row["runs"]), *(_estimate(row, f"{n}_normalized") for n in ("final", "auc"))]
        for row in tables["aggregate"]
    ]
    text = (
        "All runs on the tasks that every method has, in shares of the oracle's score (which is taken as fixed). "
        f"{_method(data)}"
    )
    figures = {"aggregate": plots.aggregate_figure(tables["aggregate"], data.methods)}
    header = ["method", "tasks", "runs", "final", "AUC"]
    return Section("Scores over all tasks, normalised by the oracle", text, figures, (header, rows), "aggregate.csv")


def _improvement_section(data: Comparison, tables: Tables) -> Section:
    found = {(row["first"], row["second"]): _estimate(row, "probability", bare=True) for row in tables["improvement"]}
    rows = [[first, *(found.get((first, second), "–") for second in data.methods)] for first in data.methods]
    text = (
        "How likely a run of the row's method ends with a higher score than one of the column's, averaged over the "
        "tasks both have (Mann–Whitney U, ties count half), with its 95 % score interval (Newcombe). The "
        "methods differ where the interval excludes 0.5."
    )
    figures = {}
    if data.base and any(row["second"] == data.base for row in tables["improvement"]):
        figures["improvement"] = plots.improvement_figure(tables["improvement"], data.base, data.methods)
    header = ["P(row > column)", *data.methods]
    return Section("Probability of improvement", text, figures, (header, rows), "improvement.csv")


def _samples_section(data: Comparison, tables: Tables) -> Section:
    """Only the shares that a method reaches have rows; the rest is a sentence."""
    reached = {(row["task"], row["share"]) for row in tables["samples"] if math.isfinite(row["steps"])}
    header = ["task", "share of oracle", "method", "steps", "steps ratio", "labels", "labels ratio"]
    rows = [
        [
            row["task"],
            f"{row['share']:.0%} ({_number(row['level'])})",
            row["method"],
            *(cell for axis in AXES for cell in (_estimate(row, axis), _ratio(row, axis))),
        ]
        for row in tables["samples"]
        if (row["task"], row["share"]) in reached
    ]
    base = data.base or data.baseline
    text = (
        "Where the curve first reaches a share of the oracle's score, at an evaluation and not between two, with where "
        "the upper and the lower end of its interval do; ∞: not within the steps compared. The ratio is to "
        f"{base}: 0.37 is 63 % fewer. Where {base} does not reach the share, all the steps (labels) compared stand for "
        "its need, and the ratio is an upper bound (≤)."
    )
    missed: dict[str, list[Row]] = {}
    for row in tables["samples"]:
        if (row["task"], row["share"]) not in reached:
            missed.setdefault(row["task"], []).append(row)
    for task, lost in missed.items():
        least = min(lost, key=lambda row: row["share"])
        text += f" No method reaches {least['share']:.0%} of the oracle's score ({_number(least['level'])}) on {task}."
    figures = {"samples": plots.samples_figure(tables["samples"], data.methods)} if reached else {}
    table = (header, rows) if rows else None
    return Section("Samples needed to reach a share of the oracle", text, figures, table, "samples.csv")


def _ratio(row: Row, axis: str) -> str:
    return "≤ " * row[f"{axis}_ratio_is_bound"] + _estimate(row, f"{axis}_ratio")


def _profiles_section(data: Comparison, tables: Tables) -> Section:
    text = (
        "The share of all runs, on the tasks that every method has, whose normalised final score is above τ, with its "
        "95 % interval (Wilson)."
    )
    figures = {"profiles": plots.profiles_figure(tables["profiles"], data.methods)}
    return Section("Performance profiles", text, figures, None, "profiles.csv")


def _health_section(data: Comparison, tables: Tables) -> Section:
    text = f"Measured at each feedback session; the table shows the last one. {_method(data)}"
    figures = {"health": plots.measures_figure(tables["health"], data.methods)}
    return Section("Health of the reward model", text, figures, _last(tables["health"], HEALTH), "health.csv")


def _gap_section(data: Comparison, tables: Tables) -> Section:
    text = (
        "Does the policy climb the learned reward where that is wrong? The gap is how many standard deviations the "
        "policy's recent steps lie above the mean of all kept steps by the learned reward, less the same by the "
        f"task's: above 0 the policy looks better than it is. The table shows the last measurement. {_method(data)}"
    )
    figures = {"gap": plots.measures_figure(tables["gap"], data.methods)}
    return Section("Over-optimisation of the learned reward", text, figures, _last(tables["gap"], GAP), "gap.csv")


def _last(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The last value of each of these metrics, a row per task and method."""
    last: dict[tuple[str, str], dict[str, str]] = {(row["task"], row["method"]): {} for row in rows}
    for row in rows:
        last[row["task"], row["method"]][row["metric"]] = _estimate(row, "value", bare=True)
    header = ["task", "method", *(plots.METRIC_NAMES[name] for name in metrics)]
    return header, [[*pair, *(cells.get(name, "–") for name in metrics)] for pair, cells in last.items()]


def _sources_section(data: Comparison, tables: Tables) -> Section:
    columns = ("run", "task", "method", "seed", "steps", "labels", "skipped", "equal", "final", "wall_hours", "source")
    rows = [[_number(row[name]) for name in columns] for row in tables["runs"]]
    header = [name.replace("_", " ") for name in columns]
    return Section("Sources", "Every run behind the numbers above.", {}, (header, rows), "runs.csv, evaluations.csv")


def _number(value: Any) -> str:
    """A cell: three significant digits, whole numbers in full, – for what is missing."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _estimate(row: Row, name: str, bare: bool = False) -> str:
    """Point and interval, from the columns `name`, `name_low`, `name_high`, or `low` and `high` if they are bare."""
    low, high = (row[end if bare else f"{name}_{end}"] for end in ("low", "high"))
    point = _number(row[name])
    return point if math.isnan(low) else f"{point} [{_number(low)}, {_number(high)}]"


def _method(data: Comparison) -> str:
    """How several seeds became one number."""
    if data.estimator.many:
        return "Interquartile mean over seeds [95 % interval of a stratified bootstrap]."
    return (
        "Mean over seeds [95 % interval by Student's t]; no interval where all seeds are equal. (With ten seeds of "
        "every method it would be the interquartile mean and a bootstrap, which covers too little with fewer.)"
    )


def markdown(introduction: str, notes: Sequence[str], sections: Sequence[Section], command: str) -> str:
    """The report as Markdown; pictures are files beside it."""
    fence = command.replace("`", "'")
    parts = ["# Comparison", _escaped(introduction), f"```\n{fence}\n```", *(f"- {_escaped(note)}" for note in notes)]
    for section in sections:
        parts += [f"## {section.title}", _escaped(section.text)]
        parts += [f"![{section.title}](figures/{name}.png)" for name in section.figures]
        if section.table:
            header, rows = section.table
            cells = [header, ["---"] * len(header), *rows]
            parts.append("\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in cells))
        parts.append(f"Numbers: {section.origin}")
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """What Markdown would read as markup, read as text; brackets stay where no link can come of them."""
    for mark in ("\\", "`", "|", "<", "](", "*"):
        text = text.replace(mark, f"\\{mark}")
    return text


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; display: block; margin: .6rem 0 } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #e5e5e5; white-space: nowrap }
td:last-child { white-space: normal; min-width: 7rem; overflow-wrap: anywhere }
th { background: #f5f5f5 } pre { background: #f5f5f5; padding: .6rem; overflow-x: auto }
.origin { color: #666; font-size: 13px } .notes { background: #fff6e0; padding: .5rem 1rem .5rem 2rem }
"""


def webpage(
    introduction: str,
    notes: Sequence[str],
    sections: Sequence[Section],
    pictures: Mapping[str, bytes],
    command: str,
) -> str:
    """The report as one HTML page with the pictures inside."""
    escape = html.escape
    body = ["<h1>Comparison</h1>", f"<p>{escape(introduction)}</p>", f"<pre>{escape(command)}</pre>"]
    if notes:
        body.append("<ul class=notes>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>")
        for name in section.figures:
            data = base64.b64encode(pictures[name]).decode()
            body.append(f'<img alt="{escape(section.title)}: {name}" src="data:image/png;base64,{data}">')
        if section.table:
            header, rows = section.table
            lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
            lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
            body.append("<div class=scroll><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>")
        body.append(f"<p class=origin>Numbers: {escape(section.origin)}</p>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{STYLE}</style>{''.join(body)}</html>\n"
    )
