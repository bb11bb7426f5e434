"""Run folders go in; a report whose every number is a row of a CSV comes out."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from pbrl import compare
from pbrl.comparing import plots
from pbrl.comparing.curves import gather
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
            rows.append({"env_step": step + 1, "time/wall": step / 50 + 1} | labels | health)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"complete": complete, "env_step": int(steps[-1])}))
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """27 runs: three methods and the oracle on two tasks."""
    for task in ("walker-walk", "door-open"):
        for updater in ("pebble", "surf", "aparl", "oracle"):
            for seed in range(2 if updater == "oracle" else 4):
                write_run(tmp_path / "runs" / f"{task}-{updater}-{seed}", task, updater, seed)
    return tmp_path / "runs"


def test_report_of_28_runs_is_complete_and_needs_no_network(sweep: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", time.monotonic()
    compare.main([str(sweep), "--out", str(out)])
    assert time.monotonic() - before < 30
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {Path(picture).stem for picture in pictures} == {
        *("curves_steps", "curves_labels", "aggregate", "improvement", "samples", "profiles", "health")
    }
    assert all((out / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert not re.search(r"https?://|<script|<link|url\(", page)
    origins = re.findall(r"(\w+\.csv)", text)
    assert {path.name for path in out.glob("*.csv")} == set(origins) - {"experiments"}


def test_every_score_can_be_traced_to_the_runs_it_comes_from(sweep: Path, tmp_path: Path) -> None:
    """From the report's cell to scores.csv, to the runs named there, to their evaluations, to their folders."""
    out = tmp_path / "out"
    compare.main([str(sweep), "--out", str(out)])
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
    assert float(row["final"]) == pytest.approx(np.mean(sorted(finals)[1:3]), rel=1e-4)  # interquartile: two of four
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


def test_figures_draw_the_rows_of_the_tables(sweep: Path, tmp_path: Path) -> None:
    data = gather(select(find_runs([sweep])), tmp_path)
    rows = all_tables(data)["curves_steps"]
    figure = plots.curves_figure(rows, "steps", data.metrics, data.methods)
    assert [panel.get_title() for panel in figure.axes] == ["door-open", "walker-walk"]
    drawn = {line.get_color(): line for line in figure.axes[0].lines}
    chosen = [row for row in rows if (row["task"], row["method"]) == ("door-open", "pebble")]
    np.testing.assert_array_equal(drawn["#0072B2"].get_xdata(), [row["steps"] for row in chosen])
    np.testing.assert_array_equal(drawn["#0072B2"].get_ydata(), [row["iqm"] for row in chosen])
    assert len(drawn) == 4  # three methods and the oracle, each in its own colour


def test_methods_differ_in_colour_and_marker_and_the_oracle_is_apart() -> None:
    styles = plots.looks([f"m{i}" for i in range(14)])
    assert len({(look.color, look.line, look.marker) for look in styles.values()}) == 15
    assert {look.color for name, look in styles.items() if name != "oracle"} == set(plots.OKABE_ITO)


def fake_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `wandb.Api` serve the runs in a folder as the project me/pbrl, their rows in no order."""

    def remote(run: Run) -> SimpleNamespace:
        history = [*reversed(run.rows), {"_step": 7}]
        about = {"url": f"https://wandb.test/{Path(run.source).name}", "state": "finished", "config": run.config}
        return SimpleNamespace(scan_history=lambda: history, **about)

    projects = {"me/pbrl": [remote(run) for run in find_runs([folder])]}
    monkeypatch.setattr("wandb.Api", lambda timeout: SimpleNamespace(runs=projects.__getitem__))


def test_runs_at_wandb_are_a_second_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "there/a", seed=0)
    write_run(tmp_path / "there/b", updater="aparl", seed=1)
    fake_wandb(tmp_path / "there", monkeypatch)
    write_run(tmp_path / "here/a", seed=0)  # the same run as there/a
    runs = without_copies(find_runs([tmp_path / "here"]), wandb_runs("me/pbrl"))
    assert [run.source for run in runs] == [f"{tmp_path}/here/a", "https://wandb.test/b"]
    stored = find_runs([tmp_path / "there"])[1]
    assert runs[1].rows == stored.rows and runs[1].complete  # one row without env_step is W&B's own


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
