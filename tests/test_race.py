"""experiments.race: who goes on, what is kept, and that a race goes on where it stopped."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from experiments.race import Race, RaceError, Run, Rung, main, read, share
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent


def race(folder: Path, rungs: list[Rung]) -> Race:
    signals = {"true": ["updater=oracle"], "labels": ["updater=pebble"]}
    return Race(folder, signals, {"a": [], "b": ["x=1"], "c": [], "d": []}, ["env=e"], [7, 8, 9], rungs)


class Pretending:
    """Writes the returns that runs of a known worth would have, and remembers what it was asked for."""

    worth: ClassVar = {"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0}

    def __init__(self, of: Race) -> None:
        self.race, self.asked = of, list[tuple[Run, int]]()

    def __call__(self, runs: list[Run], steps: int) -> dict[Run, str]:
        for run in runs:
            self.asked.append((run, steps))
            folder = self.race.run_dir(run)
            folder.mkdir(parents=True, exist_ok=True)
            Path(f"{folder}.log").touch()  # as a real run's
            scale = 100 if run.signal == "true" else 1  # a signal with large returns counts no more than the other
            worth = self.worth[run.candidate] if run.signal == "true" else 5 - self.worth[run.candidate] / 2
            rows = [{"env_step": at, "eval/return": scale * worth} for at in range(0, steps + 1, 10)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {}


def test_the_better_half_goes_on_with_more_seeds(tmp_path: Path) -> None:
    one = race(tmp_path, [Rung(20, 1), Rung(40, 2), Rung(60, 3)])
    work = Pretending(one)
    decided = one.race(work)
    # true: 1, 4, 3, 2 of 4; labels: 4.5, 3, 3.5, 4 of 4.5 → scores a 0.625, b 0.833, c 0.764, d 0.694
    assert list(decided[0]["scores"]) == ["b", "c", "d", "a"]
    assert decided[0]["scores"]["c"]["score"] == pytest.approx((3 / 4 + 3.5 / 4.5) / 2)
    assert [step["go_on"] for step in decided] == [["b", "c"], ["b"], ["b"]]
    counts = [sum(steps == rung.steps for _, steps in work.asked) for rung in one.rungs]
    assert counts == [4 * 2 * 1, 2 * 2 * 2, 1 * 2 * 3]
    assert json.loads((tmp_path / "race.json").read_text())["rungs"] == decided
    rows = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert {row["candidate"] for row in rows} == {"a", "b", "c", "d"}
    assert {row["seed"] for row in rows if row["candidate"] == "b"} == {"7", "8", "9"}


def test_the_worst_does_not_win_where_returns_are_negative() -> None:
    assert [share(found, -100.0) for found in (-100.0, -200.0, -400.0)] == [1, 0.5, 0.25]
    assert [share(found, 0.0) for found in (0.0, -200.0)] == [1, 0]
    assert [share(found, 4.0) for found in (4.0, 1.0, -1.0)] == [1, 0.25, -0.25]


def test_a_race_asks_for_nothing_that_is_done(tmp_path: Path) -> None:
    rungs = [Rung(20, 1), Rung(40, 2)]
    first = Pretending(race(tmp_path, rungs))
    decided = first.race.race(first)
    again = Pretending(race(tmp_path, rungs))
    assert again.race.race(again) == decided
    assert again.asked == []
    (again.race.run_dir(Run("true", "c", 7)) / "metrics.jsonl").unlink()
    third = Pretending(race(tmp_path, rungs))
    third.race.race(third)
    assert third.asked == [(Run("true", "c", 7), 20), (Run("true", "c", 7), 40)]


def test_a_candidate_that_fails_is_dropped(tmp_path: Path) -> None:
    one = race(tmp_path, [Rung(20, 1)])
    work = Pretending(one)
    decided = one.race(lambda runs, steps: work(runs, steps) | {Run("true", "b", 7): "exit code 1"})
    assert decided[-1]["go_on"] == ["c"]
    assert json.loads((tmp_path / "race.json").read_text())["failed"] == {"b": "exit code 1"}


def test_commands_start_and_go_on(tmp_path: Path) -> None:
    one, run = race(tmp_path, [Rung(20, 1)]), Run("labels", "b", 8)
    folder = tmp_path / "runs" / "labels" / "b-s8"
    own = ["seed=8", f"run_dir={folder}", "total_steps=20"]
    assert one.command(run, 20)[3:] == ["env=e", "updater=pebble", "x=1", *own]
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert one.command(run, 20)[3:] == [f"resume={folder}", "total_steps=20"]


@pytest.mark.slow
def test_the_shipped_candidates_compose() -> None:
    from tests.conftest import config

    signals, candidates, common = read(ROOT / "experiments/races/agent.yaml")
    for own in (*signals.values(), *candidates.values()):
        config("env=walker-walk", *common, *own)


@pytest.mark.slow
def test_the_shipped_candidates_are_the_same_agents_on_every_task() -> None:
    """Whatever the task's default agent: `lean` has no switch, and each other one just those that it names."""
    from tests.conftest import config

    _, candidates, common = read(ROOT / "experiments/races/agent.yaml")
    for name, own in candidates.items():
        agent, other = (config(f"env={env}", *common, *own)[0].agent for env in ("walker-walk", "door-open"))
        assert agent == other, name
        for switch in ("normalise", "critic_layer_norm", "actor_layer_norm"):
            assert agent[switch] == (f"agent.{switch}=true" in own), (name, switch)


@pytest.mark.parametrize(
    ("content", "arguments", "reason"),
    [
        ("signals: {t: []}", [], "expected signals and candidates"),
        ("signals: {t: []}\ncandidates: {a: x=1}", [], "a list of overrides"),
        ("signals: {true: []}\ncandidates: {a: []}", [], "True is no name"),
        ("runs: 3", [], "expected the keys"),
        ("signals: {t: []}\ncandidates: {a: []}", ["--signals", "u"], "--signals u: .* has t"),
        ("signals: {t: []}\ncandidates: {a: []}", ["--rungs", "20:9", "--", "agent.tau=0.1"], "asks for 9 seeds"),
        ("signals: {t: []}\ncandidates: {a: []}", ["--rungs", "20:1", "10:1"], "steps must grow"),
    ],
)
def test_races_that_cannot_be_are_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, arguments: list[str], reason: str
) -> None:
    (tmp_path / "race.yaml").write_text(content)
    assert main([str(tmp_path / "race.yaml"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert not (tmp_path / "out").exists()
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(reason, line)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RaceError, match="No such file"):
        read(tmp_path / "none.yaml")


@pytest.mark.slow
def test_a_real_race_on_the_point_mass(tmp_path: Path) -> None:
    tiny = [option for option in TINY if not option.startswith(("env=", "updater=", "total_steps="))]
    lines = ["signals: {true-reward: [updater=oracle]}", "candidates: {good: [], bad: [agent.learning_rate=1e-9]}"]
    (tmp_path / "race.yaml").write_text("\n".join(lines))
    command = [sys.executable, "-m", "experiments.race", str(tmp_path / "race.yaml"), "--out", str(tmp_path / "out")]
    command += ["--env", "pointmass", "--rungs", "250:1", "500:1", "--processes", "2", "--", *tiny]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "winner: " in done.stdout
    decided = json.loads((tmp_path / "out" / "race.json").read_text())["rungs"]
    assert len(decided[0]["scores"]) == 2 and len(decided[1]["scores"]) == 1
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "exit code" not in again.stdout and "winner: " in again.stdout
