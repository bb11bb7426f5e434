"""Tables of results as Markdown, recomputed from what is stored: `python -m experiments.tables [NAME …]`.

A page holds such a table below a line `<!-- table: NAME -->`; `--write PAGES…` renews them there, and a test compares.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fitting import WAYS
from experiments.second_term import tables as second_term
from experiments.theory.report import interval, slope
from pbrl.comparing.curves import tail_mean
from pbrl.comparing.runs import ORACLE, Run, find_runs
from pbrl.comparing.statistics import Array, area_under_curve, first_reached, improvement_interval, student_interval

STORED = Path(__file__).parent / "results"
MARK = re.compile(r"<!-- table: ([\w-]+) -->\n((?:[ ]*\|.*\n)*)")
Table = list[list[str]]
DEFAULT = "longer-pretraining"  # Meta-World's, of the runs in `novel`
SUCCESS = [  # columns of `_success_cells`
    "area under the success curve [95 %]",
    "success over the last fifth [95 %]",
    "the area, less `pebble`'s [95 %]",
]


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
    fp32 = dict(_methods(STORED / "first-light" / "walker-walk-fp32"))
    even = dict(_methods(STORED / "campaign" / "walker-walk"))
    rows = [
        ("PEBBLE as fitted here (default)", even["pebble-even"], "`updater=pebble`"),
        ("the same, uneven batches", fp32["pebble"], "`updater.fit.even_batches=false`"),
        ("A-PARL, uneven batches", fp32["aparl"], "`updater=aparl`: half of the pairs fresh"),
        ("PEBBLE as published", fp32["pebble-published"], "`updater=pebble-published`"),
    ]
    oracle = [run.series("eval/return") for run in dict(_methods(STORED / "first-light" / "walker-walk"))[ORACLE]]
    at_the_end = np.mean([dict(zip(*series, strict=True))[100_000] for series in oracle])
    table = [["method", "seeds 0, 1, 2", "what it is"]]
    table.append(["oracle", f"{at_the_end:.0f} (mean at 100k steps, bf16)", "the true reward, no answers"])
    for name, runs, what in rows:
        seeds = _listed([run.seed for run in runs], "")
        others = "" if seeds == "0, 1, 2" else f" (seeds {seeds})"
        table.append([name, _listed(list(_finals(runs, "eval/return")), ".0f") + others, what])
    last = _numbers(_rows("first-light/bpref.csv", env_step="100000"), "return")
    seeds = f"at 100k steps, {len(last)} seed"
    return [*table, ["B-Pref's own training code", f"{np.mean(last):.0f} ({seeds})", "on today's libraries"]]


def campaign() -> Table:
    """walker-walk, 100 answers: what was tried beside PEBBLE as fitted here, run by run."""
    steps = range(0, 100_001, 10_000)
    table = [["seed", "method", *(f"{step // 1000}k" for step in steps), "area under the curve"]]
    says = {"pebble": "PEBBLE", "cand": "PEBBLE, standardised, pessimism 1", "pebble-even": "PEBBLE, even batches"}
    says |= {"pebble-uniform": "the same, random pairs", "pebble-temperature": "the same, `agent.temperature_lr=1e-3`"}
    found = dict(_methods(STORED / "campaign" / "walker-walk"))
    for name in says:
        runs = found[name]
        for run, area in zip(runs, _areas(runs), strict=True):
            values = dict(zip(*run.series("eval/return"), strict=True))
            table.append([str(run.seed), says[name], *(f"{values[step]:.0f}" for step in steps), f"{area:.0f}"])
    return table


def agents() -> Table:
    """walker-walk by control steps: return of each run, however long an action is held, beside the lean agent's."""
    steps = range(0, 100_001, 10_000)
    table = [["signal", "run", *(f"{step // 1000}k" for step in steps), "area under the curve"]]
    runs = [(Path(run.source).name, run) for run in _runs(STORED / "agent")]
    runs.sort(key=lambda item: item[1].updater != ORACLE)
    for folder, method in (("walker-walk", ORACLE), ("walker-walk-fp32", "pebble")):
        for run in dict(_methods(STORED / "first-light" / folder))[method]:
            runs.append((f"lean, {run.setting('agent.precision')}, seed {run.seed}", run))
    for name, run in runs:
        at, values = run.series("eval/return")
        at = at * int(run.setting("env.action_repeat") or 1)
        at, values = at[at <= steps[-1]], values[at <= steps[-1]]
        found = dict(zip(at, values, strict=True))
        cells = [f"{found[step]:.0f}" if step in found else "–" for step in steps]
        signal = "true reward" if run.updater == ORACLE else "100 answers"
        table.append([signal, name, *cells, f"{area_under_curve(at, values):.0f}"])
    return table


def few_answers() -> Table:
    """walker-walk, 100 answers, 100,000 control steps: fresh seeds of the shallow reward with a line, beside PEBBLE."""
    lean = dict(_methods(STORED / "first-light" / "walker-walk-fp32"))["pebble"]
    campaign = dict(_methods(STORED / "campaign" / "walker-walk"))
    skip = dict(_methods(STORED / "agent" / "100-answers"))["lnc-ar2-parts-skip"]
    rows = [
        ("`reward.skip`, the agent and the questions of BF", [run for run in skip if run.seed >= 60]),
        ("PEBBLE as fitted here, uneven batches", lean + campaign["pebble"]),
        ("PEBBLE as fitted here (default)", campaign["pebble-even"]),
    ]
    ours = _areas(rows[0][1])
    scores = ["return over the last tenth, by seed", "mean [95 %]", "area under the curve, by seed", "mean [95 %]"]
    table = [["method", "seeds", *scores, "the first's area less this one's [95 %]"]]
    for name, runs in rows:
        values = (_finals(runs, "eval/return"), _areas(runs))
        cells = [cell for some in values for cell in (_listed(list(some), ".0f"), _mean(some))]
        less = "–" if runs is rows[0][1] else _welch(ours, _areas(runs))
        table.append([name, _listed([run.seed for run in runs], ""), *cells, less])
    return table


def true_reward() -> Table:
    """dm_control, true reward, fresh seeds of the steadier agent: return at 100,000 control steps."""
    published = {"cheetah-run": (329, 559), "quadruped-walk": (76, 666), "walker-walk": (783, 951)}  # ten seeds each
    table = [["task", "seeds", "return at 100k control steps", "mean [95 %]", "published, as many frames: SAC, SimBa"]]
    for task, (sac, simba) in published.items():
        folder = STORED / "agent" / "true-reward" if task == "walker-walk" else STORED / "true-reward" / task
        runs = [run for run in dict(_methods(folder))["lnc-ar2"] if run.seed >= 20]
        last = np.array([dict(zip(*run.series("eval/return"), strict=True))[50_000] for run in runs])  # actions
        seeds = _listed([run.seed for run in runs], "")
        table.append([task, seeds, _listed(list(last), ".0f"), _mean(last), f"{sac}, {simba}"])
    return table


def meta_world() -> Table:
    """The small agent of `experiment=quick` on Meta-World: success and return at some environment steps of each run."""
    steps = [step * 1000 for step in (10, 20, 30, 40, 60, 80, 100, 120, 150)]
    table = [["run", *(f"{step // 1000}k" for step in steps), "success over the last fifth"]]
    for run in _runs(STORED / "meta-world"):
        success, returns = (dict(zip(*run.series(f"eval/{name}"), strict=True)) for name in ("success", "return"))
        cells = [f"{success[step]:.0%}, {returns[step]:.0f}" if step in success else "–" for step in steps]
        table.append([Path(run.source).name, *cells, f"{_last_fifth(run):.0%}"])
    return table


def uneven_batches() -> Table:
    """Loss that is fitted around the session whose 225 answers leave one pair over, on Meta-World, 25 a session."""
    answers = (175, 200, 225, 250, 275)
    table = [["loss on the answers with the price on size", "runs", *(f"{count} answers" for count in answers)]]
    found: dict[bool, list[list[float]]] = {False: [], True: []}
    for run in _runs(STORED / "meta-world", STORED / "figure-2"):
        losses = dict(zip(run.series("feedback/labels")[1], run.series("reward/loss")[1], strict=True))
        sees_all = run.setting("reward.sees_actions") is not False  # what sees less fits less well
        if run.updater == "pebble" and sees_all and set(answers) <= set(losses):
            found[bool(run.setting("updater.fit.even_batches"))].append([losses[count] for count in answers])
    says = {False: "seven steps of 32 pairs, then what is left", True: "steps that share the pairs evenly"}
    for even, name in says.items():
        means = np.mean(found[even], axis=0)
        table.append([name, str(len(found[even])), *(f"{value:.2f}" for value in means)])
    return table


def successes(name: str) -> Table:
    """Small agent on Meta-World: each way's success on each task, and its difference from PEBBLE as fitted here."""
    table = [["task", "method", "seeds", *SUCCESS, "step (answers) of the first evaluation ≥ 90 %"]]
    for folder in sorted(path for path in (STORED / name).iterdir() if path.is_dir()):
        found = dict(_methods(folder))
        for method, runs in found.items():
            reached = [float(first_reached(*run.series("eval/success"), 0.9)) for run in runs]
            answers = [float(run.labels_at(np.array([step]))[0]) for run, step in zip(runs, reached, strict=True)]
            firsts = [
                "never" if np.isinf(step) else f"{step / 1000:.0f}k ({count:.0f})"
                for step, count in zip(reached, answers, strict=True)
            ]
            seeds = _listed([run.seed for run in runs], "")
            cells = _success_cells(runs, found.get("pebble", runs))
            table.append([folder.name, f"`{method}`", seeds, *cells, ", ".join(firsts)])
    return table


def window_open() -> Table:
    """window-open, small agent, 500 answers: every way that was run, over all its seeds."""
    found: dict[str, list[Run]] = {}
    for folder in ("figure-2", "noisier", "seeds-40-44", "seeds-50-64", "seeds-70-79"):
        for method, runs in _methods(STORED / folder / "window-open"):
            found.setdefault(method, []).extend(runs)
    for method, runs in _methods(STORED / "new-reward" / "window-open"):
        found[f"states-{method}"] = runs
    gap = "mean `reward/gap`, steps 8000 to 21,000"
    table = [["window-open", "seeds", *SUCCESS, "seeds with ≥ 90 % over the last fifth", gap]]
    for method, runs in sorted(found.items(), key=lambda item: (item[0] == ORACLE, -len(item[1]), item[0])):
        high = sum(_last_fifth(run) >= 0.9 for run in runs)
        cells = _success_cells(runs, found["pebble"])
        middle = "–" if method == ORACLE else f"{np.mean([_gap(run) for run in runs]):.2f}"
        table.append([f"`{method}`", str(len(runs)), *cells, f"{high} of {len(runs)}", middle])
    return table


def new_reward() -> Table:
    """Small agent on Meta-World, rewards of standardised observations: each way beside PEBBLE on the same seeds."""
    last = "the last fifth, less theirs, paired [95 %]"
    table = [["task", "method", "seeds", *SUCCESS[:2], "the area, less `states`' of these seeds [95 %]", last]]
    where = {"window-open": "seeds-70-79", "button-press": "figure-2"}  # PEBBLE's runs
    for task in sorted(path.name for path in (STORED / "new-reward").iterdir() if path.is_dir()):
        own = dict(_methods(STORED / where[task] / task))["states"]
        states = {run.seed: run for run in own}
        table.append([task, "`states`", _listed(list(states), ""), *_success_cells(own, own), "–"])
        for method, runs in _methods(STORED / "new-reward" / task):
            others = [states[run.seed] for run in runs]
            apart = np.array([_last_fifth(run) - _last_fifth(other) for run, other in zip(runs, others, strict=True)])
            cells = _success_cells(runs, others)
            table.append([task, f"`{method}`", _listed([run.seed for run in runs], ""), *cells, _points(apart)])
    return table


def novel() -> Table:
    """Meta-World with pink noise, novel questions and a reward fitted further: success over the last fifth."""
    paired = "the mean, less `pebble`'s of these seeds, paired [95 %]"
    last = "success over the last fifth, by seed"
    table = [["task", "method", "seeds", last, "seeds with 80 % or more", "mean [95 %]", paired]]
    for folder in sorted(path for path in (STORED / "novel").iterdir() if path.is_dir()):
        found = dict(_methods(folder))
        pebble = {run.seed: _last_fifth(run) for run in found["pebble"]}
        for method, runs in found.items():
            ends = np.array([_last_fifth(run) for run in runs])
            seeds = [run.seed for run in runs]
            apart = [end - pebble[seed] for seed, end in zip(seeds, ends, strict=True) if seed in pebble]
            difference = "–" if method == "pebble" or not apart else _points(np.array(apart))
            cells = [_listed(seeds, ""), _listed(list(ends), ".0%"), f"{(ends >= 0.8).sum()} of {len(ends)}"]
            table.append([folder.name, f"`{method}`", *cells, _mean(ends, "success"), difference])
    return table


def figure_2_again() -> Table:
    """Figure 2's methods in the form of Meta-World's default and on its seeds, as far as they were run."""
    last = "success over the last fifth, by seed"
    less = [f"{what}, less the default's of these seeds, paired [95 %]" for what in ("the last fifth", "the area")]
    first = "step of the first evaluation at the default's mean over the last fifth"
    table = [["task", "method", "seeds", last, "area under the success curve, mean", *less, first]]
    for folder in sorted(path for path in (STORED / "figure-2-again").iterdir() if path.is_dir()):
        default = {run.seed: run for run in dict(_methods(STORED / "novel" / folder.name))[DEFAULT]}
        level = float(np.mean([_last_fifth(run) for run in default.values()]))
        for method, runs in [("default", list(default.values())), *_methods(folder)]:
            of_seeds = [default[run.seed] for run in runs]
            ends, theirs = (np.array([_last_fifth(run) for run in some]) for some in (runs, of_seeds))
            areas, their_areas = (_success_areas(some) for some in (runs, of_seeds))
            apart = ["–", "–"] if method == "default" else [_points(ends - theirs), _points(areas - their_areas)]
            reached = [float(first_reached(*run.series("eval/success"), level)) for run in runs]
            steps = ", ".join("never" if np.isinf(step) else f"{step / 1000:.0f}k" for step in reached)
            seeds = _listed([run.seed for run in runs], "")
            table.append(
                [folder.name, f"`{method}`", seeds, _listed(list(ends), ".0%"), f"{areas.mean():.0%}", *apart, steps]
            )
    return table


def default() -> Table:
    """Meta-World's default: success over the last fifth of its steps."""
    table = [["task", "success, by seed"]]
    for folder in sorted(path for path in (STORED / "novel").iterdir() if path.is_dir()):
        runs = dict(_methods(folder))[DEFAULT]
        ends = np.array([_last_fifth(run) for run in runs])
        table.append([f"`{folder.name}`", _listed(list(ends), ".0%")])
    return table


def quick() -> Table:
    """`experiment=quick`: success at the last evaluation, which the run prints when it ends."""
    table = [["task", "steps", "answers", "seeds", "success at the end, by seed"]]
    for folder in sorted(path for path in (STORED / "quick").iterdir() if path.is_dir()):
        for _, runs in _methods(folder):
            (steps,) = {int(run.series("eval/success")[0][-1]) for run in runs}  # the same of all
            (answers,) = {int(run.series("feedback/labels")[1][-1]) for run in runs}
            ends = _listed([run.series("eval/success")[1][-1] for run in runs], ".0%")
            table.append([f"`{folder.name}`", str(steps), str(answers), _listed([run.seed for run in runs], ""), ends])
    return table


def blame() -> Table:
    """`experiments.blame` on runs that failed: does the agent recover, does a new one do better on the same reward?"""
    table = [["run", "success, return at its end", "gone on with the true reward", "best of a new agent on its reward"]]
    for folder in sorted(path for path in (STORED / "blame").iterdir() if path.is_dir()):
        (gone_on,), (anew,) = _runs(folder / "task"), _runs(folder / "anew")
        success, returns = (dict(zip(*gone_on.series(f"eval/{name}"), strict=True)) for name in ("success", "return"))
        end = max(success)
        start = end - anew.series("eval/return")[0][-1]  # both take as many steps, of which `anew` counts its own only
        best = (anew.series(f"eval/{name}")[1][1:].max() for name in ("success", "return"))  # but for the untrained
        cells = [(success[start], returns[start]), (success[end], returns[end]), best]
        table.append([folder.name, *("{:.0%}, {:.0f}".format(*cell) for cell in cells)])
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


def reached() -> Table:
    """walker-walk, fp32: the evaluation at which each seed first reaches what PEBBLE as published ends at."""
    methods = dict(_methods(STORED / "first-light" / "walker-walk-fp32"))
    level = float(_finals(methods["pebble-published"], "eval/return").mean())
    methods["pebble"] = methods["pebble"] + dict(_methods(STORED / "campaign" / "walker-walk"))["pebble"]
    table = [[f"walker-walk, first at {level:.0f} or above", "seeds", "step of each seed", "mean [95 %], thousands"]]
    for name in ("pebble", "aparl", "pebble-published"):
        runs = methods[name]
        steps = np.array([float(first_reached(*run.series("eval/return"), level)) for run in runs]) / 1000
        shown = ", ".join("never" if np.isinf(step) else f"{step:.0f}k" for step in steps)
        mean = "–" if np.isinf(steps).any() else _mean(steps)
        table.append([f"`{name}`", _listed([run.seed for run in runs], ""), shown, mean])
    return table


def walker_steps() -> Table:
    """walker-walk: mean return over the seeds at some steps."""
    steps = (20_000, 40_000, 60_000, 100_000)
    table = [["walker-walk, mean return at", "seeds", *(f"{step // 1000}k" for step in steps)]]
    found = [_numbers(_rows("first-light/bpref.csv", env_step=str(step)), "return") for step in steps]
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
    compiled = ("fp32 compiled", "bf16 compiled")
    rows = json.loads((STORED / "benchmarks" / "update.json").read_text())["results"]
    found = {(row["setting"], row["threads"], row["variant"].replace(", ", " ")): row for row in rows}
    table = [["setting", "threads", *variants.values(), "of the machine's rate, compiled: fp32, bf16"]]
    for setting, threads in dict.fromkeys((row["setting"], row["threads"]) for row in rows):
        cells = [found.get((setting, threads, variant)) for variant in variants]
        shown = [
            "–" if c is None else _time(c["ms"]) + f" ({c['ratio_ms']:.2f}×)" * (c["ratio_ms"] != 1) for c in cells
        ]
        rates = ", ".join(f"{found[setting, threads, variant]['roofline_ms']:.0%}" for variant in compiled)
        table.append([setting, str(threads), *shown, rates])
    return table


def kinds() -> Table:
    """What an update of each kind of networks costs, compiled; ratios of processor time."""
    table = [["networks", "stock SB3", "fp32", "bf16", "fp32 beside lean fp32", "stock SB3 beside fp32"]]
    for row in json.loads((STORED / "benchmarks" / "kinds.json").read_text())["results"]:
        times = (_time(row[f"{variant}_ms"]) for variant in ("stock", "fp32", "bf16"))
        ratios = (f"{row[name]:.2f}×" for name in ("ratio_fp32_to_lean_fp32", "ratio_stock_to_fp32"))
        table.append([row["kind"], *times, *ratios])
    return table


def end_to_end() -> Table:
    """A whole run on one thread: steps per second and where the time goes, means of the repeats."""
    rows = json.loads((STORED / "benchmarks" / "end_to_end.json").read_text())["results"]
    shares = ("update", "reward", "simulator", "evaluation", "pay")
    table = [["updates and reward code", "steps/s", *(f"{share}, share of the time" for share in shares), "other"]]
    means = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        means[variant] = {key: np.mean([row[key] for row in own]) for key in own[0] if key != "variant"}
    for variant, found in sorted(means.items(), key=lambda item: float(item[1]["steps_per_second"])):
        ratio = found["steps_per_second"] / means["stock"]["steps_per_second"]
        shown = [f"{found[f'{share}_share']:.0%}" for share in shares]
        rest = 1 - sum(found[f"{share}_share"] for share in shares)
        name = "SB3's `train`, straightforward reward code" if variant == "stock" else variant
        table.append([name, f"{found['steps_per_second']:.0f} ({ratio:.1f}×)", *shown, f"{rest:.0%}"])
    return table


def fitting() -> Table:
    """Rank correlation of learned and true reward on the 5000 steps after the tenth session, by way of fitting."""
    tasks = [path.stem for path in sorted((STORED / "fitting").glob("*.csv"))]
    found = {task: {row["way"]: row for row in _rows(f"fitting/{task}.csv")} for task in tasks}
    ways = dict.fromkeys(way for task in ("walker-walk", *tasks) for way in found[task])
    table = [["fitted (by segment, by step)", *tasks]]
    for way in sorted(ways, key=list(WAYS).index):
        cells = [found[task].get(way) for task in tasks]
        shown = [
            "–" if row is None else f"{float(row['by_segment']):.2f}, {float(row['by_step']):.2f}" for row in cells
        ]
        table.append([way, *shown])
    return table


def second_term_runs() -> Table:
    """The second term in the bf16 runs: split halves, size beside Term 1, and what the reward came to."""
    table = [
        [
            "method",
            "updates with an estimate",
            "cosine of the halves over 0.3: how many, most in a row",
            "Term 2's raw norm over Term 1's",
            "walker-walk, last five sessions: loss on the answers with the price on size",
            "rank correlation with the task's reward: range, median",
        ]
    ]
    found: dict[str, list[tuple[str, list[dict[str, float]]]]] = {}
    for task in ("walker-walk", "window-open"):
        for path in sorted((STORED / "first-light" / task).glob("*/metrics.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found.setdefault(path.parent.name.rpartition("-s")[0], []).append((task, rows))
    for method in ("aparl", "penalty", "aparl-raw"):
        name, agreed, together, sizes, losses, ranks = method.split("-")[0], 0, 0, [], [], []
        for task, rows in found[method]:
            sessions = [row for row in rows if "feedback/session" in row]
            row_of = 0
            for row in sessions:
                high = (row[f"{name}/split_cosine"] or 0) > 0.3
                row_of = row_of + 1 if high else 0
                agreed, together = agreed + high, max(together, row_of)
            sizes += [row[f"{name}/term2_norm"] / one for row in sessions if (one := row.get(f"{name}/term1_norm"))]
            if task == "walker-walk":
                losses += [row["reward/loss"] for row in sessions[-5:]]
                ranks += [row["reward/rank_correlation"] for row in rows if "reward/rank_correlation" in row][-5:]
        table.append(
            [
                f"`{method}`",
                str(len(sizes)),
                f"{agreed}, {together}",
                " to ".join(f"{size:,.0f}" if size >= 10 else f"{size:.2g}" for size in (min(sizes), max(sizes))),
                f"{min(losses):.2f} to {max(losses):.2f}",
                f"{min(ranks):.2f} to {max(ranks):.2f}, {np.median(ranks):.2f}",
            ]
        )
    return table


def theory() -> Table:
    """What the exact problems say of the papers' claims; intervals over seeds are bootstrap ones."""
    exact = _rows("theory/claim_i.csv", measurement="exact")
    sampled = _rows("theory/claim_i.csv", curvature="full")
    full, fisher, paper, direct = (_numbers(exact, f"cosine_{name}") for name in ("full", "fisher", "paper", "term_1"))
    low, median, high = np.percentile(paper, [10, 50, 90])
    sampling = slope(_numbers(sampled, "samples"), _numbers(sampled, "rms_error"))
    squares = _numbers(_rows("theory/claim_ii.csv"), "squared_hypergradient").reshape(-1, 100).mean(axis=0)
    steps = np.arange(1, 101)
    running = np.cumsum(squares) / steps
    penalty = _rows("theory/claim_iii.csv")
    sigmas = ("1", "0.1", "0.01")
    errors, printed = (
        [np.median(_numbers([row for row in penalty if row["sigma"] == sigma], name)) for sigma in sigmas]
        for name in ("error", "error_printed_sign")
    )
    gaps = [slope(*_averages(_rows("theory/claim_iv.csv", scale=scale), "k", "gap", np.mean)) for scale in ("2", "4")]
    constants = _rows("theory/claim_viii.csv", measurement="constants")
    mu, tight = _numbers(constants, "mu"), _numbers(constants, "response") / _numbers(constants, "response_bound")
    away = slope(*_averages(_rows("theory/claim_viii.csv", measurement="error"), "distance", "error"))
    needed, inner, q = (_rows("theory/claim_ix.csv", measurement=name) for name in ("needed", "inner", "q"))
    complexity = {
        "sigma": slope(_numbers(needed, "epsilon"), _numbers(needed, "sigma")),
        "B": slope(_numbers(needed, "epsilon"), _numbers(needed, "B")),
        "K": slope(_numbers(inner, "epsilon"), _numbers(inner, "K")),
        "n": slope(_numbers(q, "n"), _numbers(q, "squared_error")),
    }
    # the exponent that n needs for Q's squared error, which is divided by sigma² ~ ε
    samples = 2 / complexity["n"]
    return [
        ["claim", "measured", "theory"],
        [
            f"implicit gradient against central differences, {len(exact)} random MDPs",
            f"largest relative error {_numbers(exact, 'error_to_differences').max():.0e}",
            "0",
        ],
        ["sampled implicit gradient, error against N", f"slope {sampling:.2f}", "−½"],
        [
            "smallest cosine to the truth: full Hessian, Fisher at the soft optimum",
            f"{full.min():.3f}, {fisher.min():.3f}",
            "1",
        ],
        [
            "the same with the curvature printed in PARL (16), median [10 %, 90 %]",
            f"{median:.2f} [{low:.2f}, {high:.2f}]; on {np.mean(paper < direct):.0%} of the MDPs worse than leaving "
            "the term out",
            "not the Hessian",
        ],
        [
            "A-PARL's squared gradient: mean over T steps; at step T",
            f"slope {slope(steps[50:], running[50:]):.2f}; {slope(steps[9:], squares[9:]):.2f}",
            "−1, trivial for a mean of anything that falls faster than 1/t; −1 or less",
        ],
        [f"penalty gradient, relative error at sigma {', '.join(sigmas)}", _listed(errors, ".2g"), "∝ sigma"],
        ["the same with the sign printed in Algorithms 1 and 3", _listed(printed, ".2f"), "does not vanish"],
        ["normalised inner steps, gap against k, c = 2; 4", f"slope {gaps[0]:.2f}; {gaps[1]:.2f}", "−1 or less"],
        [
            "PARL's lemmas: curvature mu of V, median [least]; dtheta*/dphi over its bound, median [largest]",
            f"{np.median(mu):.1e} [{mu.min():.1e}]; {np.median(tight):.2f} [{tight.max():.2f}]",
            "above 0; at most 1",
        ],
        ["PARL's lemmas: hypergradient's error against theta's distance from theta*", f"slope {away:.2f}", "1"],
        [
            "BRL: sigma, rollouts B, inner steps K for a squared error ε",
            f"slopes {complexity['sigma']:.2f}, {complexity['B']:.2f}, {complexity['K']:.2f}",
            "½, −2, −1 (at least)",
        ],
        ["BRL: Q's squared error against n samples", f"slope {complexity['n']:.2f}", "−1"],
        [
            "BRL: exponents of T (the theorem's −1), K and n together",
            f"{-1 + complexity['K'] + samples:.1f}",
            "−4",
        ],
    ]


def gaming() -> Table:
    """The exact hypergradient on grid worlds: differences paired over the seeds, means of the settings."""
    rows = [row for row in _rows("theory/claim_vii.csv") if row["step"] == "100"]
    found = {
        (name, method): np.array(
            [
                np.mean(_numbers([row for row in rows if (row["method"], row["seed"]) == (method, seed)], name))
                for seed in dict.fromkeys(row["seed"] for row in rows)
            ]
        )
        for name in ("true_return", "G")
        for method in ("off_policy", "on_policy", "full", "win_rate")
    }
    named = {"full": "full hypergradient", "on_policy": "Term 1 on fresh pairs", "win_rate": "win-rate utility"}
    named |= {"off_policy": "Term 1 on pairs of a uniform policy"}
    table = [["", "true return, of the optimum's [95 %]", "upper objective G, nats [95 %]"]]
    for method, reference in (("on_policy", "off_policy"), ("full", "on_policy"), ("win_rate", "on_policy")):
        cells = []
        for name in ("true_return", "G"):
            mean, low, high = interval(found[name, method] - found[name, reference])
            cells.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
        table.append([f"{named[method]} less {named[reference]}", *cells])
    return table


def kills() -> Table:
    """Runs killed with SIGKILL at random moments, by updater and teacher: how many kills, and what came of the runs."""
    found = {}
    for row in _rows("faults/table.csv"):
        _, *what = row["fault"].split(", ")
        if len(what) == 2:
            found[what[0], what[1]] = f"{row['times']}: {re.sub(r' [(][0-9]+[)]', '', row['outcome'])}"
    teachers = dict.fromkeys(teacher for _, teacher in found)
    return [
        ["updater", *teachers],
        *([f"`{u}`", *(found.get((u, t), "–") for t in teachers)] for u in sorted({u for u, _ in found})),
    ]


TABLES: dict[str, Callable[[], Table]] = {
    "first-light": first_light,
    "fp32": fp32,
    "evidence": evidence,
    "campaign": campaign,
    "agents": agents,
    "true-reward": true_reward,
    "meta-world": meta_world,
    "uneven-batches": uneven_batches,
    "figure-2": partial(successes, "figure-2"),
    "noisier": partial(successes, "noisier"),
    "window-open": window_open,
    "seeds-40-44": partial(successes, "seeds-40-44"),
    "seeds-50-64": partial(successes, "seeds-50-64"),
    "seeds-70-79": partial(successes, "seeds-70-79"),
    "new-reward": new_reward,
    "novel": novel,
    "default": default,
    "few-answers": few_answers,
    "figure-2-again": figure_2_again,
    "quick": quick,
    "blame": blame,
    "fp32-differences": fp32_differences,
    "reached": reached,
    "walker-steps": walker_steps,
    "sac-update": sac_update,
    "kinds": kinds,
    "end-to-end": end_to_end,
    "fitting": fitting,
    "second-term-runs": second_term_runs,
    "theory": theory,
    "gaming": gaming,
    "kills": kills,
    "second-term-exact": lambda: second_term.exact(_rows("second-term/exact.csv")),
    "second-term-gate": lambda: second_term.gate(_rows("second-term/gate.csv")),
    "second-term-sampled": lambda: second_term.sampled(_rows("second-term/sampled.csv")),
    "second-term-walker-walk": lambda: second_term.robot(_rows("second-term/walker-walk.csv")),
    "second-term-window-open": lambda: second_term.robot(_rows("second-term/window-open.csv")),
    "second-term-seen": lambda: second_term.seen(
        [row for task in ("walker-walk", "window-open") for row in _rows(f"second-term/{task}.csv")]
    ),
}


def _rows(name: str, **only: str) -> list[dict[str, str]]:
    """The rows of a stored CSV whose columns have these values."""
    with (STORED / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in only.items())]


def _numbers(rows: Sequence[dict[str, str]], name: str) -> Array:
    return np.array([float(row[name]) for row in rows])


def _averages(
    rows: Sequence[dict[str, str]], by: str, name: str, average: Callable[[Array], float] = np.median
) -> tuple[list[float], list[float]]:
    """The values of one column, and the average of another at each of them."""
    at = list(dict.fromkeys(row[by] for row in rows))
    found = [float(average(_numbers([row for row in rows if row[by] == one], name))) for one in at]
    return [float(one) for one in at], found


def _listed(values: Sequence[Any], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


@cache
def _runs(*folders: Path) -> list[Run]:
    """The runs in or below these folders, read once."""
    return find_runs(folders)


def _methods(folder: Path) -> list[tuple[str, list[Run]]]:
    """The runs below a folder by method, each named METHOD-sSEED, the oracle last."""
    found: dict[str, list[Run]] = {}
    for run in _runs(folder):
        found.setdefault(Path(run.source).name.rpartition("-s")[0], []).append(run)
    return sorted(found.items(), key=lambda item: (item[0] == ORACLE, item[0]))


def _reward_precision(run: Run) -> str:
    """bf16 runs of before the reward had a precision of its own fitted it in fp32."""
    return str(run.setting("reward.precision") or "fp32")


def _finals(runs: Sequence[Run], metric: str) -> Array:
    return np.array([float(tail_mean(*run.series(metric))) for run in runs])


def _areas(runs: Sequence[Run]) -> Array:
    return np.array([float(area_under_curve(*run.series("eval/return"))) for run in runs])


def _success_areas(runs: Sequence[Run]) -> Array:
    return np.array([float(area_under_curve(*run.series("eval/success"))) for run in runs])


def _last_fifth(run: Run) -> float:
    """Mean success over the evaluations in the last fifth of its steps."""
    at, values = run.series("eval/success")
    return float(values[at > 0.8 * at[-1]].mean())


def _gap(run: Run) -> float:
    """Mean over-optimisation while most answers are given."""
    at, values = run.series("reward/gap")
    return float(values[(at >= 8000) & (at <= 21_000)].mean())


def _success_cells(runs: Sequence[Run], pebble: Sequence[Run]) -> list[str]:
    """What `SUCCESS` names; no difference of runs from themselves."""
    areas, others = _success_areas(runs), _success_areas(pebble)
    last = np.array([_last_fifth(run) for run in runs])
    difference = "–" if runs is pebble else _welch(areas, others, "success")
    return [_mean(areas, "success"), _mean(last, "success"), difference]


def _points(differences: Array) -> str:
    """Mean difference of paired success rates and Student's interval, in points of a hundred, within ±100."""
    low, high = 100 * np.clip(student_interval([differences]), -1, 1)
    shown = f"{100 * differences.mean():.0f}"
    return shown if np.isnan(low) else f"{shown} [{low:.0f}, {high:.0f}]"


def _mean(values: Array, unit: str = "return") -> str:
    """Mean and Student's interval; a success rate's lies within 0 and 1."""
    ends = np.array(student_interval([values]))
    if unit == "success":
        ends = np.clip(ends, 0, 1)
    shown = [f"{x:.0%}" if unit == "success" else f"{x:.0f}" for x in (values.mean(), *ends)]
    return shown[0] if np.isnan(ends).any() else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _welch(x: Array, y: Array, unit: str = "return") -> str:
    """Difference of the means and, of two scores or more on either side, Welch's interval; a success rate's in points
    of a hundred."""
    from scipy.stats import ttest_ind

    scale = 100 if unit == "success" else 1
    shown = f"{scale * (x.mean() - y.mean()):.0f}"
    if min(len(x), len(y)) < 2:
        return shown
    low, high = ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    return f"{shown} [{scale * low:.0f}, {scale * high:.0f}]"


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
