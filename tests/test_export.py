"""What is exported acts and pays as the run did; other algorithms train on a learned reward; docs/export.md runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import SAC

import pbrl
from envs.pointmass import PointMass
from pbrl.comparing.runs import Run
from pbrl.evaluate import load_parts
from pbrl.export import ExportError, MeanPolicy, Measured, PaidReward, _require_same, card, main
from pbrl.launch.configuration import ConfigError
from pbrl.loop import Stopped
from pbrl.records.evaluation import act
from tests.conftest import TINY, finish, tiny_loop

ROOT = Path(__file__).parent.parent
STATES = np.random.default_rng(3).normal(size=(50, 2)).astype(np.float32)
ACTIONS = np.random.default_rng(4).uniform(-1, 1, (50, 2)).astype(np.float32)


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def cautious_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose pay is not the members' mean and whose reward standardises its inputs."""
    folder = tmp_path_factory.mktemp("cautious") / "run"
    finish(tiny_loop(folder, "reward.pessimism=0.7", "reward.lowest_of=2", "reward.normalise=true"))
    return folder


def test_the_networks_of_an_export_are_those_of_the_run(cautious_run: Path) -> None:
    agent, _, reward = load_parts(cautious_run)
    expected = np.stack([act(agent, obs) for obs in STATES])
    np.testing.assert_allclose(MeanPolicy(agent)(torch.from_numpy(STATES)).numpy(), expected, atol=1e-6)
    pay, members = PaidReward(reward, 600)(torch.from_numpy(STATES), torch.from_numpy(ACTIONS))
    assert reward.obs_scale.known and reward.pay.compares
    np.testing.assert_allclose(members.numpy(), reward.predict(STATES, ACTIONS), atol=1e-6)
    np.testing.assert_allclose(pay.numpy(), reward.pay(reward.predict(STATES, ACTIONS), 600), atol=1e-6)
    assert np.abs(pay.numpy() - members.numpy().mean(axis=0)).max() > 1e-3


def test_an_export_that_differs_is_refused() -> None:
    with pytest.raises(ExportError, match=r"differs from the run by up to 0\.5 on random inputs"):
        _require_same(Path("policy.onnx"), (torch.zeros(3),), (torch.tensor([0.0, 0.5, 0.0]),))
    with pytest.raises(ExportError):
        _require_same(Path("policy.onnx"), (torch.zeros(1),), (torch.tensor([float("nan")]),))


def test_the_learned_reward_pays_as_the_run_paid(cautious_run: Path) -> None:
    env, task = pbrl.LearnedReward(PointMass(), cautious_run), PointMass()
    _, _, reward = load_parts(cautious_run)
    obs, _ = env.reset(seed=5)
    task.reset(seed=5)
    for action in ACTIONS[:50]:
        pay = float(reward.pay(reward.predict(obs[None], action[None]), 600)[0])
        obs, paid, terminated, truncated, info = env.step(action)
        expected, true, *ended, _ = task.step(action)
        assert paid == pytest.approx(pay) and info["task_reward"] == pytest.approx(true) and "success" in info
        np.testing.assert_array_equal(obs, expected)
        assert [terminated, truncated] == ended
    assert truncated


class Doubled(gym.ActionWrapper):
    """The point mass with actions from -2 to 2."""

    action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def action(self, action: np.ndarray) -> np.ndarray:
        return action / 2


def test_the_learned_reward_sees_actions_as_the_agent_made_them(cautious_run: Path) -> None:
    plain, doubled = (
        pbrl.LearnedReward(PointMass(), cautious_run),
        pbrl.LearnedReward(Doubled(PointMass()), cautious_run),
    )
    plain.reset(seed=5)
    doubled.reset(seed=5)
    for action in ACTIONS[:20]:
        assert plain.step(action)[1] == pytest.approx(doubled.step(2 * action)[1], abs=1e-6)
    unbounded = Doubled(PointMass())
    unbounded.action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    with pytest.raises(ConfigError, match="its reward is of actions within bounds"):
        pbrl.LearnedReward(unbounded, cautious_run)


def test_before_the_first_answers_there_is_no_learned_reward(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run")
    loop.stop = lambda: loop.step >= 150
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    with pytest.raises(ConfigError, match="at step 150 no answer was learned from yet"):
        pbrl.LearnedReward(PointMass(), tmp_path / "run")


def test_a_reward_is_used_only_where_it_was_learned(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="does not fit an environment with 3 observations and 1 actions"):
        pbrl.LearnedReward(gym.make("Pendulum-v1"), tiny_run)
    with pytest.raises(ConfigError, match="there is no run"):
        pbrl.LearnedReward(PointMass(), tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    assert main([str(tiny_run), "--to", str(tmp_path / "full")]) == 2
    assert capsys.readouterr().err == f"error: --to {tmp_path}/full: expected a new or empty folder\n"
    assert main([str(tmp_path), "--to", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("reward.pessimism=0.7", "reward.normalise=true", "reward.convexity=2"),
        ("reward.sees_actions=false", "reward.normalise=true"),
        ("reward=reed",),
        ("updater=oracle",),
        ("agent.precision=bf16",),
    ],
    ids=lambda options: options[0] if options else "default",
)
def test_every_form_of_an_export_acts_the_same(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    run, to = tmp_path / "run", tmp_path / "policy"
    finish(tiny_loop(run, *options))
    assert main([str(run), "--to", str(to), "--episodes", "2"]) == 0
    assert str(to) in capsys.readouterr().out
    agent, _, _ = load_parts(run)
    expected = np.stack([act(agent, obs) for obs in STATES])
    (found,) = onnxruntime.InferenceSession(to / "policy.onnx").run(None, {"obs": STATES})
    np.testing.assert_allclose(found, expected, atol=1e-5)
    stock, _ = SAC.load(to / "policy.zip", device="cpu").predict(STATES, deterministic=True)
    np.testing.assert_allclose(stock, expected, atol=1e-5)
    assert torch.load(to / "policy.safe.pt", weights_only=True)
    card = (to / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "stable-baselines3" and front["model-index"][0]["results"][0]["metrics"]
    assert (to / "reward.onnx").exists() == (options != ("updater=oracle",)) == ("reward.onnx" in card)
    assert (to / "film.mp4").stat().st_size > 1000 and (to / "curve.png").exists()
    monkeypatch.chdir(to)
    variables: dict[str, object] = {}
    for block in blocks(card):
        exec(block, variables)
    assert np.asarray(variables["action"]).shape == (1, 2)


def test_a_strangers_texts_do_not_end_the_cards_quotes(tmp_path: Path) -> None:
    config = {"choices": {"env": "a\\", "updater": '"b: {c}\\'}, "seed": 0}
    text = card(Run("run", config, [], True), tmp_path, Measured(np.array([1.0, 2.0]), None), 600, film=False)
    front = yaml.safe_load(text.split("---")[1])
    assert front["model-index"][0]["name"] == "'b: 'c'' on a'"


def test_the_card_names_the_whole_command_and_the_labels_of_those_asked_for(tmp_path: Path) -> None:
    config = {"choices": {"env": "pointmass", "updater": "pebble"}, "seed": 0, "feedback": {"budget": 500}}
    long = " ".join(["updater=pebble", *(f"agent.option_{i}={i}" for i in range(20))])
    rows = [{"env_step": 0, "eval/return": 1.0}, {"env_step": 9, "feedback/labels": 65, "feedback/asked": 100}]
    for stored, logged, labels in (
        (f"python -m pbrl.train {long}", rows, "65 of 100 asked"),
        (f"/some/where/pbrl/train.py {long}", rows[:1], "0 of 0 asked"),  # of an earlier version; before any session
    ):
        (tmp_path / "command.txt").write_text(stored + "\n")
        text = card(Run("run", config, logged, True), tmp_path, Measured(np.ones(2), None), 600, film=False)
        assert f"| command | `python -m pbrl.train {long}` |" in text and f"| labels used | {labels} |" in text


@pytest.mark.slow
def test_the_page_on_exports_runs_and_ppo_learns_from_the_learned_reward(tmp_path: Path) -> None:
    """docs/export.md word for word, on a run of pointmass; a random policy's return is 26, the best 48."""
    run = tmp_path / "runs/pointmass/first"
    options = [option for option in TINY if not option.startswith(("agent.", "reward.", "feedback.", "total"))]
    more = ["total_steps=2000", "feedback.budget=200", "feedback.per_session=20", "feedback.every=150"]
    command = [sys.executable, "-m", "pbrl.train", *options, *more, "agent.learning_starts=100", f"run_dir={run}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    assert main([str(run), "--to", str(tmp_path / "first"), "--episodes", "2", "--no-film"]) == 0
    page = (ROOT / "docs/export.md").read_text()
    for block, name, least in zip(blocks(page), ("return", "true return"), (0.0, 33.0), strict=True):
        done = subprocess.run(
            [sys.executable, "-c", block], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        match = re.match(rf"{name} (\d+\.\d)", done.stdout.splitlines()[-1])
        assert match and float(match[1]) > least, done.stdout
