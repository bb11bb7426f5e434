"""The tables of docs/second-term.md, from the stored CSVs."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median

SAMPLED = "sampled.csv"


def read(path: Path) -> list[dict[str, str]]:
    """A CSV's rows."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def exact_line(folder: Path) -> str:
    """The largest error of each estimator to central differences."""
    rows = read(folder / "exact.csv")
    seeds = len({row["seed"] for row in rows})
    names = dict.fromkeys(row["estimator"] for row in rows)
    worst = {name: max(float(row["relative_error"]) for row in rows if row["estimator"] == name) for name in names}
    return f"{seeds} random MDPs: " + ", ".join(f"{name} {error:.0e}" for name, error in worst.items())


def sampled_table(folder: Path) -> str:
    """Relative bias, root-mean-square error and cosine to the truth by number of transitions."""
    rows = read(folder / SAMPLED)
    sizes = list(dict.fromkeys(row["steps"] for row in rows))
    found = []
    for name in dict.fromkeys(row["estimator"] for row in rows):
        cells = [row for row in rows if row["estimator"] == name]
        numbers = [[float(c[key]) for key in ("bias", "bias_noise", "rms_error", "cosine")] for c in cells]
        shown = [f"{bias:.2f} (± {noise:.2f}), {rms:.2f}, {cosine:.2f}" for bias, noise, rms, cosine in numbers]
        found.append([name, *shown])
    return table(["estimator", *(f"{size} transitions" for size in sizes)], found)


def gate_table(folder: Path) -> str:
    """Share of runs in which the gate opened, by true cosine and updates."""
    rows = read(folder / "gate.csv")
    cases = list(dict.fromkeys((row["true_cosine"], row["updates"]) for row in rows))
    found = []
    for dimensions in dict.fromkeys(row["dimensions"] for row in rows):
        own = {(r["true_cosine"], r["updates"]): float(r["opened"]) for r in rows if r["dimensions"] == dimensions}
        found.append([dimensions, *(f"{own[case]:.1%}" for case in cases)])
    return table(["dimensions of the noise", *(f"cosine {c}, {n} updates" for c, n in cases)], found)


def robot_table(folder: Path, env: str) -> str:
    """Split-half cosine by size, median and all values' range, with the seconds of processor time."""
    rows = read(folder / f"{env}.csv")
    sizes = list(dict.fromkeys(row["steps"] for row in rows))
    found = []
    for name in dict.fromkeys(row["estimator"] for row in rows):
        cells = []
        for size in sizes:
            own = [row for row in rows if (row["estimator"], row["steps"]) == (name, size)]
            values = [float(row["split_cosine"]) for row in own if row["split_cosine"]]
            seconds = median(float(row["seconds"]) for row in own) if own else 0.0
            none = f"no estimate in {len(own)}"
            several = (
                f"{median(values):+.2f} [{min(values):+.2f}, {max(values):+.2f}] of {len(values)}" if values else none
            )
            cells.append(f"{several}; {seconds:.1f} s" if own else "–")
        found.append([name, *cells])
    return table([f"{env}", *(f"{int(size) // 1000}k steps" for size in sizes)], found)


def seen_table(folder: Path, envs: list[str]) -> str:
    """Which estimators can be seen at which size, by the halves' cosines over the stretches.

    yes: of at least four stretches all are above 0 and the median is at least 0.3, which the gate finds in some thirty
    updates; no: of at least four, not so; else how many stretches there are, which is too few to tell.
    """
    columns = [(env, row["steps"]) for env in envs for row in read(folder / f"{env}.csv")]
    columns = list(dict.fromkeys(sorted(columns, key=lambda column: (column[0], int(column[1])))))
    cosines: dict[str, dict[tuple[str, str], list[float]]] = {}
    for env in envs:
        for row in read(folder / f"{env}.csv"):
            if row["split_cosine"]:
                own = cosines.setdefault(row["estimator"], {}).setdefault((env, row["steps"]), [])
                own.append(float(row["split_cosine"]))
    head = [f"{env}, {int(size) // 1000}k" for env, size in columns]
    return table(["seen?", *head], [[name, *(_seen(own.get(c, [])) for c in columns)] for name, own in cosines.items()])


def _seen(values: list[float]) -> str:
    if len(values) < 4:
        return f"{len(values)} only"
    return "**yes**" if min(values) > 0 and median(values) >= 0.3 else "no"
