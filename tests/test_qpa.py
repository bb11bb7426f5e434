"""QPA: questions about the last episodes, batches half from recent steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pbrl.agent.replay import RelabelReplay
from tests.conftest import config, option, point_mass_agent, tiny_loop


def test_hybrid_replay_draws_the_published_share_from_recent_steps() -> None:
    agent = point_mass_agent(hybrid_ratio=0.5, hybrid_steps=100, buffer_size=1000)
    replay: RelabelReplay = agent.replay_buffer
    replay.rows[:, 0] = np.arange(1000)  # obs[0] tells which row was drawn
    replay.pos, replay.full = 250, True  # rows 150…249 are the newest hundred
    drawn = replay.draw(1000, np.random.default_rng(0)).obs[:, 0].numpy()
    recent = (drawn >= 150) & (drawn < 250)
    assert recent[:500].all()
    assert recent[500:].mean() == pytest.approx(0.1, abs=0.05), "the rest from everything"
    replay.hybrid = False
    drawn = replay.draw(1000, np.random.default_rng(0)).obs[:, 0].numpy()
    assert ((drawn >= 150) & (drawn < 250)).mean() == pytest.approx(0.1, abs=0.05)


@pytest.mark.slow
def test_hybrid_replay_ends_with_the_budget(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "agent.hybrid_ratio=0.5", "total_steps=260")
    loop.run()
    assert loop.agent.replay_buffer.hybrid, "questions are left after the session at step 200"
    loop.close(True)
    for name, spent in (("spent", "feedback.budget=5"), ("unasked", "updater=oracle")):
        loop = tiny_loop(tmp_path / name, "agent.hybrid_ratio=0.5", spent, "total_steps=260")
        loop.run()
        assert not loop.agent.replay_buffer.hybrid
        loop.close(True)


@pytest.mark.parametrize(("env", "episodes"), [("walker-walk", 10), ("drawer-open", 30), ("door-open", 60)])
def test_near_policy_queries_look_back_as_far_as_published(env: str, episodes: int) -> None:
    cfg, _ = config("query=near-policy", f"env={env}")
    assert cfg.query.recent_episodes == episodes


def test_near_policy_queries_come_from_the_last_episodes(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "query=near-policy", "query.recent_episodes=2", "total_steps=250")
    loop.run()
    query = loop.questions.select(first=False)
    recent = loop.parts.rollouts.obs[200:250]  # episodes of 50 steps; the sixth has not begun
    assert {tuple(o) for o in query.first.obs[:, 0].tolist()} <= {tuple(o) for o in recent.tolist()}
    loop.close(True)


@pytest.mark.slow
def test_one_clip_of_a_pair_comes_from_the_last_episodes_and_the_other_from_everything(tmp_path: Path) -> None:
    few = ("query=near-policy", "query.recent_episodes=1", "query.against_kept=true", "total_steps=250")
    loop = tiny_loop(tmp_path / "run", *few)
    loop.run()
    queries = [loop.questions.select(first=False) for _ in range(20)]
    starts = torch.cat([torch.stack([query.first.step, query.second.step]) for query in queries], dim=1)
    assert (starts.amax(0) >= 200).all(), "the fifth episode: the sixth has not begun"
    assert (starts.amin(0) < 200).float().mean() > 0.5
    loop.close(True)


@pytest.mark.parametrize(("task", "steps_per_label"), [("walker-walk", 2000 / 128), ("door-open", None)])
def test_qpas_fitting_is_the_published_one(task: str, steps_per_label: float | None) -> None:
    fit = option("updater", "qpa", task=task).fit
    assert fit.steps_per_label == steps_per_label
    if steps_per_label:
        assert (fit.crop_lengths(50), fit.pieces) == ((35, 45), 20)
        assert (fit.stop_over, fit.stop_accuracy) == ("update", 0.98)
    else:
        assert (fit.crop, fit.epochs, fit.stop_over, fit.stop_accuracy) == (None, 200, "epoch", 0.97)
