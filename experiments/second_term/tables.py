"""The tables of docs/second-term.md from the rows of the stored CSVs; `experiments.tables` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

Rows = Sequence[Mapping[str, str]]
Table = list[list[str]]


def exact(rows: Rows) -> Table:
    """The largest error of each estimator to central differences."""
    seeds, names = len({row["seed"] for row in rows}), dict.fromkeys(row["estimator"] for row in rows)
    worst = [max(float(row["relative_error"]) for row in rows if row["estimator"] == name) for name in names]
    return [["largest relative error", *names], [f"{seeds} random MDPs", *(f"{error:.0e}" for error in worst)]]


def sampled(rows: Rows) -> Table:
    """Relative bias, root-mean-square error and cosine to the truth by number of transitions."""
    sizes = list(dict.fromkeys(row["steps"] for row in rows))
    found = []
    for name in dict.fromkeys(row["estimator"] for row in rows):
        cells = [row for row in rows if row["estimator"] == name]
        numbers = [[float(c[key]) for key in ("bias", "bias_noise", "rms_error", "cosine")] for c in cells]
        shown = [f"{bias:.2f} (± {noise:.2f}), {rms:.2f}, {cosine:.2f}" for bias, noise, rms, cosine in numbers]
        found.append([name, *shown])
    return [["estimator", *(f"{size} transitions" for size in sizes)], *found]


def gate(rows: Rows) -> Table:
    """Share of runs in which the gate opened, by true cosine and updates."""
    cases = list(dict.fromkeys((row["true_cosine"], row["updates"]) for row in rows))
    found = []
    for dimensions in dict.fromkeys(row["dimensions"] for row in rows):
        own = {(r["true_cosine"], r["updates"]): float(r["opened"]) for r in rows if r["dimensions"] == dimensions}
        found.append([dimensions, *(f"{own[case]:.1%}" for case in cases)])
    return [["dimensions of the noise", *(f"cosine {c}, {n} updates" for c, n in cases)], *found]


def robot(rows: Rows) -> Table:
    """Split-half cosine by size, median and all values' range, with the seconds of processor time."""
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
    return [[rows[0]["env"], *(f"{int(size) // 1000}k steps" for size in sizes)], *found]


def seen(rows: Rows) -> Table:
    """Which estimators can be seen at which size, by the halves' cosines over the stretches.

    yes: of at least four stretches all are above 0 and the median is at least 0.3, which the gate finds in some thirty
    updates; no: of at least four, not so; else how many stretches there are, which is too few to tell.
    """
    columns = sorted({(row["env"], int(row["steps"])) for row in rows})
    cosines: dict[str, dict[tuple[str, int], list[float]]] = {}
    for row in rows:
        if row["split_cosine"]:
            own = cosines.setdefault(row["estimator"], {}).setdefault((row["env"], int(row["steps"])), [])
            own.append(float(row["split_cosine"]))
    head = [f"{env}, {size // 1000}k" for env, size in columns]
    return [["seen?", *head], *([name, *(_seen(own.get(c, [])) for c in columns)] for name, own in cosines.items())]


def _seen(values: list[float]) -> str:
    if len(values) < 4:
        return f"{len(values)} only"
    return "**yes**" if min(values) > 0 and median(values) >= 0.3 else "no"
