"""What a reward updater may use beside the reward and the answers: the loop's side of `pbrl.types.Session`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pbrl.agent.exploration import StateEntropy
from pbrl.agent.sac import PreferenceSAC
from pbrl.agent.view import AgentView
from pbrl.rollouts import Rollouts
from pbrl.types import Moments, Params, Query, Segments

WATCHED = 100  # environment steps between two calls of `watch`


class AgentSession:
    """Gives updaters and query rules access to the agent's steps; every step taken here is an environment step.

    Args:
        agent: whose policy acts; its rollouts record.
        rng: the updater's generator.
        entropy: what pretraining pays for, whose distances `novelty` gives.
    """

    def __init__(self, agent: PreferenceSAC, rng: np.random.Generator, entropy: StateEntropy) -> None:
        assert agent.rollouts is not None
        self.agent, self.rng, self.entropy = agent, rng, entropy
        self.rollouts: Rollouts = agent.rollouts
        self.policy = AgentView(agent)
        self.watch: Callable[[], None] = lambda: None  # is called now and then while steps are taken
        self.fresh_from = 0  # index of the first step of this session's fresh rollouts
        self.fresh_to = 0

    def begin(self) -> None:
        """A new session: nothing is fresh yet."""
        self.fresh_from = self.fresh_to = self.rollouts.total

    @property
    def env_step(self) -> int:
        return self.agent.num_timesteps

    def collect_fresh(self, steps: int) -> None:
        """Roll the present policy out for `steps` steps, without learning: this session's fresh segments."""
        self.fresh_from = self.rollouts.total
        self._collect(steps)
        self.fresh_to = self.rollouts.total

    def _collect(self, steps: int) -> None:
        for first in range(0, steps, WATCHED):
            self.agent.collect(min(WATCHED, steps - first), updates=0)
            self.watch()

    def fresh(self) -> list[Segments]:
        return self.rollouts.episodes_between(self.fresh_from, self.fresh_to)

    def unlabelled(self, count: int, length: int) -> tuple[Segments, Segments]:
        return self.rollouts.unlabelled(count, length, self.rng)

    def rollout(self, theta: Params, steps: int) -> list[Segments]:
        start = self.rollouts.total
        with self.rollouts.aside(another=True), self.agent.acting_with(theta):
            self._collect(steps)
        return self.rollouts.episodes_between(start, self.rollouts.total)

    def branches_from(self, states: Tensor, branches: int, length: int) -> Segments:
        first = [[self._branch(state, length) for _ in range(branches)] for state in states.numpy()]
        return self.rollouts.segments(np.array(first).reshape(-1), length)

    def branch_query(self, count: int, length: int, rng: np.random.Generator, margin: int = 0) -> Query:
        """`count` pairs of two continuations by the present policy from one stored state each, as a `Query`."""
        first = self._branch_starts(count, 2, length + 2 * margin, rng)
        return self.rollouts.query_at(first[:, 0], first[:, 1], length, margin)

    def _branch_starts(self, starts: int, branches: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of the first steps of new branches: int64 [starts, branches]."""
        if self.rollouts.states.shape[1] == 0:
            raise ValueError("branching needs an environment that can store its simulator state (state_size > 0)")
        legal = self.rollouts.starts(length, since=self.fresh_from if self.fresh_to > self.fresh_from else 0)
        if len(legal) == 0:  # an episode ended within the fresh steps
            legal = self.rollouts.starts(length)
        if len(legal) == 0:
            raise ValueError(f"no stored episode has {length} steps to branch within; shorten segment_length")
        found = np.empty((starts, branches), np.int64)
        for i in range(starts):
            state = self.rollouts.states[legal[rng.integers(len(legal))] % self.rollouts.capacity].copy()
            for j in range(branches):
                found[i, j] = self._branch(state, length)
        return found

    def _branch(self, state: np.ndarray, length: int) -> int:
        """Index of the first step of a new branch from this state."""
        first = self.rollouts.total
        if not self.agent.branch(state, length):
            raise ValueError(f"a branch of {length} steps terminated early; branches need episodes that do not")
        self.watch()
        return first

    def transitions(self, count: int, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        batch = self.agent.replay_buffer.draw(count, self.rng if rng is None else rng)
        return {"obs": batch.obs, "actions": batch.actions, "next_obs": batch.next_obs, "not_done": batch.not_done}

    def moments(self) -> tuple[Moments, Moments]:
        return self.agent.replay_buffer.moments()

    def novelty(self, obs: Tensor, nearest: int) -> Tensor:
        return self.entropy.distances(obs.cpu(), nearest).to(obs.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws from the updater's generator: float32 [*shape]."""
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))
