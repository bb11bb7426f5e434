"""Environments of one's own: a class, an id registered by a module in the present folder, spaces that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pbrl import evaluate
from pbrl.interfaces import as_environment
from pbrl.launch.build import build
from pbrl.launch.command import composed, prepare
from pbrl.launch.configuration import ConfigError
from pbrl.loop import Loop, Stopped
from tests.conftest import TINY, finish

MODULE = '''
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Slide(gym.Env):
    """A point pushed by forces between -3 and 5; observations are float64, episodes have no end of their own."""

    observation_space = Box(-10.0, 10.0, (2,), np.float64)
    action_space = Box(-3.0, 5.0, (1,), np.float32)

    def __init__(self, size=1.0):
        self.size, self.horizon = size, 40

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.speed = self.np_random.uniform(-self.size, self.size), 0.0
        return np.array([self.place, self.speed]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.speed += 0.01 * float(action[0])
        self.place += self.speed
        return np.array([self.place, self.speed]), -abs(self.place), False, False, {}


class Steps(Slide):
    action_space = Discrete(3)


class Parts(Slide):
    observation_space = Dict({"place": Box(-1, 1, (1,)), "speed": Box(-1, 1, (1,))})


class Pictures(Slide):
    observation_space = Box(0, 255, (64, 64, 3), np.uint8)


class NoEnvironment:
    pass


gym.register("NAME/Slide-v0", entry_point=Slide, max_episode_steps=30)
gym.register("NAME/Steps-v0", entry_point=Steps, max_episode_steps=30)
gym.register("NAME/Pictures-v0", entry_point=Pictures, max_episode_steps=30)
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE.replace("NAME", name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def made(*overrides: str) -> Loop:
    rewritten = prepare([*TINY, *overrides, "run_dir=run"])
    return build(composed(rewritten), {"env": "own"}, rewritten)


def test_a_class_of_ones_own_is_trained_in_with_its_arguments(module: str) -> None:
    loop = made(f"env._target_={module}.Slide", "env.size=0.5")
    env = loop.agent.training_env
    assert (env.horizon, env.state_size) == (40, 0)
    assert finish(loop)["env_step"] == 600
    assert len(loop.parts.rollouts.finished) > 5, "its horizon did not end its episodes"


@pytest.mark.slow
def test_where_the_simulator_has_no_state_a_resumed_run_begins_a_new_episode(module: str) -> None:
    loop = made(f"env._target_={module}.Slide", "agent.noise_color=1.0")
    loop.stop = lambda: loop.step >= 345  # episodes of 40 steps: in the middle of the ninth
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    rewritten = prepare(["resume=run", f"trust=[{module}]"])
    loop = build(composed(rewritten), {"env": "own"}, rewritten)
    colored = loop.agent.colored
    assert colored is not None and colored.used == len(colored.sequence), "its noise begins anew too"
    finish(loop)
    assert [length for _, length in loop.parts.rollouts.finished] == [40] * 10, "none is the sum of two"


@pytest.mark.slow
def test_a_run_is_evaluated_in_the_environment_it_was_trained_in(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(made(f"env._target_={module}.Slide"))
    assert evaluate.main(["run", "--episodes", "2", "--trust", module]) == 0
    assert "rank correlation" in capsys.readouterr().out
    agent, env, reward = evaluate.load_parts(Path("run"), [module])
    seen: list[torch.Tensor] = []
    returns = reward.returns
    monkeypatch.setattr(reward, "returns", lambda segments: seen.append(segments.actions) or returns(segments))
    evaluate.agreement(agent, env, reward, seed=1, length=10)
    assert env.horizon == 40 and len(seen) == 2
    assert all(actions.abs().max() <= 1 for actions in seen), "the reward never saw actions up to 5"


def test_a_registered_id_names_the_module_that_registers_it(module: str) -> None:
    loop = made("env=gymnasium", f"env.id={module}:{module}/Slide-v0")
    assert loop.agent.training_env.horizon == 30
    loop.release()


def test_the_wrapping_rescales_actions_and_ends_episodes(module: str) -> None:
    import importlib

    env = as_environment(importlib.import_module(module).Slide())
    observation, _ = env.reset(seed=3)
    assert observation.dtype == np.float32
    assert env.action_space.low.tolist() == [-1.0]
    seen = [env.step(np.array([1.0], np.float32)) for _ in range(40)]
    assert seen[0][0][1] == pytest.approx(0.05)  # +1 is the largest force, 5
    assert [step[3] for step in seen] == [False] * 39 + [True]
    assert env.set_state is not None
    with pytest.raises(RuntimeError, match="draws no pictures"):
        env.render(64, 64)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["env._target_=MODULE.Steps"], "env: MODULE.Steps acts in Discrete(3); expected continuous actions"),
        (["env._target_=MODULE.Parts"], "FlattenObservation"),
        (["env._target_=MODULE.Pictures"], "MODULE.Pictures observes images; expected a Box with one axis"),
        (["env._target_=MODULE.NoEnvironment"], "is not an environment; expected a subclass of gymnasium.Env"),
        (["env=gymnasium", "env.id=MODULE:MODULE/Steps-v0"], "env.id=MODULE:MODULE/Steps-v0: it acts in Discrete(3)"),
        (["env=gymnasium", "env.id=MODULE:MODULE/Pictures-v0"], "it observes images"),
        (["env=gymnasium", "env.id=MODULE:MODULE/Slid-v0"], "did you mean MODULE/Slide-v0"),
        (["env=gymnasium", "env.id=nowhere:Slide-v0"], "env.id=nowhere:Slide-v0: No module named 'nowhere'"),
        (["env=gymnasium", "env.id=CartPole-v1"], "env.id=CartPole-v1: it acts in Discrete(2)"),
        (["env=gymnasium", "env.id=FrozenLake-v1"], "env.id=FrozenLake-v1: it observes Discrete(16)"),
    ],
)
def test_what_the_agent_cannot_act_in_is_one_line(module: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(*(override.replace("MODULE", module) for override in overrides))
    assert expected.replace("MODULE", module) in str(caught.value)
    assert "\n" not in str(caught.value)
