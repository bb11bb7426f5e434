"""Environments: interface, seeds, stored states, time limits, pictures, errors, configs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from hydra.utils import instantiate
from stable_baselines3.common.env_checker import check_env

import pbrl.conf
from envs import dm_control, metaworld
from envs.base import SimulatorEnv
from envs.dm_control import DMControl
from envs.gym import GymEnv
from envs.metaworld import MetaWorld
from envs.pointmass import PointMass, optimal_action, optimal_return
from tests.conftest import config

CONFIGS = sorted((Path(pbrl.conf.__file__).parent / "env").glob("*.yaml"))
BLANKS = {  # what the generic configs leave to the user
    "metaworld": {"task": "pick-place"},
    "dm_control": {"domain": "hopper", "task": "hop"},
    "gymnasium": {"id": "Pendulum-v1"},
}
MAKERS = {
    "metaworld": lambda: MetaWorld("door-open", horizon=60),
    "metaworld-free-object": lambda: MetaWorld("pick-place", horizon=60),
    "metaworld-v1": lambda: MetaWorld("bin-picking", horizon=60, reward_version="v1"),
    "walker": lambda: DMControl("walker", "walk", horizon=60),
    "quadruped": lambda: DMControl("quadruped", "run", horizon=60),
    "walker-repeat": lambda: DMControl("walker", "walk", horizon=59, action_repeat=3),
    "metaworld-displacement": lambda: MetaWorld("window-open", horizon=60, displacement=True),
    "metaworld-repeat": lambda: MetaWorld("door-open", horizon=59, action_repeat=2),
    "reacher": lambda: DMControl("reacher", "hard", horizon=60),  # its layout is in the model
    "pointmass": lambda: PointMass(horizon=60),
    "pendulum": lambda: GymEnv("Pendulum-v1", horizon=60),
    "mountain-car": lambda: GymEnv("MountainCarContinuous-v0", horizon=60),
    "escape": lambda: DMControl("quadruped", "escape", horizon=60, camera="y"),  # draws its terrain
    "ant": lambda: GymEnv("Ant-v5", horizon=60),
}
each_env = pytest.mark.parametrize("name", MAKERS)


def play(env: SimulatorEnv, steps: int, seed: int = 0, pictures: bool = False) -> list[Any]:
    """All that random actions bring to light, over the ends of episodes."""
    rng = np.random.default_rng(seed)
    seen: list[Any] = []
    for _ in range(steps):
        result = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        seen.append(result)
        if pictures:
            env.render(64, 64)
        if result[2] or result[3]:
            seen.append(env.reset())
    return seen


def config_env(path: Path) -> SimulatorEnv:
    blanks = [f"env.{key}={value}" for key, value in BLANKS.get(path.stem, {}).items()]
    return instantiate(config(f"env={path.stem}", *blanks)[0].env)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_makes_an_environment_that_passes_sb3s_check(path):
    env = config_env(path)
    check_env(env, skip_render_check=True)
    assert env.observation_space.dtype == np.float32
    env.close()


def test_the_promised_environments_have_configs():
    promised = (
        "door-open door-close button-press button-press-topdown drawer-open drawer-close sweep-into hammer window-open "
    )
    promised += "door-unlock walker-walk walker-run cheetah-run quadruped-walk quadruped-run pointmass metaworld "
    promised += "dm_control gymnasium coffee-button"
    assert {path.stem for path in CONFIGS} >= set(promised.split())


@each_env
def test_a_seed_fixes_the_episodes_and_nothing_else_moves_them(name):
    first, second = MAKERS[name](), MAKERS[name]()
    before = repr(np.random.get_state())  # noqa: NPY002
    seen: list[Any] = [first.reset(seed=7), play(first, 80)]
    second.reset(seed=8)
    play(second, 23)
    again: list[Any] = [second.reset(seed=7)]
    first.reset()  # a neighbour that goes on must not matter
    again.append(play(second, 80))
    np.testing.assert_equal(again, seen)
    assert repr(np.random.get_state()) == before  # noqa: NPY002
    assert not np.array_equal(second.reset(seed=8)[0], seen[0][0])
    assert not np.array_equal(second.reset()[0], second.reset()[0])


def test_displacements_stand_behind_the_benchmarks_observation():
    plain, more = (MetaWorld("button-press", horizon=9, displacement=on) for on in (False, True))
    for seed in (3, 4):
        first, seen = (env.reset(seed=seed)[0] for env in (plain, more))
        np.testing.assert_array_equal(seen, np.append(first, np.zeros(18, np.float32)))
        for _ in range(9):
            obs, seen = (env.step(np.array([1.0, -1.0, 0.5, 1.0]))[0] for env in (plain, more))
            np.testing.assert_array_equal(seen[:39], obs)
            np.testing.assert_allclose(seen[39:], obs[:18] - first[:18], atol=1e-6)
        assert np.abs(seen[39:42]).max() > 0.01, "the hand has moved"


@pytest.mark.parametrize(
    "task", ["dial-turn", "drawer-open", "faucet-open", "lever-pull", "window-close", "window-open"]
)
def test_displacements_are_from_where_the_object_stands(task):
    """Meta-World's own first frame is from before these tasks' object was placed, up to 0.2 m away."""
    plain, more = (MetaWorld(task, displacement=on) for on in (False, True))
    stale = []
    for seed in range(3):
        own, first = (env.reset(seed=seed)[0] for env in (plain, more))
        np.testing.assert_array_equal(first[39:], 0)
        np.testing.assert_array_equal(first[18:36], first[:18])
        obs, seen = (env.step(np.zeros(4))[0] for env in (plain, more))
        np.testing.assert_array_equal(seen[:18], obs[:18], "the simulation is the same")
        assert np.abs(seen[43:57]).max() < 0.01, "nothing touched the object"
        stale.append(np.abs(own[4:7] - obs[4:7]).max())
    assert max(stale) > 0.03


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: DMControl("walker", "walk", horizon=7, **kw),
        lambda **kw: MetaWorld("drawer-close", horizon=7, **kw),
    ],
    ids=["dm_control", "metaworld"],
)
def test_a_repeated_action_is_so_many_control_steps_with_their_rewards_added(make):
    single, held = make(), make(action_repeat=2)
    assert (single.horizon, held.horizon) == (7, 4)
    assert held.step_seconds == 2 * single.step_seconds
    single.reset(seed=4)
    held.reset(seed=4)
    rng = np.random.default_rng(0)
    for moment in range(4):
        action = rng.uniform(-1, 1, single.action_space.shape)
        obs, reward, terminated, truncated, info = held.step(action)
        parts = [single.step(action) for _ in range(2 if moment < 3 else 1)]
        if moment < 3:  # the last action is held beyond the single one's end
            np.testing.assert_array_equal(obs, parts[-1][0])
            assert reward == sum(part[1] for part in parts)
            assert info == {key: max(part[4][key] for part in parts) for key in parts[0][4]}
        assert (terminated, truncated) == (False, moment == 3)
    with pytest.raises(ValueError, match="action_repeat is 0; expected at least 1"):
        make(action_repeat=0)


def test_the_constructors_seed_is_the_first_resets():
    np.testing.assert_array_equal(PointMass(seed=3).reset()[0], PointMass().reset(seed=3)[0])


def test_seeds_hold_across_processes():
    code = "from envs.metaworld import MetaWorld as M; print(M('door-open').reset(seed=5)[0].tobytes().hex())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == MetaWorld("door-open").reset(seed=5)[0].tobytes().hex()


def assert_state_restores(make: Any, before: int, after: int) -> None:
    """A stored state goes on alike on another instance and on the same one, over the following resets."""
    original, other = make(), make()
    original.reset(seed=1)
    obs = play(original, before)[-1][0]
    state, rng_state = original.get_state(), original.np_random.bit_generator.state
    assert state.dtype == np.float64 and state.shape == (original.state_size,)
    future = play(original, after)

    other.reset(seed=2)
    play(other, 9, seed=9)
    for env in (other, original):
        np.testing.assert_array_equal(env.set_state(state), obs)
        np.testing.assert_array_equal(env.get_state(), state)
        env.np_random.bit_generator.state = rng_state
        np.testing.assert_equal(play(env, after), future)


@each_env
def test_a_stored_state_continues_bit_for_bit(name):
    assert_state_restores(MAKERS[name], before=25, after=80)


@pytest.mark.slow
@pytest.mark.parametrize("task", metaworld.task_names())
def test_every_metaworld_task_restores(task):
    for version in ("v1", "v2"):
        assert_state_restores(lambda: MetaWorld(task, horizon=60, reward_version=version), before=25, after=50)  # noqa: B023


@pytest.mark.slow
@pytest.mark.parametrize("name", dm_control.task_names())
def test_every_suite_task_restores(name):
    domain, task = name.split("-")
    assert_state_restores(lambda: DMControl(domain, task, horizon=40), before=25, after=30)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HalfCheetah", "Hopper", "Humanoid", "Pusher", "Reacher", "Swimmer", "Walker2d"])
def test_gymnasiums_mujoco_environments_restore(kind):
    assert_state_restores(lambda: GymEnv(f"{kind}-v5"), before=25, after=60)


def scripted(env: SimulatorEnv, policy: Any, obs: np.ndarray, steps: int) -> list[Any]:
    """What Meta-World's own expert sees in the next `steps`."""
    seen: list[Any] = []
    for _ in range(steps):
        seen.append(env.step(np.clip(policy.get_action(obs.astype(float)), -1, 1)))
        obs = seen[-1][0]
    return seen


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")  # the scripted policies' gains
@pytest.mark.parametrize(("task", "expert"), [("door-open", "DoorOpen"), ("hammer", "Hammer")])
def test_a_state_stored_in_contact_with_the_object_restores(task, expert):
    import metaworld.policies

    policy = getattr(metaworld.policies, f"Sawyer{expert}V3Policy")()
    env, other = MetaWorld(task), MetaWorld(task)
    obs = scripted(env, policy, env.reset(seed=0)[0], 60)[-1][0]
    state = env.get_state()
    future = scripted(env, policy, obs, 80)
    assert any(info["success"] for *_, info in future)
    np.testing.assert_equal(scripted(other, policy, other.set_state(state), 80), future)


def test_a_state_of_the_first_moment_restores():
    env, other = MetaWorld("sweep-into"), MetaWorld("sweep-into")
    obs, _ = env.reset(seed=4)
    np.testing.assert_array_equal(other.set_state(env.get_state()), obs)
    np.testing.assert_equal(play(other, 5), play(env, 5))


def test_states_are_refused_where_they_cannot_be_right():
    env = PointMass()
    with pytest.raises(ResetNeeded):
        env.get_state()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \[3\]; expected \[4\]"):
        env.set_state(np.zeros(3))
    env.state_size = 0  # as for a gymnasium environment whose inside is unknown
    assert env.get_state().size == 0
    with pytest.raises(NotImplementedError, match="cannot store"):
        env.set_state(np.zeros(0))


@each_env
def test_time_limits_truncate_and_do_not_terminate(name):
    env = MAKERS[name]()
    env.reset(seed=0)
    for step in range(1, env.horizon + 1):
        _, _, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape or (), np.float32))
        assert not terminated
        assert truncated == (step == env.horizon)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(env.action_space.shape or (), np.float32))


def test_the_published_time_limits():
    assert (MetaWorld("door-open").horizon, DMControl("walker", "walk").horizon) == (500, 1000)
    assert GymEnv("Pendulum-v1").horizon == 200


def test_a_task_that_ends_by_itself_terminates():
    lqr = DMControl("lqr", "lqr_2_1", horizon=10_000)
    lqr.reset(seed=0)
    with lqr._env.physics.reset_context():
        lqr._env.physics.data.qpos[:] = lqr._env.physics.data.qvel[:] = 0.0  # where its episode is over
    assert lqr.step(np.zeros(1))[2:4] == (True, False)


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")  # the scripted policy's gain
def test_metaworld_hides_the_goal_moves_the_object_and_keeps_success_momentary():
    import metaworld.policies

    env, policy = MetaWorld("door-open"), metaworld.policies.SawyerDoorOpenV3Policy()
    obs, _ = env.reset(seed=0)
    handle, seen = obs[4:7], scripted(env, policy, obs, 500)
    success = [info["success"] for *_, info in seen]
    assert seen[-1][2:4] == (False, True)
    assert success[0] == success[-1] == 0.0 and max(success) == 1.0  # opened, and let go of
    assert all(isinstance(value, float) for value in success)
    assert not np.any([step[0][-3:] for step in seen])
    assert np.abs(env.reset()[0][4:7] - handle).max() > 1e-3


def test_suite_observations_keep_the_suites_order_and_actions_its_range():
    env = DMControl("walker", "walk")
    obs, _ = env.reset(seed=0)
    parts = env._env.task.get_observation(env._env.physics)
    assert list(parts) == ["orientations", "height", "velocity"]
    np.testing.assert_array_equal(obs[14], np.float32(parts["height"]))

    quadruped = DMControl("quadruped", "walk")  # its actions reach from -1 to 1.1 in places
    spec = quadruped._env.action_spec()
    quadruped.reset(seed=0)
    quadruped.step(np.ones(12, np.float32))
    np.testing.assert_allclose(quadruped._env.physics.control(), spec.maximum)


class Short(gymnasium.Env):
    """Ends its episodes itself, after three steps."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Box(-2, 2, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, False, self.steps >= 3, {}


def test_an_environment_that_ends_its_episodes_itself_is_heard():
    gymnasium.register("Short-v0", Short, max_episode_steps=100)
    try:
        env = GymEnv("Short-v0")
    finally:
        gymnasium.registry.pop("Short-v0")
    for _ in range(2):
        env.reset()
        assert [env.step(np.zeros(1))[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
        with pytest.raises(ResetNeeded):
            env.step(np.zeros(1))


def test_gymnasium_actions_are_rescaled():
    env = GymEnv("Pendulum-v1")
    env.reset(seed=0)
    env.step(np.array([-1.0], np.float32))
    assert env._inner.last_u == -2.0


def test_the_point_masss_optimum_is_optimal():
    env = PointMass()
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        best, total, random_total, truncated = optimal_return(obs, 50), 0.0, 0.0, False
        state = env.get_state()
        while not truncated:
            obs, reward, _, truncated, info = env.step(optimal_action(obs))
            total += reward
        assert info["success"] == 1.0
        env.set_state(state)
        random_total = sum(result[1] for result in play(env, 49, seed))
        assert total == pytest.approx(best, abs=1e-4)
        assert random_total < best - 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetaWorld("door-opn"), r"'door-opn'; did you mean door-open.*task_names"),
        (lambda: DMControl("walker", "wlak"), r"'walker-wlak'; did you mean walker-walk.*task_names"),
        (lambda: GymEnv("Pendulm-v1"), r"'Pendulm-v1'; did you mean Pendulum-v1.*pprint_registry"),
        (lambda: MetaWorld("door-open", reward_version="v3"), r"'v3'; expected 'v1' or 'v2'"),
        (lambda: PointMass(horizon=0), "horizon is 0; expected at least 1"),
        (lambda: GymEnv("CartPole-v1"), r"id=CartPole-v1: it acts in Discrete.*expected continuous actions"),
        (lambda: GymEnv("FrozenLake-v1"), r"id=FrozenLake-v1: it observes Discrete.*expected a Box"),
    ],
)
def test_wrong_arguments_are_named_with_a_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_all_names_are_listed():
    assert len(metaworld.task_names()) == 50 and "door-open" in metaworld.task_names()
    assert len(dm_control.task_names()) > 40 and "walker-walk" in dm_control.task_names()


PICTURED = ["metaworld", "walker", "reacher", "pointmass", "ant", "escape"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURED)
def test_pictures_depend_on_the_state_alone_and_never_disturb(name):
    quiet, filmed, fresh = MAKERS[name](), MAKERS[name](), MAKERS[name]()
    for env in (quiet, filmed):
        env.reset(seed=3)
    np.testing.assert_equal(play(filmed, 30, pictures=True), play(quiet, 30))
    fresh.set_state(filmed.get_state())
    picture = filmed.render()
    assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8 and picture.std() > 5
    np.testing.assert_array_equal(fresh.render(), picture)
    assert filmed.render(80, 60).shape == (60, 80, 3)
    play(filmed, 10)
    assert not np.array_equal(filmed.render(), picture)
    for env in (quiet, filmed, fresh):
        env.close()


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {
        key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY", "PYOPENGL_PLATFORM")
    }
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment)


DRAW = """
from envs.dm_control import DMControl
env = DMControl("walker", "walk"); env.reset(seed=0); env.step(env.action_space.sample()); print("simulates")
try: print(env.render(64, 64).shape)
except RuntimeError as error: print(error)
"""


def test_pictures_need_no_display_and_leave_no_noise_without_close():
    run = python(DRAW)
    assert (run.returncode, run.stdout.split("\n")[1], run.stderr) == (0, "(64, 64, 3)", "")


@pytest.mark.parametrize("environment", [{"MUJOCO_GL": "disabled"}, {"__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere"}])
def test_without_opengl_it_simulates_and_names_the_packages(environment):
    run = python(DRAW, **environment)
    simulates, message, *_ = run.stdout.split("\n")
    assert (run.returncode, simulates, run.stderr) == (0, "simulates", "")
    assert "apt-get install libegl1 libgl1-mesa-dri" in message and "MUJOCO_GL" in message


@pytest.mark.parametrize(
    ("module", "strangers"),
    [
        ("pointmass", "mujoco metaworld dm_control"),
        ("metaworld", "dm_control"),
        ("dm_control", "metaworld"),
        ("gym", "mujoco"),
    ],
)
def test_importing_one_suite_does_not_import_another(module, strangers):
    run = python(f"import sys, envs.{module}; print(*[name for name in {strangers.split()} if name in sys.modules])")
    assert (run.returncode, run.stdout.strip()) == (0, "")
