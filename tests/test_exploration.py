"""The state-entropy bonus against its plain definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from pbrl.agent.exploration import StateEntropy, nearest_distances
from pbrl.agent.replay import RelabelReplay
from tests.conftest import point_mass_agent


def by_definition(queries: Tensor, stored: Tensor, k: int) -> Tensor:
    """All differences written out in double precision, sorted."""
    return (queries[:, None].double() - stored[None].double()).norm(dim=-1).sort(dim=1).values[:, k]


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(("stored", "k"), [(6, 5), (300, 5), (9000, 1)])
def test_distances_equal_the_definition(stored: int, k: int, offset: float) -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(stored, 7, generator=draw) + offset
    queries = torch.cat([points[:5], torch.randn(8, 7, generator=draw) + offset])
    torch.testing.assert_close(
        nearest_distances(queries, points, k).double(), by_definition(queries, points, k), rtol=1e-4, atol=1e-5
    )


def stocked(points: np.ndarray) -> RelabelReplay:
    replay = RelabelReplay(100, Box(-9, 9, (2,), np.float32), Box(-1, 1, (1,), np.float32), device="cpu")
    replay.observations[: len(points), 0] = points
    replay.pos = len(points)
    return replay


def test_the_bonus_is_the_distance_in_running_standard_deviations() -> None:
    points = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    bonus = StateEntropy(stocked(points), nearest=3)
    stored, seen = torch.from_numpy(points), []
    for start in (0, 20, 40):
        batch = stored[start : start + 20]
        seen.append(by_definition(batch, stored, 3))
        expected = seen[-1] / torch.cat(seen).std(unbiased=False)
        torch.testing.assert_close(bonus(batch).double(), expected, rtol=1e-4, atol=1e-5)
    again = StateEntropy(stocked(points), nearest=3)
    again.load_state(bonus.state())
    assert again(stored[:9]).equal(bonus(stored[:9]))


def test_there_is_no_bonus_before_there_are_neighbours() -> None:
    points = np.zeros((5, 2), np.float32)
    assert StateEntropy(stocked(points), nearest=5)(torch.ones(4, 2)).equal(torch.zeros(4))


def test_bounded_novelty_is_centred_and_clipped() -> None:
    agent = point_mass_agent(learning_starts=300)
    agent.collect(200)
    bonus = StateEntropy(agent.replay_buffer, nearest=5, bounded=True)
    stored = torch.from_numpy(agent.replay_buffer.observations[:200, 0].copy())
    paid = bonus(stored)
    assert abs(float(paid.mean())) < 0.1
    assert float(paid.std()) == pytest.approx(1 / 3, abs=0.1)
    assert float(bonus(torch.full((1, 2), 50.0))) <= 1.0
