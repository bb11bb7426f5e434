"""The replay: packed rows behind Stable-Baselines3's interface, draws, relabelling, memory."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.spaces import Box

from pbrl.agent.replay import RelabelReplay

OBS, ACT = Box(-1, 1, (3,), np.float32), Box(-1, 1, (2,), np.float32)


def replay(size: int = 50, steps: int = 0, **options: float) -> RelabelReplay:
    """A buffer after `steps` transitions: step t has observation (t, t, t), action (t, −t), reward t, next t + 1."""
    made = RelabelReplay(size, OBS, ACT, device="cpu", **options)  # type: ignore[arg-type]
    for t in range(steps):
        obs, done = np.full((1, 3), t, np.float32), np.array([t % 10 == 9])
        infos = [{"TimeLimit.truncated": t % 20 == 9}]  # every second end is only a time limit
        made.add(obs, obs + 1, np.array([[t, -t]], np.float32), np.array([t], np.float32), done, infos)
    return made


def test_a_batch_holds_whole_transitions() -> None:
    batch = replay(steps=40).draw(500, np.random.default_rng(0))
    t = batch.obs[:, 0]
    assert set(t.tolist()) == set(range(40))
    assert (batch.obs == t[:, None]).all() and (batch.next_obs == t[:, None] + 1).all()
    assert (batch.actions[:, 0] == t).all() and (batch.actions[:, 1] == -t).all() and (batch.rewards == t).all()
    assert ((batch.not_done == 0) == (t % 20 == 19)).all()  # time limits are not ends


def test_draws_depend_on_the_given_generator_alone() -> None:
    buffer = replay(steps=40)
    first, again, other = (buffer.draw(20, np.random.default_rng(seed)).rewards for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_a_share_of_the_batch_is_recent_also_after_the_buffer_is_full() -> None:
    buffer = replay(size=50, steps=70, hybrid_ratio=0.5, hybrid_steps=5)
    rewards = buffer.draw(400, np.random.default_rng(0)).rewards
    assert set(rewards[:200].tolist()) == set(range(65, 70))
    assert set(rewards[200:].tolist()) == set(range(20, 70))
    buffer.hybrid = False
    assert len(set(buffer.draw(400, np.random.default_rng(0)).rewards[:200].tolist())) > 40


def test_relabelling_pays_all_stored_transitions_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbrl.agent.replay.BLOCK", 7)
    buffer = replay(steps=40)
    before = buffer.rows.copy()
    buffer.relabel(lambda obs, actions: obs[:, 0] - 2 * actions[:, 1])
    np.testing.assert_array_equal(buffer.rewards[:40, 0], 3 * np.arange(40))
    assert (buffer.rewards[40:] == 0).all()
    buffer.rewards[:] = before[:, buffer._reward]
    np.testing.assert_array_equal(buffer.rows, before)


def test_a_million_metaworld_transitions_take_less_than_700_mb() -> None:
    wide = Box(-1, 1, (39,), np.float32), Box(-1, 1, (4,), np.float32)
    buffer = RelabelReplay(1_000_000, *wide, device="cpu")
    assert buffer.rows.nbytes < 700e6
    assert all(f.base is buffer.rows for f in (buffer.observations, buffer.next_observations, buffer.rewards))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="n_envs=2"):
        RelabelReplay(10, OBS, ACT, device="cpu", n_envs=2)
    with pytest.raises(ValueError, match="float32 vectors"):
        RelabelReplay(10, Box(0, 255, (3,), np.uint8), ACT, device="cpu")
