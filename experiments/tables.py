"""Tables of results as Markdown, recomputed from what is stored: `python -m experiments.tables [NAME …]`.

A page holds such a table below a line `<!-- table: NAME -->`; `--write PAGES…` renews them there, and a test compares.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pbrl.comparing.curves import tail_mean
from pbrl.comparing.runs import ORACLE, Run, find_runs
from pbrl.comparing.statistics import Array, area_under_curve, improvement_interval, student_interval

STORED = Path(__file__).parent / "results"
MARK = re.compile(r"<!-- table: ([\w-]+) -->\n((?:[ ]*\|.*\n)*)")
Table = list[list[str]]


def first_light() -> Table:
    """bf16, 150k steps: final score of each seed, mean and interval."""
    table = [["method", "task", "seeds' final score", "mean [95 %]", "of them with the reward in fp32"]]
    for task in ("walker-walk", "window-open"):
        for method, runs in _methods(STORED / "first-light" / task):
            scores = _finals(runs, "eval/success" if task == "window-open" else "eval/return")
            unit = "success" if task == "window-open" else "return"
            fp32 = [str(run.seed) for run in runs if _reward_precision(run) == "fp32"]
            cells = [f"{value:.0%}" if unit == "success" else f"{value:.0f}" for value in scores]
            table.append([method, f"{task}, {unit}", ", ".join(cells), _mean(scores, unit), ", ".join(fp32) or "none"])
    return table


def fp32() -> Table:
    """fp32 (agent and reward), 100k steps: final return and area under the curve of each seed."""
    table = [["method", "seeds' final return", "mean [95 %]", "seeds' area under the curve", "mean [95 %]"]]
    for method, runs in _methods(STORED / "first-light" / "walker-walk-fp32"):
        finals, areas = _finals(runs, "eval/return"), _areas(runs)
        listed = (", ".join(f"{value:.0f}" for value in values) for values in (finals, areas))
        first, second = listed
        table.append([method, first, _mean(finals), second, _mean(areas)])
    return table


def evidence() -> Table:
    """The default beside its rivals on walker-walk: return over the last tenth of each seed."""
    says = {
        "pebble": ("PEBBLE as fitted here (default)", "`updater=pebble`"),
        "aparl": ("A-PARL", "`updater=aparl`: the same fitting, half of the pairs fresh"),
        "pebble-published": ("PEBBLE as published", "`updater=pebble-published`"),
    }
    methods = dict(_methods(STORED / "first-light" / "walker-walk-fp32"))
    oracle = [run.series("eval/return") for run in dict(_methods(STORED / "first-light" / "walker-walk"))[ORACLE]]
    at_the_end = np.mean([dict(zip(*series, strict=True))[100_000] for series in oracle])
    table = [["method", "seeds 0, 1, 2", "what it is"]]
    table.append(["oracle", f"{at_the_end:.0f} (mean at 100k steps, bf16)", "the true reward, no answers"])
    for method, (name, what) in says.items():
        table.append([name, ", ".join(f"{value:.0f}" for value in _finals(methods[method], "eval/return")), what])
    with (STORED / "first-light" / "bpref.csv").open(newline="") as file:
        last = [float(row["return"]) for row in csv.DictReader(file) if int(row["env_step"]) == 100_000]
    seeds = f"at 100k steps, {len(last)} seed"
    return [*table, ["B-Pref's own training code", f"{np.mean(last):.0f} ({seeds})", "on today's libraries"]]


def campaign() -> Table:
    """walker-walk, 100 answers: standardised inputs and pessimistic pay beside PEBBLE, run by run."""
    steps = range(0, 100_001, 10_000)
    table = [["seed", "method", *(f"{step // 1000}k" for step in steps), "area under the curve"]]
    says = {"pebble": "PEBBLE", "cand": "the same, standardised, pessimism 1"}
    for name, runs in reversed(_methods(STORED / "campaign" / "walker-walk")):
        for run, area in zip(runs, _areas(runs), strict=True):
            values = dict(zip(*run.series("eval/return"), strict=True))
            table.append([str(run.seed), says[name], *(f"{values[step]:.0f}" for step in steps), f"{area:.0f}"])
    return table


def fp32_differences() -> Table:
    """A-PARL against PEBBLE with the same fitting, in fp32: Welch's interval and the seeds' ranks."""
    methods = dict(_methods(STORED / "first-light" / "walker-walk-fp32"))
    table = [["A-PARL less PEBBLE, fp32, 100k steps", "difference [95 %]", "P(A-PARL > PEBBLE) [95 %]"]]
    for name, score in (("final return", lambda runs: _finals(runs, "eval/return")), ("area under the curve", _areas)):
        x, y = score(methods["aparl"]), score(methods["pebble"])
        low, high = improvement_interval([x], [y])
        share = float(np.mean(x[:, None] > y[None]))
        table.append([name, _welch(x, y), f"{share:.2f} [{low:.2f}, {high:.2f}]"])
    return table


def walker_steps() -> Table:
    """walker-walk: mean return over the seeds at some steps."""
    steps = (20_000, 40_000, 60_000, 100_000)
    table = [["walker-walk, mean return at", "seeds", *(f"{step // 1000}k" for step in steps)]]
    with (STORED / "first-light" / "bpref.csv").open(newline="") as file:
        rows = [(int(row["env_step"]), float(row["return"])) for row in csv.DictReader(file)]
    found = [[value for at, value in rows if at == step] for step in steps]
    name = "B-Pref's training code on today's libraries"
    table.append([name, "2", *(f"{np.mean(x):.0f}" + " (1 seed)" * (len(x) == 1) for x in found)])
    for folder, precision in (("walker-walk-fp32", "fp32"), ("walker-walk", "bf16")):
        for method, runs in _methods(STORED / "first-light" / folder):
            if method in ("pebble-published", "pebble", "aparl", ORACLE):
                values = np.array(
                    [[dict(zip(*run.series("eval/return"), strict=True))[s] for s in steps] for run in runs]
                )
                table.append([f"`{method}`, {precision}", str(len(runs)), *(f"{x:.0f}" for x in values.mean(axis=0))])
    return table


def sac_update() -> Table:
    """Wall time of one SAC update."""
    variants = {"stock": "stock SB3", "fp32": "fp32", "fp32 compiled": "fp32, compiled", "bf16": "bf16"}
    variants |= {"bf16 compiled": "bf16, compiled"}
    rows = json.loads((STORED / "benchmarks" / "update.json").read_text())["results"]
    found = {(row["setting"], row["threads"], row["variant"].replace(", ", " ")): row for row in rows}
    table = [["setting", "threads", *variants.values()]]
    for setting, threads in dict.fromkeys((row["setting"], row["threads"]) for row in rows):
        cells = [found.get((setting, threads, variant)) for variant in variants]
        shown = [
            "–" if c is None else _time(c["ms"]) + f" ({c['ratio_ms']:.2f}×)" * (c["ratio_ms"] != 1) for c in cells
        ]
        table.append([setting, str(threads), *shown])
    return table


TABLES: dict[str, Callable[[], Table]] = {
    "first-light": first_light,
    "fp32": fp32,
    "evidence": evidence,
    "campaign": campaign,
    "fp32-differences": fp32_differences,
    "walker-steps": walker_steps,
    "sac-update": sac_update,
}


def _methods(folder: Path) -> list[tuple[str, list[Run]]]:
    """The runs below a folder by method, each named METHOD-sSEED, the oracle last."""
    found: dict[str, list[Run]] = {}
    for run in find_runs([folder]):
        found.setdefault(Path(run.source).name.rpartition("-s")[0], []).append(run)
    return sorted(found.items(), key=lambda item: (item[0] == ORACLE, item[0]))


def _reward_precision(run: Run) -> str:
    """bf16 runs of before the reward had a precision of its own fitted it in fp32."""
    return str(run.setting("reward.precision") or "fp32")


def _finals(runs: Sequence[Run], metric: str) -> Array:
    return np.array([float(tail_mean(*run.series(metric))) for run in runs])


def _areas(runs: Sequence[Run]) -> Array:
    return np.array([float(area_under_curve(*run.series("eval/return"))) for run in runs])


def _mean(values: Array, unit: str = "return") -> str:
    """Mean and Student's interval; a success rate's lies within 0 and 1."""
    ends = np.array(student_interval([values]))
    if unit == "success":
        ends = np.clip(ends, 0, 1)
    shown = [f"{x:.0%}" if unit == "success" else f"{x:.0f}" for x in (values.mean(), *ends)]
    return shown[0] if np.isnan(ends).any() else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _welch(x: Array, y: Array) -> str:
    from scipy.stats import ttest_ind

    low, high = ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    return f"{x.mean() - y.mean():.0f} [{low:.0f}, {high:.0f}]"


def _time(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 35 else f"{ms:.1f} ms"


def markdown(table: Table) -> str:
    """The table's lines, each with its end."""
    header, *rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def renewed(text: str) -> str:
    """A page's text with each marked table recomputed."""
    return MARK.sub(lambda found: f"<!-- table: {found[1]} -->\n{markdown(TABLES[found[1]]())}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tables", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--write", nargs="+", type=Path, metavar="PAGE", help="renew the tables marked in these pages")
    options = parser.parse_args(arguments)
    for page in options.write or []:
        page.write_text(renewed(page.read_text()))
    for name in () if options.write else options.names or TABLES:
        print(f"<!-- table: {name} -->\n{markdown(TABLES[name]())}")


if __name__ == "__main__":
    main()
