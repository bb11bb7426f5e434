"""The state-entropy bonus and the colored noise against their plain definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from pbrl.agent.exploration import ColoredNoise, StateEntropy, colored_noise, principal_units
from pbrl.agent.replay import RelabelReplay
from pbrl.nearest import nearest_distances
from pbrl.rollouts import Rollouts
from tests.conftest import finish, point_mass_agent, rows, stopped_and_resumed, tiny_loop


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


def test_whitened_the_bonus_is_the_mahalanobis_distance() -> None:
    """Of two dimensions that nearly repeat one another."""
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(60, 2)) @ np.array([[1.0, 0.99], [0.0, 0.05]])).astype(np.float32)
    stored = torch.from_numpy(points)
    inverse = np.linalg.inv(np.cov(points.T.astype(np.float64), bias=True))
    apart = points[:, None].astype(np.float64) - points[None]
    distances = torch.from_numpy(np.sqrt(np.einsum("ijk,kl,ijl->ij", apart, inverse, apart)))
    expected = distances.sort(dim=1).values[:, 3]
    bonus = StateEntropy(stocked(points), nearest=3, whiten=True)
    torch.testing.assert_close(bonus.distances(stored, 3).double(), expected, rtol=1e-4, atol=1e-4)
    replay = bonus.replay
    replay.observations[60:65, 0], replay.pos = 5.0, 65  # not yet a tenth more
    units = bonus.units
    bonus(stored[:9])
    again = StateEntropy(replay, nearest=3, whiten=True)
    again.load_state(bonus.state())
    assert again(stored[:9]).equal(bonus(stored[:9])) and bonus.units is units
    replay.pos = 66
    bonus(stored[:9])
    assert not bonus.units.equal(units)


def test_what_hardly_varies_does_not_count_as_new() -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(200, 1))
    points = np.concatenate([wide, wide + 1e-3 * rng.normal(size=(200, 1)), np.full((200, 1), 7.0)], axis=1)
    units = principal_units(torch.from_numpy(points.astype(np.float32)))
    assert units.shape == (3, 1) and float(units[2].abs().max()) == 0
    spread = torch.from_numpy(points.astype(np.float32)) @ units
    assert float(spread.std(unbiased=False)) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_whitened_run_resumes_in_the_midst_of_pretraining_bit_for_bit(tmp_path: Path) -> None:
    short = ("total_steps=300", "pretraining.steps=150")
    finish(stopped_and_resumed(tmp_path, 155, "pretraining.whiten=true", *short))
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    finish(tiny_loop(tmp_path / "raw", *short))
    assert rows(tmp_path / "raw") != rows(tmp_path / "whole")


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


# ------------------------------------------------------------------------------------------------ colored noise


@pytest.mark.parametrize("steps", [1, 2, 31, 50])
@pytest.mark.parametrize("color", [0.0, 1.0, 2.0])
def test_the_noise_has_the_covariance_of_its_color(color: float, steps: int) -> None:
    many = 40_000
    drawn = colored_noise(color, steps, many, np.random.default_rng(0)).astype(np.float64)
    assert drawn.shape == (steps, many)
    waves = np.abs(np.fft.fftfreq(steps))
    waves[0] = 1 / steps
    power = waves**-color / (waves**-color).sum()
    lags = np.arange(steps)
    expected = (power[:, None] * np.cos(2 * np.pi * np.outer(lags, lags) / steps)).sum(0)  # the power's Fourier sum
    assert expected[0] == pytest.approx(1.0)
    covariance = drawn @ drawn.T / many
    between = np.abs(lags[:, None] - lags)
    np.testing.assert_allclose(covariance, expected[between], atol=6 * np.sqrt(2 / many))
    assert np.abs(drawn.mean(1)).max() < 6 / np.sqrt(many)
    assert (drawn**4).mean() == pytest.approx(3, abs=0.3), "a Gaussian's fourth moment"


def test_each_episode_has_a_sequence_of_its_own_and_a_copy_goes_on_alike() -> None:
    noise, other = (ColoredNoise(1.0, 6, 2, np.random.SeedSequence(3)) for _ in range(2))
    whole = colored_noise(1.0, 6, 2, np.random.default_rng(np.random.SeedSequence(3)))
    first = np.array([noise.next() for _ in range(4)])
    assert first.dtype == np.float32 and (first == whole[:4]).all()
    other.load_state(noise.state())
    for one in (noise, other):
        one.next()
        one.restart()
    begun = [np.array([one.next() for _ in range(8)]) for one in (noise, other)]  # longer than one sequence
    assert (begun[0] == begun[1]).all() and not np.isin(begun[0], whole).any()


def test_the_agent_explores_with_it_and_its_fresh_rollouts_do_not() -> None:
    agent = point_mass_agent(net_arch=[8], buffer_size=1000, learning_starts=0, noise_color=1.0)
    recorded: list[np.ndarray] = []
    mean = np.zeros((1, 2), np.float32)
    agent.actor.get_action_dist_params = lambda obs: (torch.from_numpy(mean), torch.zeros(1, 2), {})  # type: ignore[method-assign]
    sample = agent._sample_action

    def listening(*given: Any, **named: Any) -> tuple[np.ndarray, np.ndarray]:
        found = sample(*given, **named)
        recorded.append(agent._pending[0][0])
        return found

    agent._sample_action = listening  # type: ignore[method-assign]
    agent.train = lambda *given: None  # type: ignore[method-assign]
    expected = ColoredNoise(1.0, 50, 2, np.random.SeedSequence(0).spawn(3)[2])  # episodes of 50 steps
    first, second = (np.array([expected.next() for _ in range(50)]) for _ in range(2))
    agent.collect(30, updates=1)
    agent.collect(20, updates=0)  # the episode's end
    agent.collect(40, updates=1)
    np.testing.assert_allclose(recorded[:30], first[:30], rtol=1e-6)
    assert not np.isclose(recorded[30:50], first[30:]).any(), "rollouts of the policy as it is"
    np.testing.assert_allclose(recorded[50:], second[:40], rtol=1e-6)


def test_a_branch_that_ends_its_episode_leaves_the_noise_as_it_is() -> None:
    agent = point_mass_agent(net_arch=[8], buffer_size=1000, learning_starts=0, noise_color=1.0)
    rollouts = Rollouts(1000, *agent.observation_space.shape, *agent.action_space.shape, agent.training_env.state_size)
    agent.attach(rollouts)
    agent.train = lambda *given: None  # type: ignore[method-assign]
    agent.collect(75, updates=1)  # episodes of 50 steps
    assert agent.colored is not None and agent.colored.used == 25
    assert agent.branch(rollouts.states[40], 10)
    assert agent.colored.used == 25, "the episode in progress goes on"
