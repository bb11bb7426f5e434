"""RUNE: the members' disagreement is paid at every update by the weight of that step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pbrl.agent.replay import Batch
from pbrl.launch.build import build
from pbrl.loop import Loop, Stopped
from pbrl.records.checkpoint import load_latest
from tests.conftest import TINY, config, finish, rows, stopped_and_resumed, tiny_loop

RUNE = ("reward.disagreement_bonus=0.5", "reward.disagreement_decay=0.01")


def record_batches(loop: Loop, since: int) -> list[tuple[int, Batch]]:
    """What the agent learns from after environment step `since`: (step, batch) of each update, as the run goes on."""
    seen: list[tuple[int, Batch]] = []
    agent, update = loop.agent, loop.agent.update

    def recorded(batch: Batch) -> None:
        if agent.num_timesteps > since:
            seen.append((agent.num_timesteps, batch))
        update(batch)

    agent.update = recorded  # type: ignore[method-assign]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sign"), [(RUNE, 1), (("reward.pessimism=0.5", "reward.pessimism_decay=0.01"), -1)]
)
def test_every_update_pays_by_the_weight_of_its_step(tmp_path: Path, options: tuple[str, ...], sign: int) -> None:
    loop = tiny_loop(tmp_path / "run", *options, "total_steps=240")  # the session is at step 200
    seen = record_batches(loop, since=200)
    loop.run()
    assert [step for step, _ in seen] == list(range(201, 241))
    for step, batch in seen:
        members = loop.parts.reward.predict(batch.obs.numpy(), batch.actions.numpy())
        assert members.std(0).max() > 1e-3
        expected = members.mean(0) + sign * 0.5 * 0.99**step * members.std(0)
        np.testing.assert_allclose(batch.rewards.numpy(), expected, rtol=1e-5, atol=2e-6)
    loop.close(True)


def test_returns_over_several_steps_are_paid_so_too(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", *RUNE, "total_steps=210")
    loop.run()
    replay = loop.agent.replay_buffer
    replay.weight = 3.0
    rewards, deviations = replay.rewards[:210, 0], replay.deviations[:210, 0]  # type: ignore[index]
    assert deviations.max() > 1e-3
    paid = rewards + 3 * deviations
    np.testing.assert_array_equal(replay.paid(np.arange(210))[:, 0], paid)
    index = np.array([3, 4, 100])
    packed = replay._take(index)
    replay._reach(index, packed, 2)
    expected = paid[index] + np.float32(replay.gamma) * paid[index + 1]
    np.testing.assert_allclose(packed[:, replay._reward][:, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(replay._get_samples(index).rewards[:, 0].numpy(), paid[index])
    loop.close(True)


@pytest.mark.slow
def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    finish(stopped_and_resumed(tmp_path, 250, *RUNE, "total_steps=420"))
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    states = [load_latest(tmp_path / name).state["agent"]["policy"] for name in ("whole", "halves")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_a_checkpoint_from_before_deviations_were_kept_is_paid_anew(tmp_path: Path, monkeypatch: Any) -> None:
    from pbrl.records import run_state

    loop = tiny_loop(tmp_path / "run", *RUNE, "total_steps=420")
    loop.stop = lambda: loop.step >= 250
    save = run_state.save_checkpoint

    def without(folder: Path, step: int, run: Any, state: Any, arrays: Any, logs: Any) -> Path:
        return save(folder, step, run, state, {k: v for k, v in arrays.items() if k != "replay_deviations"}, logs)

    monkeypatch.setattr(run_state, "save_checkpoint", without)
    with pytest.raises(Stopped):
        loop.run()
    kept = loop.agent.replay_buffer.deviations[:250].copy()  # type: ignore[index]
    loop.close(False)
    cfg, choices = config(*TINY, f"resume={tmp_path / 'run'}")
    again = build(cfg, choices, [])
    np.testing.assert_allclose(again.agent.replay_buffer.deviations[:250], kept, rtol=1e-5, atol=1e-6)  # type: ignore[index]
    again.close(False)
