"""The task's reward reaches teachers and evaluation, and nothing that the agent or the reward learns from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pbrl.types import Answer, Query, Segments, Teacher
from tests.conftest import finish, rows, tiny_loop


class Poisoner(Teacher):
    """Answers like the teacher it wraps, then makes every task reward that is left lying around NaN."""

    def __init__(self, loop, teacher) -> None:
        self.loop, self.teacher = loop, teacher

    def __call__(self, query: Query) -> Answer:
        answer = self.teacher(query)
        query.task_rewards.fill_(torch.nan)
        rollouts = self.loop.parts.rollouts
        rollouts.task_rewards[: min(rollouts.total, rollouts.capacity)] = float("nan")
        return answer


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(["query=k-center-disagreement"], marks=pytest.mark.slow),
        pytest.param(["agent.hybrid_ratio=0.5"], marks=pytest.mark.slow),
    ],
)
def test_training_does_not_notice_when_the_task_reward_is_poisoned(tmp_path: Path, overrides: list[str]) -> None:
    one_session = ["feedback.budget=5", *overrides]  # a second one would ask the teacher about poisoned rewards
    clean, poisoned = tiny_loop(tmp_path / "a", *one_session), tiny_loop(tmp_path / "b", *one_session)
    poisoned.parts.teacher = Poisoner(poisoned, poisoned.parts.teacher)
    finish(clean)
    finish(poisoned)
    # of the true reward: they must notice
    reports = ("reward/rank_correlation", "reward/recent_accuracy", "reward/true_per_step", "reward/gap")
    strip = [
        {k: v for k, v in row.items() if k not in reports and not k.startswith("teacher/")}
        for row in rows(tmp_path / "a")
    ]
    assert strip == [
        {k: v for k, v in row.items() if k not in reports and not k.startswith("teacher/")}
        for row in rows(tmp_path / "b")
    ]
    for a, b in zip(clean.agent.policy.parameters(), poisoned.agent.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_segments_cannot_hold_a_reward() -> None:
    assert set(Segments.__dataclass_fields__) == {"obs", "actions", "raw_actions", "step"}


def test_the_poison_would_be_noticed_if_it_were_used(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "feedback.budget=5")
    loop.parts.teacher = Poisoner(loop, loop.parts.teacher)
    finish(loop)
    correlation = [row["reward/rank_correlation"] for row in rows(tmp_path / "run") if "feedback/session" in row]
    assert correlation[0] is None  # NaN task rewards: what does read them shows it


@pytest.mark.slow
def test_the_replay_holds_learned_rewards_only(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run")
    finish(loop)
    replay = loop.agent.replay_buffer
    size = replay.size()
    learned = loop.parts.reward.predict(replay.observations[:size, 0].copy(), replay.actions[:size, 0].copy()).mean(
        axis=0
    )
    last_session = loop.due.feedback  # after the budget is spent nothing relabels; new steps are paid on arrival
    assert last_session > loop.total_steps
    torch.testing.assert_close(torch.from_numpy(replay.rewards[:size, 0]), torch.from_numpy(learned), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_changed_task_rewards_change_the_oracle(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "updater=oracle")
    finish(loop)
    replay, rollouts = loop.agent.replay_buffer, loop.parts.rollouts
    assert (replay.rewards[: replay.size(), 0] == rollouts.task_rewards[: rollouts.total]).all()


def test_a_query_cut_to_some_pairs_keeps_their_rewards() -> None:
    segments = Segments(torch.arange(6.0).reshape(3, 2, 1), torch.zeros(3, 2, 1))
    query = Query(segments, segments, torch.arange(12.0).reshape(3, 2, 2))
    chosen = query[[2, 0]]
    assert torch.equal(chosen.task_rewards, query.task_rewards[[2, 0]])
    assert torch.equal(chosen.first.obs, segments.obs[[2, 0]])
    assert replace(query, mean_task_reward=1.0)[1:].mean_task_reward == 1.0
