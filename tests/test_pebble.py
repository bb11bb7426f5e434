"""PEBBLE is its fitting: all answers of all sessions, and nothing beside them; as published it stops early."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import option
from tests.preference_problem import answered, session, small_reward


@pytest.mark.parametrize("name", ["pebble", "pebble-published"])
def test_an_update_is_the_fitting_of_all_answers_alone(name: str) -> None:
    updater, preferences = option("updater", name), answered(24, earlier=16)
    reward, alone = small_reward(), small_reward()
    metrics = updater.update(reward, preferences, session())
    assert metrics == updater.fit(alone, preferences, np.random.default_rng(0))
    for (key, value), other in zip(reward.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, msg=key)


def test_as_published_it_stops_once_the_answers_are_predicted_and_ours_goes_on() -> None:
    epochs = {
        name: option("updater", name).update(small_reward(), answered(24), session())["reward/epochs"]
        for name in ("pebble", "pebble-published")
    }
    assert epochs["pebble"] >= 100 > epochs["pebble-published"]


def test_questions_come_from_the_buffer_unless_fresh_ones_are_asked_for() -> None:
    assert option("updater", "pebble").pairs == option("updater", "pebble-published").pairs == "buffer"
    assert option("updater", "pebble", pairs="fresh").pairs == "fresh"
    with pytest.raises(ValueError, match=r"updater\.pairs=none; expected buffer or fresh"):
        option("updater", "pebble", pairs="none")
