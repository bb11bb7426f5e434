"""What a run will ask is planned before it starts; total_steps is kept; a callback's stop and a later end are ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes

from pbrl.launch.build import build
from pbrl.launch.command import composed, prepare
from pbrl.launch.configuration import ConfigError
from pbrl.launch.one_run import print_summary, run
from pbrl.launch.stored import lock
from pbrl.loop import Loop
from tests.conftest import TINY, config, finish, rows, tiny_loop

DENSE = ("updater=aparl", "updater.implicit.estimator=off", "feedback.budget=200", "feedback.per_session=5")


def asked(run_dir: Path) -> list[tuple[int, int]]:
    """Step and pairs of each session that was held."""
    found, before = [], 0
    for row in rows(run_dir):
        if "feedback/session" in row:
            found.append((row["env_step"], row["feedback/asked"] - before))
            before = row["feedback/asked"]
    return found


def test_a_run_that_would_ask_nothing_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_loop(tmp_path / "run", "total_steps=200")
    assert "total_steps=200: no question would be asked" in str(caught.value)
    assert "due at step 200" in str(caught.value)
    tiny_loop(tmp_path / "oracle", "total_steps=200", "updater=oracle").release()  # it asks nobody


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("updater=pebble",), marks=pytest.mark.slow, id="buffer"),
        pytest.param(DENSE, id="fresh"),
        pytest.param((*DENSE, "query.branch_share=0.5"), marks=pytest.mark.slow, id="branches"),
        pytest.param(("feedback.schedule=decay", "feedback.budget=40"), marks=pytest.mark.slow, id="decay"),
    ],
)
def test_a_run_asks_what_was_planned_and_keeps_total_steps(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    loop = tiny_loop(tmp_path / "run", *overrides)
    plan = loop.questions.plan(loop.due.feedback)
    summary = finish(loop)
    held = asked(tmp_path / "run")
    assert [count for _, count in held] == [count for _, count in plan]
    assert all(step >= due for (step, _), (due, _) in zip(held, plan, strict=True))
    assert summary["env_step"] == 600


def test_the_plan_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_loop(tmp_path / "a").release()
    assert "questions: 15 in 3 session(s), steps 200 to 400" in capsys.readouterr().out
    tiny_loop(tmp_path / "b", *DENSE).release()
    assert re.search(
        r"questions: \d+ of feedback.budget=200 in .* total_steps=600 leaves no room for more; raise it, or lower",
        capsys.readouterr().out,
    )
    tiny_loop(tmp_path / "c", *DENSE, "feedback.schedule=decay").release()
    assert "raise it or feedback.decay_to, or lower" in capsys.readouterr().out


@pytest.mark.parametrize(("updater", "inside"), [("aparl", 0.3), ("penalty", 0.55)])
def test_on_meta_world_the_agent_acts_between_the_sessions_of_a_bilevel_method(
    tmp_path: Path, updater: str, inside: float
) -> None:
    """Sessions are 1000 steps apart there: with 1250 and 2250 inside each, 56 and 90 % were, and answers were lost."""
    cfg, choices = config("env=door-open", f"updater={updater}", f"run_dir={tmp_path}/run", "agent.buffer_size=80000")
    loop = build(cfg, choices, [])
    plan = loop.questions.plan(loop.due.feedback)
    taken = [loop.questions.steps(count, first=not index) for index, (_, count) in enumerate(plan)]
    loop.release()
    assert sum(count for _, count in plan) > 0.98 * cfg.feedback.budget
    assert sum(taken) < inside * cfg.total_steps


def test_a_stop_by_a_callback_is_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = tiny_loop(tmp_path / "run")
    loop.callback = StopTrainingOnMaxEpisodes(max_episodes=5)
    summary = finish(loop)
    assert summary["complete"]
    assert summary["env_step"] == summary["eval_step"] == 250  # five episodes of 50 steps
    assert loop.parts.rollouts.total == loop.agent.replay_buffer.size() == 250, "a step was lost"
    print_summary(summary, tmp_path / "run")
    assert "stopped by a callback at step 250" in capsys.readouterr().out
    assert any((tmp_path / "run/checkpoints").glob("step_*250"))


class Never(BaseCallback):
    def _on_step(self) -> bool:
        return True


@pytest.mark.slow
def test_a_callback_that_goes_on_changes_nothing(tmp_path: Path) -> None:
    finish(tiny_loop(tmp_path / "a"))
    loop = tiny_loop(tmp_path / "b")
    loop.callback = Never()
    finish(loop)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def resumed(run_dir: Path, *changes: str):
    cfg, choices = config(*TINY, f"resume={run_dir}", *changes)
    return build(cfg, choices, [f"resume={run_dir}", *changes])


@pytest.mark.slow
def test_a_run_made_longer_is_evaluated_at_its_new_end(tmp_path: Path) -> None:
    finish(tiny_loop(tmp_path / "run"))
    summary = finish(resumed(tmp_path / "run", "total_steps=610"))
    assert summary["env_step"] == summary["eval_step"] == 610
    assert json.loads((tmp_path / "run/summary.json").read_text())["eval_step"] == 610
    again = finish(resumed(tmp_path / "run"))
    assert [row["env_step"] for row in rows(tmp_path / "run") if "eval/return" in row][-2:] == [600, 610]
    assert again["eval_step"] == 610


@pytest.mark.slow
def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    finish(tiny_loop(tmp_path / "run"))
    with pytest.raises(ConfigError, match="total_steps=500: this run has done 600; give at least that many"):
        resumed(tmp_path / "run", "total_steps=500")
    assert "total_steps: 600" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.slow
def test_a_judge_who_has_moved_is_found_again(tmp_path: Path) -> None:
    run_dir, old, new = tmp_path / "run", "http://127.0.0.1:9/label", "http://127.0.0.1:10/label?a=b"
    tiny_loop(run_dir, "teacher=http", f"teacher.url={old}").release()

    def again(*typed: str) -> Loop:
        overrides = prepare([f"resume={run_dir}", *typed])
        return build(composed(overrides), {"env": "pointmass"}, overrides)

    for changes, trusted in ([f"teacher.url='{new}'", "teacher.timeout=5"], old), ([], new):
        loop = again(f"trust=['{trusted}']", *changes)
        loop.release()
        assert (loop.parts.teacher.url, loop.parts.teacher.timeout) == (new, 5)
    with pytest.raises(ConfigError, match=r"teacher.frames=2 \(these can: .*teacher.url, .*Start a new run"):
        again(f"trust=['{new}']", "teacher.frames=2")
    with pytest.raises(ConfigError, match=r"key teacher.port does not exist"):
        again(f"trust=['{new}']", "teacher.port=1")


@pytest.mark.slow
def test_the_bar_moves_while_fresh_steps_are_taken(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "updater=aparl", "updater.implicit.estimator=off", "feedback.fresh_steps=150")
    seen: list[int] = []
    advance = loop.diary.advance
    loop.session.watch = lambda: (seen.append(loop.step), advance())[1]
    finish(loop)
    assert seen == [400, 450, 550, 600]  # the second session was due at 300, the third when it had ended


@pytest.mark.slow
def test_a_session_is_a_line_of_a_terminal_and_says_what_is_hard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tiny_loop(tmp_path / "run", "query=disagreement", "teacher=mistake")
    summary = finish(loop)
    lines = [line for line in capsys.readouterr().out.splitlines() if "session " in line]
    assert len(lines) == 3
    for line in lines:
        assert len(line) <= 100
        assert "right on random pairs" in line
        assert "on asked ones" in line
    assert 0 <= summary["reward/recent_accuracy"] <= 1


@pytest.mark.slow
def test_a_saturated_member_that_starts_anew_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = tiny_loop(tmp_path / "run", "updater=pebble", "teacher=oracle")
    with torch.no_grad():
        loop.diary.parts.reward.members[0][-2].bias.fill_(9.0)
    finish(loop)
    lines = [line for line in capsys.readouterr().out.splitlines() if "session " in line]
    assert ["saturated members that start anew: 1" in line for line in lines] == [True, False, False]


def test_of_two_starts_in_one_folder_the_second_writes_nothing(tmp_path: Path) -> None:
    overrides = [*TINY, f"run_dir={tmp_path / 'run'}"]
    cfg, choices = config(*overrides)
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"), pytest.raises(ConfigError, match="another process is at work"):
        run(cfg, choices, overrides)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    build(cfg, choices, overrides).release()
    with pytest.raises(ConfigError, match=r"run_dir=.* already holds a run; continue it with resume="):
        build(cfg, choices, overrides)


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pbrl.launch.build.time.strftime", lambda form: "now")
    for name in ("pebble-s0-now", "pebble-s0-now-2", "pebble-s0-now-3"):
        loop = build(*config(*TINY), [])
        loop.release()
        assert loop.run_dir == Path("runs/pointmass") / name and (loop.run_dir / "config.yaml").exists()
