"""The data that travels between the parts, and what the parts see of each other.

Labels follow PARL (Chakraborty et al., ICLR 2024, eq. 6): **1 means the first segment is preferred**, 0 the second,
0.5 that both are equally good. A pair the teacher skipped is masked out by `Answer.given`; it is never trained on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Params = dict[str, Tensor]
Moments = tuple[np.ndarray, np.ndarray]  # mean and standard deviation, float64 [size] each


def expect(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raise a TypeError or ValueError naming `name` unless `value` is a tensor of this dtype and shape (None: any)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor of {dtype}")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; expected {dtype}")
    if value.ndim != len(shape) or any(s is not None and s != v for s, v in zip(shape, value.shape, strict=False)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {list(value.shape)}; expected [{wanted}]")


@dataclass(frozen=True)
class Segments:
    """B pieces of H steps each, as the reward network sees them. Holds no task reward: what is not here cannot leak."""

    obs: Tensor  # float32 [B, H, obs_dim]
    actions: Tensor  # float32 [B, H, act_dim], each entry in [-1, 1]
    raw_actions: Tensor | None = None  # float32 [B, H, act_dim]: the Gaussian sample whose tanh is `actions`
    step: Tensor | None = None  # int64 [B]: index in the run of each segment's first step; −1: unknown

    def __post_init__(self) -> None:
        expect("Segments.obs", self.obs, torch.float32, (None, None, None))
        size, length, _ = self.obs.shape
        expect("Segments.actions", self.actions, torch.float32, (size, length, None))
        if self.raw_actions is not None:
            expect("Segments.raw_actions", self.raw_actions, torch.float32, tuple(self.actions.shape))
        if self.step is not None:
            expect("Segments.step", self.step, torch.int64, (size,))

    def __len__(self) -> int:
        return self.obs.shape[0]

    def __getitem__(self, index: Any) -> Segments:
        """The chosen segments; `index` is a slice, a list or an integer array over the first axis."""
        index = index if isinstance(index, slice) else torch.as_tensor(np.asarray(index))
        return Segments(
            self.obs[index],
            self.actions[index],
            None if self.raw_actions is None else self.raw_actions[index],
            None if self.step is None else self.step[index],
        )

    @property
    def length(self) -> int:
        """Steps per segment, H."""
        return self.obs.shape[1]

    def steps(self, start: int, stop: int) -> Segments:
        """The same segments cut to the steps [start, stop)."""
        raw = None if self.raw_actions is None else self.raw_actions[:, start:stop]
        step = None if self.step is None else torch.where(self.step < 0, -1, self.step + start)
        return Segments(self.obs[:, start:stop], self.actions[:, start:stop], raw, step)

    @staticmethod
    def cat(parts: list[Segments]) -> Segments:
        """One batch from several of the same length; `raw_actions` are kept only if every part has them.

        So is `step` if any part has it: the others' is unknown.
        """
        raws = [part.raw_actions for part in parts]
        steps = [torch.full((len(part),), -1) if part.step is None else part.step for part in parts]
        return Segments(
            torch.cat([part.obs for part in parts]),
            torch.cat([part.actions for part in parts]),
            None if any(raw is None for raw in raws) else torch.cat([raw for raw in raws if raw is not None]),
            None if all(part.step is None for part in parts) else torch.cat(steps),
        )


@dataclass(frozen=True)
class Query:
    """N questions: which of first[i], second[i] is better?"""

    first: Segments
    second: Segments
    task_rewards: Tensor  # float32 [N, 2, H], for simulated teachers only
    mean_task_reward: float = float("nan")  # task reward per step, of the policy's own last ten episodes
    states: Tensor | None = None  # float64 [N, 2, S]: simulator state before each segment's first action
    context: tuple[Segments, Segments] | None = None  # the same pairs with extra steps before and after (SURF's crops)
    fresh: Tensor | None = None  # bool [N]: the pair is about the present policy; None: no pair is

    def __post_init__(self) -> None:
        if self.first.obs.shape != self.second.obs.shape:
            raise ValueError(f"the pair's shapes differ: {list(self.first.obs.shape)}, {list(self.second.obs.shape)}")
        size, length, _ = self.first.obs.shape
        expect("Query.task_rewards", self.task_rewards, torch.float32, (size, 2, length))
        if self.states is not None:
            expect("Query.states", self.states, torch.float64, (size, 2, None))
        if self.fresh is not None:
            expect("Query.fresh", self.fresh, torch.bool, (size,))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: Any) -> Query:
        """The chosen questions; `index` is a slice, a list or an integer array over the first axis."""
        index = index if isinstance(index, slice) else torch.as_tensor(np.asarray(index))
        return replace(
            self,
            first=self.first[index],
            second=self.second[index],
            task_rewards=self.task_rewards[index],
            states=None if self.states is None else self.states[index],
            context=None if self.context is None else (self.context[0][index], self.context[1][index]),
            fresh=None if self.fresh is None else self.fresh[index],
        )

    @staticmethod
    def cat(parts: list[Query]) -> Query:
        """One query from several; states and context are kept only if every part has them."""
        states = [part.states for part in parts]
        contexts = [part.context for part in parts]
        fresh = [torch.zeros(len(part), dtype=torch.bool) if part.fresh is None else part.fresh for part in parts]
        return Query(
            Segments.cat([part.first for part in parts]),
            Segments.cat([part.second for part in parts]),
            torch.cat([part.task_rewards for part in parts]),
            parts[0].mean_task_reward,
            None if any(s is None for s in states) else torch.cat([s for s in states if s is not None]),
            None
            if any(c is None for c in contexts)
            else (
                Segments.cat([c[0] for c in contexts if c is not None]),
                Segments.cat([c[1] for c in contexts if c is not None]),
            ),
            None if all(part.fresh is None for part in parts) else torch.cat(fresh),
        )


@dataclass(frozen=True)
class Answer:
    """What the teacher said to a query of N pairs."""

    prefers_first: Tensor  # float32 [N]: 1 first, 0 second, 0.5 equally good; anything between is a soft label
    given: Tensor  # bool [N]: False where the teacher skipped

    def __len__(self) -> int:
        return len(self.prefers_first)


class Teacher(ABC):
    """Somebody who can compare segments. Everything but the call is optional and does nothing unless overridden.

    A plain callable with this signature is a teacher too (see `pbrl.interfaces.as_teacher`).

    What a teacher remembers (a random generator, earlier answers) is taken before each query and after its answer, so
    that a resumed run equals an uninterrupted one. An answer given before a kill is not asked for again: the state
    after it is loaded in its place. A query that fails or is interrupted is asked again later, after the state before
    it has been loaded.
    """

    @abstractmethod
    def __call__(self, query: Query) -> Answer | Iterator[float | None]:
        """One answer for each pair. What it raises stops the run after saving; the query is put again on resume.

        It may instead be a generator that yields one label a pair, in [0, 1] or None to skip: each is on the disk
        before the next is asked for, and only what was not yet answered is put again.
        """

    wait: bool = True  # training waits for the answers; False: it goes on, and the loop calls `post` and `collect`
    needs_states: bool = False  # asks only about segments whose simulator state is known
    shows_link: bool = False  # prints a link that is for the person at the terminal only
    at_hand: bool = False  # of a generator: its next label is here already, and an interrupt waits for it
    durable: bool = False  # writes each answer down itself, and gives it again when the same pairs are asked again

    def post(self, query: Query) -> None:
        """If `wait` is False: from now on these pairs, and no others, are to be answered. Returns at once."""
        raise NotImplementedError(f"{type(self).__name__} has wait=False but no post(query)")

    def collect(self, query: Query, session: int, step: int) -> tuple[Tensor, Answer]:
        """If `wait` is False: which of the posted pairs are answered, bool [N], and the answers to those, in order.

        Called once at the beginning of each session. A resumed run that comes by a session again must get the same.
        """
        raise NotImplementedError(f"{type(self).__name__} has wait=False but no collect(query, session, step)")

    def metrics(self) -> dict[str, float]:
        """Numbers about the last query, logged with its session; keys `teacher/name`."""
        return {}

    def state_dict(self) -> dict[str, Any] | None:
        """All that its later answers and `metrics` depend on, as plain JSON values; None: nothing.

        Keys are texts, and tuples come back as lists. It may hold the teacher's own lists: it is copied or written at
        once.
        """
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, of this teacher or of another one made with the same options."""

    def open(self, run_dir: Path, segment_length: int) -> None:
        """Before the first query of a run, and again when it is resumed: files of its own go into `run_dir`."""

    def watch(self, row: Mapping[str, Any]) -> None:
        """Hears each row of metrics (`env_step` and others), and now and then only `env_step`."""

    def show(self, state: np.ndarray, actions: np.ndarray) -> None:
        """Sees the agent's last steps after each session: simulator state float64 [S], actions float32 [T, act_dim]."""

    def raters(self) -> dict[str, dict[str, float]]:
        """Who has answered, by name, with counts and other numbers; written into the preferences' file."""
        return {}

    def close(self, complete: bool) -> None:
        """At the end of the process; `complete`: the run has reached its end."""


class Environment(Protocol):
    """A gymnasium environment of float32 vectors whose state can be stored and restored (see `envs.base`).

    A plain `gymnasium.Env` is wrapped with `state_size` 0 (see `pbrl.interfaces.as_environment`): what needs states
    (videos, branches) is then refused, and a resumed run begins a new episode.
    """

    observation_space: Any
    action_space: Any
    horizon: int | None  # environment steps per episode; None: not known
    state_size: int  # float64 numbers in a state; 0: states cannot be stored

    @property
    def np_random(self) -> np.random.Generator:
        """From which episodes are drawn."""

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]: ...
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]: ...
    def get_state(self) -> np.ndarray: ...
    def set_state(self, state: np.ndarray) -> np.ndarray: ...
    def render(self, width: int = 256, height: int = 256) -> np.ndarray: ...
    def close(self) -> None: ...


class PolicyView(Protocol):
    """All that a reward updater sees of the agent: tensors in, tensors out; nothing here changes the agent.

    `theta` are the actor's parameters by name. The policy is a Gaussian over `raw` actions, squashed by tanh;
    log-probabilities are those of the raw action (the tanh correction does not depend on theta).
    """

    @property
    def gamma(self) -> float:
        """Discount per environment step."""

    @property
    def alpha(self) -> float:
        """SAC's temperature now: weight of the entropy bonus."""

    def parameters(self) -> Params:
        """The actor's parameters, copied and detached: float32, by name."""

    def distribution(self, theta: Params, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, float32 [..., act_dim] each, of the raw action at obs [..., obs_dim]."""

    def log_prob(self, theta: Params, obs: Tensor, raw_actions: Tensor) -> Tensor:
        """log π_theta(raw | obs), float32 [...], in nats, differentiable in theta."""

    def critic_parameters(self) -> Params:
        """The critics' parameters, copied and detached; C of them, two as a rule."""

    def q_values(self, critic: Params, obs: Tensor, actions: Tensor) -> Tensor:
        """All critics' values, float32 [C, B], at obs [B, obs_dim] and squashed actions [B, act_dim]."""

    def critic_features(self, obs: Tensor, actions: Tensor) -> Tensor:
        """What the critics' last layers are linear in, their bias included: float32 [C, B, D], without gradients."""

    def next_value(self, next_obs: Tensor, noise: Tensor) -> Tensor:
        """Target critics' soft value of next_obs, float32 [B]; noise: standard normal [B, act_dim]."""

    def objective(self, theta: Params, obs: Tensor, noise: Tensor) -> Tensor:
        """SAC's actor objective, maximised: mean over obs of min Q(s, a) − alpha log π_theta(a | s); float32 []."""


class Session(Protocol):
    """What a reward updater may use beside the reward, the preferences and the policy."""

    rng: np.random.Generator  # the updater's own generator; the loop saves and restores it

    @property
    def policy(self) -> PolicyView:
        """The agent now."""

    @property
    def env_step(self) -> int:
        """Environment steps taken so far."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws from `rng`: float32 [*shape]."""

    def fresh(self) -> list[Segments]:
        """This session's on-policy episodes (or parts): one Segments [1, T, ...] each; empty for buffer updaters."""

    def unlabelled(self, count: int, length: int) -> tuple[Segments, Segments]:
        """`count` random pairs of recent segments of `length` steps, without any reward."""

    def rollout(self, theta: Params, steps: int) -> list[Segments]:
        """Run the policy theta for `steps` environment steps (counted, kept in replay): Segments [1, T, ...] each."""

    def branches_from(self, states: Tensor, branches: int, length: int) -> Segments:
        """From simulator states, float64 [K, S] (`Preferences.states`), continuations by the present policy.

        The steps are counted as environment steps. Segments [K * branches, length, ...], those of one start beside each
        other.
        """

    def transitions(self, count: int, rng: np.random.Generator | None = None) -> Mapping[str, Tensor]:
        """`count` random replay rows, drawn by `rng` (None: the updater's own): obs, actions, next_obs, not_done
        (float32 [count, ...])."""

    def moments(self) -> tuple[Moments, Moments]:
        """Mean and standard deviation of all observations in the replay, and of all actions: float64 [·] each."""

    def novelty(self, obs: Tensor, nearest: int) -> Tensor:
        """Distance of each observation, float32 [B, obs_dim], to its `nearest`-th nearest stored one, in the units of
        pretraining: float32 [B]."""


def tensor_fields(value: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass by field name, without those that are None."""
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}
