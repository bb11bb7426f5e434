"""What users replace: base classes whose optional hooks do nothing, and the wrapping of what has no base class.

The loop calls every hook of every part and asks none whether it has it. A plain callable, or a class with one method,
is wrapped once, where it is built; the hooks that it happens to have are then its own.
"""

from __future__ import annotations

import difflib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from PIL import Image

from pbrl.preferences import Preferences
from pbrl.queries import QueryRule
from pbrl.reward import RewardEnsemble
from pbrl.types import Answer, Environment, Query, Session, Teacher

PAIRS = ("buffer", "fresh", "none")


class Updater(ABC):
    """How answers become a better reward. One file per method; everything but `update` is optional.

    Attributes:
        pairs: where the questions come from: "buffer" (everything kept, or `query.recent_episodes` of it), "fresh" (the
            present policy is rolled out before each session, and `feedback.fresh_share` of them are about that) or
            "none" (no questions: the agent is paid the task's own reward).
        margin: environment steps kept around each segment (SURF's crops).
        between_every: environment steps between two calls of `between`; None: never.
    """

    pairs: str = "buffer"
    margin: int = 0
    between_every: int | None = None

    @abstractmethod
    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Improve `reward` in place; return metrics with keys `group/name`."""

    def between(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Between sessions, while questions are left (MRN's meta-step); the replay is then paid anew."""
        return {}

    def own_steps(self, pairs: int, length: int) -> int:
        """Environment steps that `update` takes at most after a session of so many pairs; a run plans for them."""
        return 0

    def start(self, session: Session) -> None:
        """Before the first step of a run, not when it is resumed."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, tensors and plain values, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Wrapped:
    """Around a part without base class; `wrapped` is what the user gave."""

    def __init__(self, wrapped: Any, *hooks: str) -> None:
        super().__init__()
        self.wrapped = wrapped
        for name in hooks:
            if hasattr(wrapped, name):
                setattr(self, name, getattr(wrapped, name))


class WrappedUpdater(Wrapped, Updater):
    """A class with an `update` method, or a function with its signature, and the hooks it has."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped, *hooks(Updater))

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        return self.wrapped(reward, preferences, session)  # a function: a method of this name has replaced this one


class WrappedTeacher(Wrapped, Teacher):
    """A callable, its metrics and its state if it has them; further hooks need the base class."""

    def __init__(self, wrapped: Callable[[Query], Answer]) -> None:
        super().__init__(wrapped, "metrics", "state_dict", "load_state_dict")

    def __call__(self, query: Query) -> Answer:
        return self.wrapped(query)


class WrappedRule(Wrapped, QueryRule):
    """A callable that picks candidates, and the attributes of a `QueryRule` that it has."""

    def __init__(self, wrapped: Callable[..., np.ndarray]) -> None:
        super().__init__(wrapped, *hooks(QueryRule))
        self.__post_init__()

    def __call__(
        self, candidates: Query, count: int, reward: RewardEnsemble, asked: Preferences, rng: np.random.Generator
    ) -> np.ndarray:
        return self.wrapped(candidates, count, reward, asked, rng)


class PlainEnvironment(gym.Wrapper):
    """A gymnasium environment as the agent wants it: float32 observations, actions in [-1, 1], its time limit.

    Its simulator's state cannot be stored.

    Raises:
        TypeError: if it is no gymnasium environment. ValueError: for spaces other than vectors.
    """

    state_size = 0

    def __init__(self, env: gym.Env) -> None:
        if not isinstance(env, gym.Env):
            raise TypeError(f"{name_of(env)} is not an environment; expected a subclass of gymnasium.Env")
        super().__init__(env)
        observed, actions = check_spaces(env)
        self.observation_space = Box(-np.inf, np.inf, observed.shape, np.float32)
        self.action_space = Box(-1.0, 1.0, actions.shape, np.float32)
        self._low, self._scale = actions.low.astype(np.float64), (actions.high - actions.low) / 2.0
        self._dtype, self._elapsed = actions.dtype, 0
        limit = None if env.spec is None else env.spec.max_episode_steps
        self.horizon: int | None = getattr(env.unwrapped, "horizon", limit)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._elapsed = 0
        return np.asarray(observation, np.float32), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        scaled = (self._low + (np.asarray(action, np.float64) + 1.0) * self._scale).astype(self._dtype)
        observation, reward, terminated, truncated, info = self.env.step(scaled)
        self._elapsed += 1
        over = self.horizon is not None and self._elapsed >= self.horizon
        return np.asarray(observation, np.float32), float(reward), bool(terminated), bool(truncated) or over, info

    def render(self, width: int = 256, height: int = 256) -> np.ndarray:
        """Its own picture, uint8 [height, width, 3].

        Raises:
            RuntimeError: if it draws none.
        """
        try:
            frame: Any = self.env.render()
        except NotImplementedError:
            frame = None
        if not isinstance(frame, np.ndarray):
            raise RuntimeError(f"{name_of(self.env)} draws no pictures; give it render_mode='rgb_array'")
        return np.asarray(Image.fromarray(frame).resize((width, height)))

    def get_state(self) -> np.ndarray:
        """Nothing: float64 [0]."""
        return np.zeros(0)

    def set_state(self, state: np.ndarray) -> np.ndarray:
        raise NotImplementedError(f"{self} cannot restore simulator states (state_size is 0)")


def check_spaces(env: gym.Env) -> tuple[Box, Box]:
    """The spaces of observations and actions, which must be vectors, the latter bounded.

    Raises:
        ValueError: if they are anything else.
    """
    observed, actions, name = env.observation_space, env.action_space, name_of(env.unwrapped)
    if not isinstance(observed, Box) or len(observed.shape) != 1:
        what = "images" if isinstance(observed, Box) and len(observed.shape) == 3 else str(observed)
        raise ValueError(
            f"{name} observes {what}; expected a Box with one axis (gymnasium.wrappers.FlattenObservation makes one)"
        )
    if not isinstance(actions, Box) or len(actions.shape) != 1 or not actions.is_bounded():
        raise ValueError(f"{name} acts in {actions}; expected continuous actions: a bounded Box with one axis")
    return observed, actions


def as_updater(thing: Any) -> Updater:
    """The updater itself, or one around a class with an `update` method or a function with its signature.

    Raises:
        TypeError: if it is neither. ValueError: if its `pairs` is unknown.
    """
    if not isinstance(thing, Updater):
        if not callable(getattr(thing, "update", thing)):
            raise TypeError(f"updater {name_of(thing)} has no method update(reward, preferences, session)")
        thing = WrappedUpdater(thing)
    if thing.pairs not in PAIRS:
        raise ValueError(f"updater {name_of(thing)}: pairs is {thing.pairs!r}; expected one of {', '.join(PAIRS)}")
    if getattr(thing.between, "__func__", None) is not Updater.between and thing.between_every is None:
        print(f"{name_of(thing)}.between is never called; say how often by between_every (environment steps)")
    return _noticed(thing, Updater)


def as_teacher(thing: Any) -> Teacher:
    """The teacher itself, or one around a callable that takes a `Query` and returns an `Answer`.

    Raises:
        TypeError: if it cannot be called.
    """
    if not isinstance(thing, Teacher):
        if not callable(thing):
            raise TypeError(f"teacher {name_of(thing)} cannot be called; expected teacher(query) -> pbrl.types.Answer")
        thing = WrappedTeacher(thing)
    return _noticed(thing, Teacher)


def as_rule(thing: Any) -> QueryRule:
    """The query rule itself, or one around a callable with its signature.

    Raises:
        TypeError: if it cannot be called.
    """
    if not isinstance(thing, QueryRule):
        if not callable(thing):
            raise TypeError(f"query {name_of(thing)} cannot be called; see pbrl.queries.QueryRule.__call__")
        thing = WrappedRule(thing)
    return _noticed(thing, QueryRule)


def as_environment(thing: Any) -> Environment:
    """The environment itself, or a plain gymnasium one that says it cannot store its state."""
    complete = all(hasattr(thing, name) for name in ("state_size", "horizon", "get_state", "set_state"))
    if complete:
        check_spaces(thing)
    environment: Any = thing if complete else PlainEnvironment(thing)
    return environment


def hooks(base: type) -> set[str]:
    """Public names of what a part of this kind may define."""
    return {name for name in vars(base) if not name.startswith("_")}


def _noticed(part: Any, base: type) -> Any:
    """The part; a method whose name is nearly that of a hook was probably meant to be one, and gets a line."""
    kind = type(part.wrapped if isinstance(part, Wrapped) else part)
    for name in sorted(set(dir(kind)) - hooks(base)):
        close = difflib.get_close_matches(name, hooks(base), n=1, cutoff=0.8)
        if close and not name.startswith("_") and callable(getattr(kind, name)):
            print(f"{name_of(part)}.{name} is never called; did you mean {close[0]}?")
    return part


def name_of(part: Any) -> str:
    """Dotted name of what the user gave: of the function, or of the object's class."""
    part = part.wrapped if isinstance(part, Wrapped) else part
    part = part.func if isinstance(part, functools.partial) else part
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{getattr(named, '__qualname__', '?')}"
