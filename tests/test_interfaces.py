"""What a user gives in place of a shipped part: with a base class or without, well spelt or not."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs.pointmass import PointMass
from pbrl.interfaces import Updater, as_environment, as_rule, as_teacher, as_updater, name_of
from pbrl.launch.configuration import options
from pbrl.queries import Uniform
from pbrl.types import Answer, Query, Segments, Teacher
from teachers.http import HTTPTeacher
from teachers.simulated import SimulatedTeacher
from tests.conftest import config


def query(count: int) -> Query:
    side = Segments(torch.zeros(count, 2, 1), torch.zeros(count, 2, 1))
    return Query(side, side, torch.zeros(count, 2, 2))


def yes(query: Query) -> Answer:
    return Answer(torch.ones(len(query)), torch.ones(len(query)) > 0)


class Plain:
    """An updater of one method and one hook, without base class."""

    pairs = "fresh"

    def update(self, reward: Any, preferences: Any, session: Any) -> dict[str, float]:
        return {"plain/updates": 1.0}

    def state_dict(self) -> dict[str, Any]:
        return {"remembered": 1}


def test_a_class_with_one_method_is_an_updater_and_keeps_the_hooks_it_has() -> None:
    updater = as_updater(Plain())
    assert (updater.pairs, updater.margin, updater.between_every) == ("fresh", 0, None)
    assert updater.update(None, None, None) == {"plain/updates": 1.0}  # type: ignore[arg-type]
    assert updater.state_dict() == {"remembered": 1}
    updater.load_state_dict({})
    updater.start(None)  # type: ignore[arg-type]
    assert name_of(updater) == "tests.test_interfaces.Plain"


def test_a_function_is_an_updater_a_teacher_or_a_query_rule() -> None:
    updater = as_updater(lambda reward, preferences, session: {"x/y": 2.0})
    assert updater.pairs == "buffer"
    assert updater.update(None, None, None) == {"x/y": 2.0}  # type: ignore[arg-type]
    teacher = as_teacher(yes)
    assert teacher(query(2)).prefers_first.tolist() == [1, 1]
    assert (teacher.metrics(), teacher.state_dict()) == ({}, None)
    rule = as_rule(lambda candidates, count, reward, asked, rng: np.arange(count)[::-1])
    assert (rule.pool, rule.branch_share, rule.compares_members) == (10, 0.0, False)
    assert rule(query(3), 3, None, None, None).tolist() == [2, 1, 0]  # type: ignore[arg-type]

    class Comparing:
        compares_members = True

        def __call__(self, candidates: Any, count: int, reward: Any, asked: Any, rng: Any) -> Any:
            return np.arange(count)

    assert as_rule(Comparing()).compares_members


@pytest.mark.parametrize(
    ("wrap", "thing", "message"),
    [
        (as_updater, 3, r"updater builtins.int has no method update"),
        (as_teacher, 3, r"teacher builtins.int cannot be called; expected teacher\(query\)"),
        (as_rule, 3, r"query builtins.int cannot be called"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(wrap: Any, thing: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        wrap(thing)


def test_an_unknown_source_of_pairs_is_refused() -> None:
    class Odd(Plain):
        pairs = "frehs"

    with pytest.raises(ValueError, match=r"Odd: pairs is 'frehs'; expected one of buffer, fresh, none"):
        as_updater(Odd())


def test_a_misspelt_hook_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    class Meta(Updater):
        between_every = 10

        def update(self, reward: Any, preferences: Any, session: Any) -> dict[str, float]:
            return {}

        def betwen(self, reward: Any, preferences: Any, session: Any) -> dict[str, float]:
            return {}

    class Forgetful(Plain):
        def load_statedict(self, state: Any) -> None: ...

    class Judge(Teacher):
        def __call__(self, query: Query) -> Answer:
            return yes(query)

        def metric(self) -> dict[str, float]:
            return {}

    class Seldom(Plain):
        def between(self, reward: Any, preferences: Any, session: Any) -> dict[str, float]:
            return {}

    as_updater(Meta())
    assert capsys.readouterr().out.endswith("Meta.betwen is never called; did you mean between?\n")
    as_updater(Forgetful())
    assert capsys.readouterr().out.endswith("Forgetful.load_statedict is never called; did you mean load_state_dict?\n")
    as_teacher(Judge())
    assert capsys.readouterr().out.endswith("Judge.metric is never called; did you mean metrics?\n")
    as_updater(Seldom())
    assert "Seldom.between is never called; say how often by between_every" in capsys.readouterr().out


def test_shipped_parts_pass_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    from hydra.utils import instantiate

    for group, wrap in (("updater", as_updater), ("query", as_rule)):
        for name in options(group):
            cfg, _ = config(f"{group}={name}")
            part = instantiate(cfg[group], _convert_="all")
            assert wrap(part) is part
    for teacher in (SimulatedTeacher(), HTTPTeacher("http://127.0.0.1:1/label")):
        assert as_teacher(teacher) is teacher
    assert as_rule(Uniform()).pool == 1
    assert capsys.readouterr().out == ""


class Bare(gym.Env):
    """A gymnasium environment as tutorials have it."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)


def test_a_plain_environment_says_that_it_has_no_states() -> None:
    bare = as_environment(Bare())
    assert (bare.state_size, bare.horizon, bare.get_state().shape) == (0, None, (0,))
    with pytest.raises(NotImplementedError, match="cannot restore simulator states"):
        bare.set_state(np.zeros(0))
    whole = PointMass()
    assert as_environment(whole) is whole
