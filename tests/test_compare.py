"""Run folders go in; a report whose every number is a row of a CSV comes out."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_rgb

from pbrl import ORACLES, compare
from pbrl.comparing import plots
from pbrl.comparing.curves import Comparison, gather
from pbrl.comparing.report import build_sections
from pbrl.comparing.runs import ComparisonError, Run, find_runs, read_rows, select, wandb_runs, without_copies
from pbrl.comparing.tables import all_tables

STEPS = np.arange(0, 100_001, 5000)
SPEED = {"pebble": 40_000, "surf": 30_000, "aparl": 20_000, "oracle": 12_000}  # steps to 63 % of the ceiling


def write_run(folder: Path, task: str = "walker-walk", updater: str = "pebble", seed: int = 0, **changes) -> Path:
    """A run that approaches 900 (or success 0.9) exponentially. `changes`: config keys, "choices", "steps", "complete",
    "score" (a function of steps)."""
    steps, complete = changes.pop("steps", STEPS), changes.pop("complete", True)
    rng = np.random.default_rng([seed, sum(map(ord, task + updater))])
    speed = SPEED.get(updater, 40_000) * rng.uniform(0.7, 1.3)
    score = changes.pop("score", lambda x: 0.95 - 0.9 * np.exp(-x / speed) + 0.02 * rng.normal(size=len(x)))(steps)
    choices = {"env": task, "updater": updater, "teacher": "oracle", "query": "disagreement", "agent": "sac"}
    config = {"total_steps": 100_000, "seed": seed, "feedback": {"budget": 500}, "env": {"_target_": f"envs.{task}"}}
    config |= {"choices": choices | changes.pop("choices", {})} | changes
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for step, value in zip(steps.tolist(), score.tolist(), strict=True):
        success = {} if task == "walker-walk" else {"eval/success": value}
        rows.append({"env_step": step, "time/wall": step / 50, "eval/return": 1000 * value} | success)
        if updater != "oracle" and step < 60_000 and step % 10_000 == 0:
            asked = 100 * (1 + step // 10_000)
            health = {"reward/holdout_accuracy": 0.95 - 0.3 * math.exp(-step / 2e4), "reward/calibration_error": 0.05}
            labels = {"feedback/labels": min(asked, 500), "feedback/asked": asked, "reward/loss": None}
            gap = {"reward/gap": step / 3e4, "reward/learned_per_step": 0.5, "reward/true_per_step": 0.1}
            rows.append({"env_step": step + 1, "time/wall": step / 50 + 1} | labels | health | gap)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"complete": complete, "env_step": int(steps[-1])}))
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 runs: three methods and the oracle on two tasks."""
    tmp_path = tmp_path_factory.mktemp("sweep")
    for task in ("walker-walk", "door-open"):
        for updater in ("pebble", "surf", "aparl", "oracle"):
            for seed in range(2 if updater == "oracle" else 4):
                write_run(tmp_path / "runs" / f"{task}-{updater}-{seed}", task, updater, seed)
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def out(sweep: Path) -> Path:
    """Their report."""
    compare.main([str(sweep), "--out", str(sweep.parent / "out")])
    return sweep.parent / "out"


def test_report_of_28_runs_is_complete_and_needs_no_network(out: Path) -> None:
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {Path(picture).stem for picture in pictures} == {
        *("curves_steps", "curves_labels", "aggregate", "improvement", "samples", "profiles", "health", "gap")
    }
    assert all((out / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert not re.search(r"https?://|<script|<link|url\(", page)
    origins = re.findall(r"(\w+\.csv)", text)
    assert {path.name for path in out.glob("*.csv")} == set(origins) - {"experiments"}


def test_every_score_can_be_traced_to_the_runs_it_comes_from(out: Path) -> None:
    """From the report's cell to scores.csv, to the runs named there, to their evaluations, to their folders."""
    scores, runs, evaluations = (read_csv(out / f"{name}.csv") for name in ("scores", "runs", "evaluations"))
    row = next(row for row in scores if (row["task"], row["method"]) == ("door-open", "aparl"))
    named = [run for run in runs if run["run"] in row["sources"].split()]
    assert [Path(run["source"]).name for run in named] == [f"door-open-aparl-{seed}" for seed in range(4)]
    finals = []
    for run in named:
        tail = [e for e in evaluations if e["run"] == run["run"] and int(e["env_step"]) >= 90_000]
        assert len(tail) == 3
        finals.append(np.mean([float(e["success"]) for e in tail]))
        logged = {r["env_step"]: r for r in read_rows(Path(run["source"]) / "metrics.jsonl") if "eval/success" in r}
        assert float(tail[0]["success"]) == pytest.approx(logged[int(tail[0]["env_step"])]["eval/success"], rel=1e-5)
    assert float(row["final"]) == pytest.approx(np.mean(finals), rel=1e-4) and row["estimator"] == "mean, Student's t"
    oracle = next(float(r["score"]) for r in read_csv(out / "oracle.csv") if r["task"] == "door-open")
    assert float(row["final_normalized"]) == pytest.approx(float(row["final"]) / oracle, rel=1e-4)
    shown = f"{float(row['final']):.3g} [{float(row['final_low']):.3g}, {float(row['final_high']):.3g}]"
    assert shown in (out / "report.md").read_text() and shown in (out / "report.html").read_text()


def test_different_budgets_and_steps_are_refused_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", updater="aparl", feedback={"budget": 1000})
    write_run(tmp_path / "c", updater="surf", total_steps=200_000, choices={"teacher": "mistake"})
    write_run(tmp_path / "d", updater="oracle", feedback={"budget": 0}, total_steps=500_000)  # an oracle may differ
    with pytest.raises(ComparisonError) as error:
        select(find_runs([tmp_path]))
    message = str(error.value)
    assert f"feedback.budget is 500 in {tmp_path}/a, {tmp_path}/c; 1000 in {tmp_path}/b" in message
    assert f"total_steps is 100000 in {tmp_path}/a, {tmp_path}/b; 200000 in {tmp_path}/c" in message
    assert f'teacher is "oracle" in {tmp_path}/a, {tmp_path}/b; "mistake" in {tmp_path}/c' in message
    assert f"{tmp_path}/d" not in message
    notes = select(find_runs([tmp_path]), allow_mixed=True).notes
    assert sum(note.startswith("Mixed knowingly: walker-walk: ") for note in notes) == 3


def test_teachers_of_one_option_with_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    """What an older config does not name is the default; the seed and where a teacher is reached do not matter."""
    ours = {"_target_": "teachers.simulated.SimulatedTeacher"}
    named = {"teacher": "mistake"}
    for name, updater, settings in (
        ("a", "pebble", {"mistake": 0.1, "seed": 0, "skip": 0}),
        ("b", "aparl", {"mistake": 0.4, "seed": 1, "skip": 0.0}),
        ("c", "surf", {"mistake": 0.1}),
    ):
        write_run(tmp_path / name, updater=updater, teacher=ours | settings, choices=named)
    with pytest.raises(ComparisonError) as error:
        select(find_runs([tmp_path]))
    (line,) = (line for line in str(error.value).splitlines() if "teacher" in line)
    assert f"teacher.mistake is 0.1 in {tmp_path}/a, {tmp_path}/c; 0.4 in {tmp_path}/b" in line
    assert select(find_runs([tmp_path]), ["updater", "teacher.mistake"])
    assert select(find_runs([tmp_path / "a", tmp_path / "c"]))


def test_a_named_difference_makes_methods_of_it(tmp_path: Path) -> None:
    write_run(tmp_path / "a", feedback={"budget": 100})
    write_run(tmp_path / "b", feedback={"budget": 1000})
    selection = select(find_runs([tmp_path]), method_keys=["updater", "feedback.budget"])
    assert list(selection.groups["walker-walk"]) == ["pebble, budget=100", "pebble, budget=1000"]


def test_methods_are_told_apart_by_what_differs_within_an_updater(tmp_path: Path) -> None:
    write_run(tmp_path / "a", choices={"query": "uniform"})
    write_run(tmp_path / "b")
    write_run(tmp_path / "c", updater="aparl")
    selection = select(find_runs([tmp_path]))
    assert selection.method_keys == ("updater", "query")
    assert set(selection.groups["walker-walk"]) == {"pebble, uniform", "pebble, disagreement", "aparl, disagreement"}


def test_one_seed_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=3)
    write_run(tmp_path / "b", seed=3)
    with pytest.raises(ComparisonError, match=f"pebble: seed 3 occurs 2 times, in {tmp_path}/a, {tmp_path}/b"):
        select(find_runs([tmp_path]))


def test_one_environment_configured_in_two_ways_is_two_tasks(tmp_path: Path) -> None:
    write_run(tmp_path / "a", task="dm_control", env={"domain": "hopper", "horizon": 1000})
    write_run(tmp_path / "b", task="dm_control", env={"domain": "reacher", "horizon": 1000})
    assert list(select(find_runs([tmp_path])).groups) == ["dm_control (domain=hopper)", "dm_control (domain=reacher)"]


def test_unfinished_runs_are_left_out_or_cut_the_curves(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, steps=STEPS[:11], complete=False)
    selection = select(find_runs([tmp_path]))
    assert [run.source for run in selection.groups["walker-walk"]["pebble"]] == [f"{tmp_path}/a"]
    assert any(f"{tmp_path}/b" in note for note in selection.notes)
    mixed = gather(select(find_runs([tmp_path]), allow_mixed=True), tmp_path)
    assert mixed.curves["walker-walk"]["pebble"].steps[-1] == 50_000  # where the shorter one ends


def test_a_run_that_was_to_go_on_further_and_was_killed_is_unfinished(tmp_path: Path) -> None:
    for name, total in (("done", 100_000), ("extended", 200_000)):
        summary = write_run(tmp_path / name, total_steps=total) / "summary.json"
        summary.write_text('{"complete": true, "total_steps": 100000}')
    assert [run.complete for run in find_runs([tmp_path])] == [True, False]


def test_runs_that_differ_in_a_value_are_not_averaged_without_a_word(tmp_path: Path) -> None:
    named = {"reward": "ensemble"}
    for seed, convexity in enumerate((0.0, 0.0, 3)):
        reward = {"_target_": "pbrl.reward.RewardEnsemble", "convexity": convexity, "members": 3}
        write_run(tmp_path / str(seed), seed=seed, reward=reward, query={"pool": 10}, choices=named)
    ours = {"_target_": "pbrl.reward.RewardEnsemble", "members": 3.0}
    write_run(tmp_path / "old", seed=3, reward=ours, choices=named)  # before the key: as its constructor has it
    selection = select(find_runs([tmp_path]))
    (note,) = (note for note in selection.notes if "Averaged" in note)
    assert "pebble on walker-walk, although its runs differ in reward.convexity (0.0, 3.0)" in note
    assert note.endswith("--method-keys updater,reward.convexity")
    apart = select(find_runs([tmp_path]), ["updater", "reward.convexity"])
    assert len(apart.groups["walker-walk"]) == 3 and not any("Averaged" in note for note in apart.notes)


def test_what_an_older_run_does_not_name_is_what_it_did(tmp_path: Path) -> None:
    """Absent is 0: one method with 0, another than 3; and one task, whether its config says what is the case or not."""
    ours = {"_target_": "pbrl.reward.RewardEnsemble"}
    walker = {"_target_": "envs.dm_control.DMControl", "domain": "walker", "task": "walk"}
    write_run(tmp_path / "old", seed=0, reward=ours, env=walker, choices={"reward": "ensemble"})
    for seed, convexity in ((1, 0.0), (2, 3.0)):
        reward = {**ours, "convexity": convexity}
        folder = tmp_path / "new" / str(seed)
        write_run(folder, seed=seed, reward=reward, env={**walker, "action_repeat": 1}, choices={"reward": "ensemble"})
    alike = select(find_runs([tmp_path / "old", tmp_path / "new/1"]))
    assert list(alike.groups) == ["walker-walk"] and not any("Averaged" in note for note in alike.notes)
    (note,) = (note for note in select(find_runs([tmp_path / "old", tmp_path / "new/2"])).notes if "Averaged" in note)
    assert "reward.convexity (0.0, 3.0)" in note


def test_methods_that_were_asked_unequally_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", updater="oracle")
    write_run(tmp_path / "c", updater="penalty", steps=STEPS[STEPS < 30_000])
    notes = select(find_runs([tmp_path])).notes
    assert "Asked unequally on walker-walk, questions per run: pebble 600, penalty 300" in notes
    assert not any("unequally" in note for note in select(find_runs([tmp_path / "a", tmp_path / "b"])).notes)


def test_a_torn_last_line_is_dropped_and_a_broken_one_refused(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"env_step": 1, "eval/return": 2.0}\n{"env_step": 2, "eval/re')
    assert read_rows(log) == [{"env_step": 1, "eval/return": 2.0}]
    log.write_text('{"env_step": 1}\n{"env_st\n{"env_step": 3}\n')
    with pytest.raises(ComparisonError, match=r"metrics\.jsonl, line 2"):
        read_rows(log)


def test_what_a_resumed_run_did_again_counts_once() -> None:
    rows = [{"env_step": step, "eval/return": value} for step, value in ((0, 1.0), (10, 2.0), (10, 3.0), (20, None))]
    steps, values = Run("", {}, rows, True).series("eval/return")
    np.testing.assert_array_equal([steps, values], [[0, 10], [1.0, 3.0]])


def test_rows_beyond_the_step_a_run_was_resumed_from_are_dropped(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(f'{{"env_step": {step}, "n": {n}}}\n' for n, step in enumerate((10, 20, 30, 20, 40))))
    assert [(row["env_step"], row["n"]) for row in read_rows(log)] == [(10, 0), (20, 1), (20, 3), (40, 4)]


def test_over_labels_a_point_is_the_last_score_with_that_many(tmp_path: Path) -> None:
    """Sessions at 1, 10001, … 50001 bring 100 labels each, up to 500; the score grows by one per 5000 steps."""
    write_run(tmp_path / "a", score=lambda steps: steps / 5e6)
    curves = gather(select(find_runs([tmp_path])), tmp_path).curves["walker-walk"]["pebble"]
    np.testing.assert_array_equal(curves.labels, [0, 100, 200, 300, 400, 500])
    np.testing.assert_allclose(curves.by_label[0], [0, 2, 4, 6, 8, 20])


def test_over_labels_the_last_point_is_the_end_of_the_curves_over_steps(tmp_path: Path) -> None:
    """One method ends at step 100,000 with 500 labels, the other at 30,000 with 300, where both are cut; or both at
    the end, the other with none beyond the 200 of its first 20,000 steps."""
    folder = write_run(tmp_path / "more", score=lambda steps: steps / 5e6)
    write_run(tmp_path / "short", updater="surf", steps=STEPS[:7], complete=False, score=lambda steps: steps / 5e6)
    curves = gather(select(find_runs([tmp_path]), allow_mixed=True), tmp_path).curves["walker-walk"]
    for one in curves.values():
        np.testing.assert_array_equal(one.labels, [0, 100, 200, 300])
        np.testing.assert_allclose(one.by_label[0], [0, 2, 4, 6])  # and not the 300's last score, at step 40,000
    fewer = write_run(tmp_path / "other/fewer", updater="surf", score=lambda steps: steps / 5e6)
    rows = [row for row in read_rows(fewer / "metrics.jsonl") if row.get("feedback/labels", 0) <= 200]
    (fewer / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = gather(select(find_runs([folder, fewer])), tmp_path).curves["walker-walk"]
    np.testing.assert_array_equal(curves["pebble"].labels, [0, 100, 200, 300, 400, 500])
    np.testing.assert_allclose(curves["pebble"].by_label[0], [0, 2, 4, 6, 8, 20])
    np.testing.assert_allclose(curves["surf"].by_label[0], [0, 2, 20, 20, 20, 20])
    assert [curves[name].end("labels") for name in ("pebble", "surf")] == [500, 200]


def test_a_session_counts_for_the_evaluations_after_it_in_the_log() -> None:
    evaluated = {"eval/return": 1.0}
    rows = [{"env_step": 10, "feedback/labels": 5}, {"env_step": 10} | evaluated]  # its own steps ended at step 10
    rows += [{"env_step": 20} | evaluated, {"env_step": 20, "feedback/labels": 9}, {"env_step": 30} | evaluated]
    assert Run("", {}, rows, True).labels_at(np.array([10.0, 20, 30, np.inf])).tolist() == [5, 5, 9, 9]


def test_a_runs_scores_are_of_its_own_evaluations_whatever_it_is_compared_with(tmp_path: Path) -> None:
    write_run(tmp_path / "a", score=lambda steps: steps / 1e5)
    alone = gather(select(find_runs([tmp_path])), tmp_path).curves["walker-walk"]["pebble"]
    write_run(tmp_path / "b", updater="penalty", steps=np.append(np.arange(0, 100_000, 1300), 100_000))
    beside = gather(select(find_runs([tmp_path])), tmp_path).curves["walker-walk"]["pebble"]
    assert (beside.final, beside.area) == (alone.final, alone.area) == (950, 500)


def test_samples_to_a_share_of_the_oracle_and_the_ratio_to_pebble(tmp_path: Path) -> None:
    """The oracle's score is 0.8; half of it is reached at 80,000 steps, 30,000 steps and never."""
    for updater, at in (("pebble", 80_000), ("aparl", 30_000), ("surf", np.inf)):
        for seed in range(2):
            write_run(tmp_path / f"{updater}{seed}", "hammer", updater, seed, score=lambda s, at=at: 0.5 * (s >= at))
    (tmp_path / "hammer.csv").write_text("env_step,return,success\n0,1,0\n50000,700,0.8\n100000,700,0.8\n")
    data = gather(select(find_runs([tmp_path])), tmp_path)
    rows = {(row["method"], row["share"]): row for row in all_tables(data)["samples"]}
    aparl, surf, pebble = (rows[method, 0.5] for method in ("aparl", "surf", "pebble"))
    assert (pebble["level"], pebble["steps"], pebble["steps_ratio"]) == (pytest.approx(0.4), 80_000, 1)
    assert (aparl["steps"], aparl["steps_ratio"], aparl["steps_ratio_high"]) == (30_000, 0.375, 0.375)
    assert (aparl["labels"], pebble["labels"]) == (300, 500) and not aparl["steps_ratio_is_bound"]
    assert (surf["steps"], surf["steps_ratio"]) == (math.inf, math.inf)
    assert math.isnan(rows["aparl", 0.7]["steps_ratio"])  # neither gets to 0.56


def test_the_oracles_score_is_by_the_same_estimator_as_those_divided_by_it(tmp_path: Path) -> None:
    """Ten oracles, one of them far off, beside two runs of a method: means throughout, no interquartile mean."""
    for seed in range(10):
        top = 0.1 if seed == 0 else 0.8
        write_run(
            tmp_path / f"o{seed}", "hammer", "oracle", seed, score=lambda steps, top=top: np.full(len(steps), top)
        )
    for seed in range(2):
        write_run(tmp_path / f"p{seed}", "hammer", seed=seed)
    data = gather(select(find_runs([tmp_path])), tmp_path)
    assert data.oracle_score("hammer") == pytest.approx(0.73)


def test_where_pebble_does_not_get_there_the_ratio_is_a_bound(tmp_path: Path) -> None:
    for updater, top in (("pebble", 0.3), ("aparl", 0.5)):
        write_run(tmp_path / updater, "hammer", updater, score=lambda s, top=top: top * (s >= 40_000))
    (tmp_path / "hammer.csv").write_text("env_step,return,success\n0,1,0\n100000,700,0.8\n")
    tables = all_tables(gather(select(find_runs([tmp_path])), tmp_path))
    row = next(row for row in tables["samples"] if (row["method"], row["share"]) == ("aparl", 0.5))
    assert (row["steps_ratio"], row["steps_ratio_is_bound"]) == (0.4, True)  # 40,000 of the 100,000 steps compared


def test_without_an_oracle_nothing_is_normalised_and_the_report_says_so(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / f"runs/p{seed}", seed=seed)
        write_run(tmp_path / f"runs/a{seed}", updater="aparl", seed=seed)
    compare.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--oracle-dir", str(tmp_path / "none")])
    assert "no oracle for eval/return, so nothing is normalised here" in (tmp_path / "out/report.md").read_text()
    assert not (tmp_path / "out/samples.csv").exists() and not (tmp_path / "out/aggregate.csv").exists()
    assert {row["final_normalized"] for row in read_csv(tmp_path / "out/scores.csv")} == {""}
    assert len(read_csv(tmp_path / "out/improvement.csv")) == 2  # needs no oracle


def test_a_single_seed_has_a_score_and_no_interval(tmp_path: Path) -> None:
    write_run(tmp_path / "a", score=lambda steps: np.full(len(steps), 0.5))
    tables = all_tables(gather(select(find_runs([tmp_path])), tmp_path))
    row = tables["scores"][0]
    assert row["final"] == 500 and math.isnan(row["final_low"]) and math.isnan(row["final_high"])


def test_what_a_single_seed_needs_has_no_interval_nor_has_a_ratio_to_it(tmp_path: Path) -> None:
    for name, updater, seed in (("a", "pebble", 0), ("b", "aparl", 0), ("c", "aparl", 1)):
        write_run(tmp_path / name, "hammer", updater, seed, score=lambda steps: 0.5 * (steps >= 40_000))
    (tmp_path / "hammer.csv").write_text("env_step,return,success\n0,1,0\n100000,700,0.8\n")
    data = gather(select(find_runs([tmp_path])), tmp_path)
    tables = all_tables(data)
    pebble, aparl = (row for row in tables["samples"] if row["share"] == 0.5)
    assert (pebble["steps"], aparl["steps"], aparl["steps_high"], aparl["steps_ratio"]) == (40_000, 40_000, 40_000, 1)
    assert all(math.isnan(row[f"{name}_{end}"]) for end in ("low", "high")
               for row, name in ((pebble, "steps"), (pebble, "labels"), (aparl, "steps_ratio")))  # fmt: skip
    (section,) = (s for s in build_sections(data, tables) if s.title.startswith("Samples"))
    assert section.table and section.table[1][0][3:] == ["40,000", "1", "400", "1"]


def test_the_over_optimisation_gap_is_a_curve_where_it_was_logged(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    tables = all_tables(gather(select(find_runs([tmp_path])), tmp_path))
    gap = [row for row in tables["gap"] if row["metric"] == "reward/gap"]
    assert [(row["steps"], row["value"]) for row in gap][:3] == [(1, 0), (10_001, 1 / 3), (20_001, 2 / 3)]
    panels = plots.measures_figure(tables["gap"], ["pebble"]).axes
    assert panels[0].get_title() == "gap (standard deviations)" and len(panels) == 3


def test_figures_draw_the_rows_of_the_tables(sweep: Path, tmp_path: Path) -> None:
    data = gather(select(find_runs([sweep])), tmp_path)
    rows = all_tables(data)["curves_steps"]
    figure = plots.curves_figure(rows, "steps", data.metrics, data.methods)
    assert [panel.get_title() for panel in figure.axes] == ["door-open", "walker-walk"]
    drawn = {line.get_color(): line for line in figure.axes[0].lines}
    chosen = [row for row in rows if (row["task"], row["method"]) == ("door-open", "pebble")]
    np.testing.assert_array_equal(drawn["#0072B2"].get_xdata(), [row["steps"] for row in chosen])
    np.testing.assert_array_equal(drawn["#0072B2"].get_ydata(), [row["value"] for row in chosen])
    assert len(drawn) == 4  # three methods and the oracle, each in its own colour


# How the three kinds of colour-blind see linear RGB (Machado, Oliveira and Fernandes 2009, severity 1), and the normal.
VISIONS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Linear RGB to OKLab (Ottosson 2020), where distances are about what one sees; 0.02 is just noticeable.
TO_LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def oklab(color: str, vision: str) -> np.ndarray:
    values = np.array(to_rgb(color))
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISIONS[vision]) @ linear, 0, 1)
    return np.array(TO_LAB) @ np.cbrt(np.array(TO_LMS) @ seen)


@pytest.mark.parametrize("vision", VISIONS)
def test_twelve_methods_and_the_oracle_have_colours_apart_from_each_other_and_the_page(vision: str) -> None:
    styles = plots.looks([f"m{i}" for i in range(12)])
    shown = [oklab(look.color, vision) for look in styles.values()]
    for first, second in combinations([*shown, oklab("#FFFFFF", vision)], 2):
        assert np.linalg.norm(first - second) > 0.07


def test_methods_beyond_twelve_differ_in_line_and_the_oracle_is_apart() -> None:
    styles = plots.looks([f"m{i}" for i in range(24)])
    assert len({(look.color, look.line, look.marker) for look in styles.values()}) == 25


@pytest.mark.parametrize("methods", [2, 9, 14])
def test_figures_have_panels_of_one_size_and_nothing_overlaps_or_is_cut_off(methods: int) -> None:
    names = [f"pebble-with-option-{i}" for i in range(methods)]
    names[0] = "a-name-so-long-that-it-has-to-be-cut-somewhere-in-the-middle-of-it"
    common = {"low": 0.1, "high": 0.9, "runs": 3, "sources": ""}
    rows = [
        {"task": task, "method": name, "steps": step, "value": step / 1e5} | common
        for task in ("door-open", "walker-walk")
        for name in (*names, "oracle")
        for step in (0, 50_000, 100_000)
    ]
    metrics = {"door-open": "eval/success", "walker-walk": "eval/return"}
    improvement = [{"first": name, "second": names[0], "probability": 0.6} | common for name in names[1:]]
    for figure, size in (
        (plots.curves_figure(rows, "steps", metrics, names), (plots.WIDTH, plots.HEIGHT)),
        (plots.improvement_figure(improvement, names[0], names), (plots.WIDTH, 0.25 * (methods - 1) + 0.1)),
    ):
        page, renderer = figure.bbox, figure.canvas.get_renderer()  # type: ignore[attr-defined]
        boxes = [panel.get_tightbbox(renderer) for panel in figure.axes]
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
        for box in boxes:
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
        for panel in figure.axes:
            frame = panel.get_window_extent()
            assert (frame.width / figure.dpi, frame.height / figure.dpi) == pytest.approx(size)
    success = plots.curves_figure(rows, "steps", metrics, names).axes[0]
    assert success.get_ylim() == (0, 1) and not np.array_equal(success.get_ylim(), [-0.04, 1.04])


def test_each_figure_is_there_as_picture_and_for_print(out: Path) -> None:
    figures = out / "figures"
    names = {path.stem for path in figures.glob("*.png")}
    assert {path.stem for path in figures.glob("*.svg")} == names and "samples" in names
    assert "<text" in (figures / "curves_steps.svg").read_text()


def test_names_leave_the_folder_off_that_all_have_in_common(tmp_path: Path) -> None:
    for name in ("pebble", "aparl"):
        write_run(tmp_path / name, updater=name, choices={"experiment": f"first-light/{name}"})
    selection = select(find_runs([tmp_path]), ["experiment"], baseline="first-light/pebble")
    assert list(selection.groups["walker-walk"]) == ["pebble", "aparl"]
    assert gather(selection, tmp_path, baseline="first-light/pebble").base == "pebble"


def test_shares_that_nobody_reaches_are_a_sentence_and_no_table_of_infinities(tmp_path: Path) -> None:
    for updater in ("pebble", "aparl"):
        write_run(tmp_path / "runs" / updater, "hammer", updater, score=lambda steps: 0.1 * (steps > 0))
    (tmp_path / "hammer.csv").write_text("env_step,return,success\n0,1,0\n100000,700,0.8\n")
    data = gather(select(find_runs([tmp_path / "runs"])), tmp_path)
    (section,) = (s for s in build_sections(data, all_tables(data)) if s.title.startswith("Samples"))
    assert "No method reaches 50% of the oracle's score (0.4) on hammer." in section.text
    assert section.table is None and not section.figures


def compared(*arguments: str) -> Comparison:
    options = argparse.ArgumentParser()
    compare.add_run_options(options)
    return compare.read_comparison(options.parse_args(arguments))


def test_the_stored_oracle_of_another_environment_normalises_nothing(tmp_path: Path) -> None:
    shipped = {"_target_": "envs.metaworld.MetaWorld", "task": "window-open", "horizon": 300, "action_repeat": 2}
    write_run(tmp_path / "older", "window-open", env=shipped)  # without what was added since
    assert compared(str(tmp_path / "older")).references["window-open"].sources == str(ORACLES / "window-open.csv")
    write_run(tmp_path / "shorter", "window-open", env=shipped | {"horizon": 100, "action_repeat": 1})
    data = compared(str(tmp_path / "shorter"))
    assert not data.references and math.isnan(data.oracle_score("window-open"))
    (note,) = (note for note in data.notes if "its environment is not the shipped one" in note)
    assert str(ORACLES / "window-open.csv") in note and "updater=oracle" in note and "--oracle-dir" in note
    (tmp_path / "window-open.csv").write_text("env_step,return,success\n0,1,0\n100000,700,0.8\n")
    given = compared(str(tmp_path / "shorter"), "--oracle-dir", str(tmp_path))
    assert given.oracle_score("window-open") == pytest.approx(0.8)
    write_run(tmp_path / "mine/oracle", "window-open", "oracle", env=shipped | {"horizon": 100, "action_repeat": 1})
    assert compared(str(tmp_path / "shorter"), str(tmp_path / "mine")).references


MARKUP = "<img src=x onerror=alert(1)>|[click](javascript:alert(1))`$\\frac{\n\x1b[31m"


def test_what_a_strangers_run_says_is_shown_as_text(tmp_path: Path) -> None:
    """In the page, the Markdown, the figures (where $ would be TeX) and the CSVs (where = would be a formula)."""
    for seed, name in enumerate((MARKUP, "=HYPERLINK(1)", "pebble")):
        write_run(tmp_path / f"runs/=r{seed}<b>", updater=name, choices={"query": "+1", "env": f"@{MARKUP}"})
    write_run(tmp_path / "runs/long", updater="x" * 100_000, choices={"query": "-1", "env": f"@{MARKUP}"})
    compare.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--method-keys", "updater"])
    page, text = (tmp_path / "out/report.html").read_text(), (tmp_path / "out/report.md").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page and "\x1b" not in page + text
    assert not re.search(r"(?<!\\)<img src=x", text) and "[click](javascript" not in text
    assert "x" * 200 not in page + text
    drawn = (tmp_path / "out/figures/improvement.svg").read_text()
    assert "<img" not in drawn and "HYPERLINK" in drawn
    for path in (tmp_path / "out").glob("*.csv"):
        for row in read_csv(path):
            assert not any(cell[:1] in ("=", "+", "@") or re.match(r"-(?![\d.])", cell) for cell in row.values()), path


ROW = '{"env_step": 5, "eval/return": 1.0}'
GARBLED = {  # config, log: each is left out in one line that names its folder
    "config is binary": ("\0\x01", ROW),
    "config is a list": ("- 1\n- 2", ROW),
    "config has an alias": ("a: &a [1]\nb: *a", ROW),
    "config is nested too deeply": ("[" * 500, ROW),
    "config is large": ("#" * 2**21, ROW),
    "choices is a number": ("seed: 0\nchoices: 3", ROW),
    "seed is a word": ("seed: zero\nchoices: {env: a, updater: b}", ROW),
    "env is a word": ("seed: 0\nenv: word\nchoices: {env: a, updater: b}", ROW),
    "log is no JSON": ("seed: 0\nchoices: {env: a, updater: b}", f"nonsense\n{ROW}"),
    "log holds lists": ("seed: 0\nchoices: {env: a, updater: b}", f"[1, 2]\n{ROW}"),
    "a step is a word": ("seed: 0\nchoices: {env: a, updater: b}", f'{{"env_step": "now"}}\n{ROW}'),
    "a step is huge": ("seed: 0\nchoices: {env: a, updater: b}", f'{{"env_step": 1{"0" * 400}}}\n{ROW}'),
    "a step is no number": ("seed: 0\nchoices: {env: a, updater: b}", f'{{"env_step": NaN}}\n{ROW}'),
    "log is nested too deeply": ("seed: 0\nchoices: {env: a, updater: b}", f"{'[' * 100_000}\n{ROW}"),
}


@pytest.mark.parametrize("case", GARBLED)
def test_a_garbled_run_is_one_line_and_leaves_the_others_standing(case: str, tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    config, log = GARBLED[case]
    (tmp_path / "bad/config.yaml").write_text(config)
    (tmp_path / "bad/metrics.jsonl").write_text(log)
    damaged: list[str] = []
    assert [run.source for run in find_runs([tmp_path], damaged)] == [f"{tmp_path}/good"]
    (line,) = damaged
    assert line.startswith("Left out, damaged: ") and "bad" in line and "\n" not in line and len(line) < 400
    with pytest.raises(ComparisonError):
        find_runs([tmp_path / "bad"])


def test_a_link_or_pipe_in_a_run_is_not_opened(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    for name in ("linked", "piped"):
        write_run(tmp_path / name).joinpath("metrics.jsonl").unlink()
    (tmp_path / "linked/metrics.jsonl").symlink_to(good / "metrics.jsonl")
    os.mkfifo(tmp_path / "piped/metrics.jsonl")
    damaged: list[str] = []
    assert len(find_runs([tmp_path], damaged)) == 1 and len(damaged) == 2
    assert all("expected a plain file" in line for line in damaged)


def test_huge_numbers_and_wrong_types_in_metrics_are_not_scores() -> None:
    rows = [{"env_step": i, "eval/return": v} for i, v in enumerate((1.0, 1e300, 10**400, True, "2", [3], math.inf))]
    np.testing.assert_array_equal(Run("", {}, rows, True).series("eval/return")[1], [1.0])


def fake_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch, *foreign: SimpleNamespace) -> None:
    """Let `wandb.Api` serve foreign runs and those in a folder as the project me/pbrl, their rows in no order."""

    def remote(run: Run) -> SimpleNamespace:
        history = [*reversed(run.rows), {"_step": 7}]
        about = {"url": f"https://wandb.test/{Path(run.source).name}", "state": "finished", "config": run.config}
        return SimpleNamespace(scan_history=lambda: history, summary={"complete": run.complete}, **about)

    projects = {"me/pbrl": [*foreign, *(remote(run) for run in find_runs([folder]))]}
    monkeypatch.setattr("wandb.Api", lambda timeout: SimpleNamespace(runs=projects.__getitem__))


def test_runs_at_wandb_are_a_second_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "there/a", seed=0)
    write_run(tmp_path / "there/b", updater="aparl", seed=1)
    fake_wandb(tmp_path / "there", monkeypatch)
    write_run(tmp_path / "here/a", seed=0)  # the same run as there/a
    notes: list[str] = []
    runs = without_copies(find_runs([tmp_path / "here"]), wandb_runs("me/pbrl"), notes)
    assert [run.source for run in runs] == [f"{tmp_path}/here/a", "https://wandb.test/b"]
    assert notes == [f"Left out, a copy of {tmp_path}/here/a: https://wandb.test/a"]
    stored = find_runs([tmp_path / "there"])[1]
    assert runs[1].rows == stored.rows and runs[1].complete  # one row without env_step is W&B's own


def test_only_a_run_with_the_same_settings_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task of one option, or another value of a setting, is not; where and how it is computed is no matter."""
    env = {"_target_": "envs.metaworld.MetaWorld", "horizon": 300.0}
    write_run(tmp_path / "here/a", "metaworld", env=env | {"task": "push"}, run_dir="here", logger={})
    logged = {"env": env | {"task": "push", "horizon": 300}, "logger": {"_target_": "pbrl.records.loggers.WandB"}}
    write_run(tmp_path / "there/copy", "metaworld", run_dir="there", choices={"logger": "wandb"}, **logged)
    write_run(tmp_path / "there/task", "metaworld", env=env | {"task": "reach"})
    write_run(tmp_path / "there/value", "metaworld", env=env | {"task": "push"}, reward={"members": 2})
    fake_wandb(tmp_path / "there", monkeypatch)
    runs = without_copies(find_runs([tmp_path / "here"]), wandb_runs("me/pbrl"))
    assert [Path(run.source).name for run in runs] == ["a", "task", "value"]


def test_a_foreign_run_in_a_wandb_project_is_left_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a")
    foreign = SimpleNamespace(url="https://wandb.test/other", state="finished", config={"lr": 1}, summary={})
    fake_wandb(tmp_path, monkeypatch, foreign)
    data = compared("--wandb", "me/pbrl")
    assert [run.source for run in data.selection.groups["walker-walk"]["pebble"]] == ["https://wandb.test/a"]
    assert data.notes[0].startswith("Left out: https://wandb.test/other: its config has no seed")
    with pytest.raises(ComparisonError, match="other: its config has no seed"):
        wandb_runs("me/pbrl")


def test_a_run_at_wandb_that_was_interrupted_is_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", complete=False)
    fake_wandb(tmp_path, monkeypatch)
    assert not wandb_runs("me/pbrl")[0].complete


def test_without_a_login_wandb_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"W&B project 'me/pbrl' could not be read .* without --wandb"):
        compare.main(["--wandb", "me/pbrl", "--out", str(tmp_path / "out")])


def test_what_cannot_be_compared_ends_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no run in or below it"):
        compare.main([str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="no runs given"):
        compare.main([])
    write_run(tmp_path / "only", updater="oracle")
    with pytest.raises(SystemExit, match="no finished run that learns from preferences"):
        compare.main([str(tmp_path / "only")])


def test_comparing_leaves_pyplot_alone() -> None:
    """pyplot holds global figures and may ask for a screen."""
    check = "import sys, pbrl.compare; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
