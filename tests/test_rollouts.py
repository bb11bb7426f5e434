"""The ring of recent steps: legal starts, the last step, interrupted episodes, wrapping."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pbrl.rollouts import Rollouts


def filled(lengths: list[int], capacity: int = 100) -> Rollouts:
    """Episodes of these lengths; observation = [episode, step in it], task reward = step in it."""
    rollouts = Rollouts(capacity, 2, 1, 1)
    for e, length in enumerate(lengths):
        for t in range(length):
            obs, action = np.array([e, t], np.float32), np.array([0.5], np.float32)
            rollouts.add(obs, action, action, float(t), np.array([10.0 * e + t]), done=t == length - 1)
    return rollouts


def test_every_legal_start_and_no_other() -> None:
    rollouts = filled([4, 2, 5])
    assert rollouts.starts(3).tolist() == [0, 1, 6, 7, 8]  # the last step of each episode can be shown
    assert rollouts.starts(5).tolist() == [6]
    assert rollouts.starts(6).tolist() == []
    assert rollouts.starts(3, since=7).tolist() == [7, 8]


def test_segments_never_cross_episodes_and_pairs_carry_their_own_rewards_and_states() -> None:
    query = filled([30, 7, 40]).query(200, 5, np.random.default_rng(0))
    for side, segments in enumerate((query.first, query.second)):
        assert (segments.obs[:, :, 0] == segments.obs[:, :1, 0]).all()
        assert (segments.obs[:, 1:, 1] == segments.obs[:, :-1, 1] + 1).all()
        torch.testing.assert_close(query.task_rewards[:, side], segments.obs[:, :, 1])
        assert query.states is not None
        torch.testing.assert_close(
            query.states[:, side, 0], (10 * segments.obs[:, 0, 0] + segments.obs[:, 0, 1]).double()
        )
    starts = set(query.first.obs[:, 0, 1].int().tolist()) | set(query.second.obs[:, 0, 1].int().tolist())
    assert 35 in starts, "the last legal start of the longest episode must be drawn sometime"


def test_the_margin_surrounds_the_segment() -> None:
    query = filled([20]).query(50, 4, np.random.default_rng(0), margin=3)
    assert query.context is not None
    for segments, wide in ((query.first, query.context[0]), (query.second, query.context[1])):
        assert wide.length == 10
        assert torch.equal(wide.obs[:, 3:7], segments.obs)


def test_what_the_ring_has_overwritten_is_not_drawn() -> None:
    rollouts = filled([60, 60, 60], capacity=100)
    assert rollouts.starts(10)[0] == 80
    query = rollouts.query(500, 10, np.random.default_rng(0))
    oldest = 60 * query.first.obs[:, 0, 0] + query.first.obs[:, 0, 1]
    assert oldest.min() >= 80


def test_too_short_a_history_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="no stored episode has 10 steps"):
        filled([5, 5]).query(1, 10, np.random.default_rng(0))


def test_recent_episodes_include_the_running_one() -> None:
    rollouts = filled([10, 10, 10])
    assert rollouts.since_episodes(2, length=10) == 20  # a new episode is about to begin
    assert rollouts.since_episodes(99, length=10) == 0


def test_recent_episodes_are_more_where_none_is_long_enough_for_a_clip() -> None:
    rollouts = filled([10, 10, 3])
    assert rollouts.since_episodes(1, length=4) == 10
    assert rollouts.since_episodes(2, length=3) == 20
    assert filled([3]).since_episodes(1, length=10) == 3, "none has ten: the draw says so"


def take(rollouts: Rollouts, steps: int, ends: bool, counted: bool = True) -> None:
    for t in range(steps):
        zero = np.zeros(1, np.float32)
        rollouts.add(np.zeros(2), zero, zero, 0.0, np.zeros(1), done=ends and t == steps - 1, counted=counted)


def test_recent_episodes_are_the_policys_own_and_stay_so_when_resumed() -> None:
    rollouts = filled([150] * 40, capacity=10_000)
    take(rollouts, 50, ends=False)  # the running episode is interrupted
    for _ in range(20):
        with rollouts.aside():
            take(rollouts, 25, ends=False, counted=False)
    take(rollouts, 100, ends=True)
    for _ in range(6):
        take(rollouts, 150, ends=True)
    assert rollouts.since_episodes(20, 25) == 28 * 150, "seven since, twelve before, and one that is about to begin"
    assert rollouts.since_episodes(8, 25) == 40 * 150, "the rest of an interrupted episode is none of its own"
    resumed = Rollouts(10_000, 2, 1, 1)
    for mine, stored in zip(resumed.columns, rollouts.columns, strict=True):
        mine[:] = stored
    resumed.load_state(json.loads(json.dumps(rollouts.state())))
    assert resumed.since_episodes(20, 25) == 28 * 150
    older = {key: value for key, value in rollouts.state().items() if key != "asides"}  # of before they were kept
    resumed.load_state(older)
    assert resumed.since_episodes(20, 25) > 28 * 150


def test_after_another_policys_episodes_the_own_next_one_is_recent() -> None:
    rollouts = filled([10, 10])
    with rollouts.aside():
        take(rollouts, 10, ends=True)
        take(rollouts, 5, ends=False)
    take(rollouts, 5, ends=True)
    assert rollouts.since_episodes(2, 5) == 35
    assert rollouts.since_episodes(3, 5) == 20, "where the own running one was to begin"
    assert rollouts.since_episodes(4, 5) == 10
    for _ in range(10):
        take(rollouts, 10, ends=True)
    with rollouts.aside():
        pass
    assert len(rollouts.asides) == 2, "those of overwritten steps are forgotten"


def test_another_policys_steps_are_kept_and_not_the_policys_own() -> None:
    rollouts = filled([10, 10])
    take(rollouts, 4, ends=False)
    with rollouts.aside(another=True):
        take(rollouts, 6, ends=True)  # the episode that the policy began
        take(rollouts, 5, ends=False)
    take(rollouts, 5, ends=True)
    assert [length for _, length in rollouts.finished] == [10, 10], "none of both"
    with rollouts.aside():  # a branch
        take(rollouts, 3, ends=False, counted=False)
    resumed = Rollouts(100, 2, 1, 1)
    resumed.episode[:] = rollouts.episode
    resumed.load_state(json.loads(json.dumps(rollouts.state())))
    for one in (rollouts, resumed):
        assert one.starts(4, since=15, own=True).tolist() == [15, 16, 20, 35, 36]
        assert (one.since_steps(3), one.since_steps(8), one.since_steps(9)) == (40, 35, 23)
        assert len(one.steps(20, 100, own=True)[0]) == len(one.steps(20, 100)[0]) - 11
        assert one.query(50, 4, np.random.default_rng(0), since=20, own=True).first.step.unique().tolist() == [
            20,
            35,
            36,
        ]
    take(rollouts, 10, ends=True)
    assert [length for _, length in rollouts.finished] == [10, 10, 10]


def test_of_a_pair_only_one_side_or_both_begin_lately() -> None:
    rollouts = filled([10] * 10)
    both = rollouts.query(500, 5, np.random.default_rng(0), since=80)
    assert min(both.first.step.min(), both.second.step.min()) == 80
    one = rollouts.query(500, 5, np.random.default_rng(0), since=80, other_since=20)
    starts = torch.stack([one.first.step, one.second.step])
    assert starts.min() == 20
    assert (starts.amax(0) >= 80).all()
    lately = (starts >= 80).float().mean(1)  # of the other side two in eight are late by chance
    assert ((lately > 0.5) & (lately < 0.75)).all(), "the late one is the first as often as the second"


def test_mean_task_reward_is_per_step_and_without_a_spurious_zero() -> None:
    rollouts = Rollouts(10, 2, 1)
    assert np.isnan(rollouts.mean_task_reward)
    assert filled([4, 2]).mean_task_reward == pytest.approx((0 + 1 + 2 + 3 + 0 + 1) / 6)


def test_a_branch_neither_counts_as_an_episode_nor_joins_one() -> None:
    rollouts = filled([3])
    obs, action = np.zeros(2, np.float32), np.zeros(1, np.float32)
    for counted in (True, True, False, False, True):
        rollouts.add(obs, action, action, 1.0, np.zeros(1), done=False, counted=counted)
        if rollouts.total in (5, 7):
            rollouts.interrupt()
    assert len(rollouts.finished) == 1
    assert rollouts.running_length == 3
    assert rollouts.starts(2, since=3).tolist() == [3, 5]
    parts = rollouts.episodes_between(3, rollouts.total)
    assert [part.length for part in parts] == [2, 2, 1]
