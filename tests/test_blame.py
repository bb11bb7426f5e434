"""experiments.blame: a run goes on paid by the task, and a new agent on the run's last reward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.blame import main, paid_by_the_last_reward, paid_by_the_task
from pbrl.evaluate import load_parts
from pbrl.types import Answer, Query
from tests.conftest import finish, rows, tiny_loop


def first(query: Query) -> Answer:
    """A teacher of one's own."""
    count = len(query)
    return Answer(torch.ones(count), given=torch.ones(count, dtype=torch.bool))


@pytest.mark.slow
def test_the_run_goes_on_paid_by_the_task(tiny_run: Path, tmp_path: Path) -> None:
    before = rows(tiny_run)
    loop = paid_by_the_task(tiny_run, tmp_path / "task", 60)
    start, rollouts, replay = loop.step, loop.parts.rollouts, loop.agent.replay_buffer
    finish(loop)
    assert loop.step == start + 60 == rollouts.total
    np.testing.assert_array_equal(replay.rewards[: start + 60, 0], rollouts.task_rewards[: start + 60])
    written = rows(tmp_path / "task")
    assert written[: len(before)] == before == rows(tiny_run)
    assert [row["env_step"] for row in written[len(before) :] if "eval/return" in row] == [start, start + 60]


@pytest.mark.slow
def test_a_pay_that_moves_stays_behind(tmp_path: Path) -> None:
    """RUNE's bonus is weighed anew at every draw: nothing of it may reach an agent that the task pays."""
    run = tmp_path / "run"
    finish(tiny_loop(run, "reward.disagreement_bonus=0.5", "reward.disagreement_decay=0.01"))
    loop = paid_by_the_task(run, tmp_path / "task", 30)
    replay, task_rewards = loop.agent.replay_buffer, loop.parts.rollouts.task_rewards
    assert replay.deviations is not None
    finish(loop)
    np.testing.assert_array_equal(replay.paid(np.arange(loop.step))[:, 0], task_rewards[: loop.step])
    finish(paid_by_the_last_reward(run, tmp_path / "anew", 30))


def test_a_new_agent_is_paid_by_the_last_reward(tiny_run: Path, tmp_path: Path) -> None:
    _, _, reward = load_parts(tiny_run)
    loop = paid_by_the_last_reward(tiny_run, tmp_path / "anew", 120)
    assert loop.step == 0
    finish(loop)
    replay = loop.agent.replay_buffer
    paid = reward.predict(replay.observations[:120, 0].copy(), replay.actions[:120, 0].copy()).mean(0)
    np.testing.assert_allclose(replay.rewards[:120, 0], paid, atol=1e-6)
    assert not any("feedback/session" in row for row in rows(tmp_path / "anew"))


@pytest.mark.slow
def test_the_command_does_both_and_refuses_in_a_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_run), "--to", str(tmp_path / "both"), "--steps", "50"]) == 0
    assert (tmp_path / "both/task/summary.json").exists() and (tmp_path / "both/anew/summary.json").exists()
    assert (tmp_path / "both/anew/command.txt").read_text().startswith("python -m experiments.blame ")
    finish(tiny_loop(tmp_path / "oracle", "updater=oracle"))
    capsys.readouterr()
    for run, to, reason in (
        (tmp_path / "oracle", tmp_path / "new", "paid by the task all along"),
        (tmp_path / "none", tmp_path / "new", "there is no run"),
        (tiny_run, tmp_path / "both", "expected a new folder"),
    ):
        assert main([str(run), "--to", str(to)]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_parts_of_ones_own_are_named_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, to = tmp_path / "run", tmp_path / "both"
    finish(tiny_loop(run, "teacher._target_=tests.test_blame.first"))
    command = [str(run), "--to", str(to), "--steps", "30"]
    assert main(command) == 2
    assert "--trust tests.test_blame" in capsys.readouterr().err
    assert main([*command, "--trust", "tests.test_blame"]) == 0


@pytest.mark.slow
def test_a_refused_copy_does_not_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, to = tmp_path / "run", tmp_path / "both"
    finish(tiny_loop(run, "feedback.memory_steps=100"))
    assert main([str(run), "--to", str(to)]) == 2
    assert "feedback.memory_steps" in capsys.readouterr().err
    assert not (to / "task").exists()
    assert main([str(run), "--to", str(to)]) == 2
    assert "feedback.memory_steps" in capsys.readouterr().err, "the same again, not that the folder is there"
