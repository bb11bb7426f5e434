"""RUNE: the members' disagreement is paid, stored and relabelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conftest import tiny_loop


def test_runes_bonus_is_stored_and_relabelled(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "reward.disagreement_bonus=0.5", "total_steps=210")
    loop.run()
    replay = loop.agent.replay_buffer
    obs, actions = replay.observations[:150, 0].copy(), replay.actions[:150, 0].copy()
    predicted = loop.parts.reward.predict(obs, actions)
    expected = predicted.mean(0) + 0.5 * (1 - 1e-5) ** 200 * predicted.std(0)  # relabelled at step 200
    assert predicted.std(0).max() > 1e-3
    np.testing.assert_allclose(replay.rewards[:150, 0], expected, rtol=1e-5, atol=1e-6)
    loop.close(True)
