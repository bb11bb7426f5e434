"""The agent's recent steps, kept for questions: hands out pairs of segments, recent, near-policy or fresh.

A ring of the last `capacity` environment steps. The task's reward and the simulator's state are kept beside
observations and actions: the first only to build a `Query` for simulated teachers and for evaluation, the second so
that a segment can be shown again, pixel for pixel, or continued from.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pbrl.types import Query, Segments


class Rollouts:
    """The last `capacity` steps of the training environment.

    Args:
        capacity: environment steps kept.
        obs_dim, act_dim: sizes of one observation and one action.
        state_size: length of the simulator's state vector; 0 where the simulator cannot store it.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, state_size: int = 0) -> None:
        self.capacity = capacity
        self.obs = np.zeros((capacity, obs_dim), np.float32)
        self.actions = np.zeros((capacity, act_dim), np.float32)
        self.raw_actions = np.zeros((capacity, act_dim), np.float32)
        self.task_rewards = np.zeros(capacity, np.float32)
        self.states = np.zeros((capacity, state_size), np.float64)
        self.episode = np.zeros(capacity, np.int64)
        self.total = 0  # steps ever added; step i lies at i % capacity
        self.episodes = 0  # index of the episode now running
        self.asides: deque[int] = deque()  # indices, ascending, at which no episode of the policy's own began
        self.others: deque[int] = deque()  # of those, another policy's
        self.another = False  # whether another policy acts now
        self._begin()
        self.ended = 0  # counted episodes, since this object was made
        self.finished: deque[tuple[float, int]] = deque(maxlen=10)  # (task return, steps) of the last ten episodes
        self.write_down: Callable[[], None] = lambda: None  # called before a step that would be lost is overwritten
        self.write_every = capacity

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        raw_action: np.ndarray,
        task_reward: float,
        state: np.ndarray,
        done: bool,
        counted: bool = True,
    ) -> None:
        """One step: what was seen, what was done, what the task paid, the simulator's state before the action.

        A step of a branch is not `counted` in the task's running return.
        """
        if self.total and self.total % self.write_every == 0:
            self.write_down()
        i = self.total % self.capacity
        self.obs[i], self.actions[i], self.raw_actions[i] = obs, action, raw_action
        self.task_rewards[i], self.states[i], self.episode[i] = task_reward, state, self.episodes
        self.total += 1
        if counted:
            self.running_return += float(task_reward)
            self.running_length += 1
            self.mixed |= self.another
        if done:
            self.interrupt()
            if counted:
                self.ended += 1
                if not self.mixed:
                    self.finished.append((self.running_return, self.running_length))
                self._begin()

    def _begin(self) -> None:
        self.running_return, self.running_length = 0.0, 0
        self.mixed = False  # whether another policy acted in the running episode too

    def lose(self) -> None:
        """The running episode cannot go on: what follows is another one."""
        self.interrupt()
        self._begin()

    def interrupt(self) -> None:
        """What follows does not continue what was before: no segment may reach across."""
        self.episodes += 1

    @contextlib.contextmanager
    def aside(self, another: bool = False) -> Iterator[None]:
        """The steps taken within, of a branch or (`another`) of another policy, are no episode of the policy's own.

        What follows is one only if they ended the one before; else it is the rest of that.
        """
        first, ended = self.episodes + 1, self.ended
        self.interrupt()
        self.another = another
        try:
            yield
        finally:
            self.another = False
            self.interrupt()
            self.asides.extend(range(first, self.episodes + (self.ended == ended)))
            self.others.extend(range(first, self.episodes) if another else ())
            for indices in (self.asides, self.others):
                while indices and indices[0] < self._oldest:
                    indices.popleft()

    @property
    def _oldest(self) -> int:
        """Index of the episode of the first kept step."""
        return int(self.episode[max(self.total - self.capacity, 0) % self.capacity])

    @property
    def mean_task_reward(self) -> float:
        """Task reward per step, averaged over the policy's last ten finished episodes; NaN before the first has."""
        steps = sum(length for _, length in self.finished)
        return sum(total for total, _ in self.finished) / steps if steps else float("nan")

    def starts(self, length: int, since: int = 0, own: bool = False) -> np.ndarray:
        """Every step index (counted from the first step ever) at which `length` steps of one episode begin: int64 [K].

        The last legal start of an episode of T steps is T − length: the last step can be shown. `own`: not those of
        another policy.
        """
        first = np.arange(max(since, self.total - self.capacity, 0), self.total - length + 1)
        episode = self.episode[first % self.capacity]
        legal = episode == self.episode[(first + length - 1) % self.capacity]
        return first[legal & ~np.isin(episode, self.others)] if own else first[legal]

    def since_steps(self, count: int) -> int:
        """Index of the first of the policy's own last `count` steps, or of the first that is kept."""
        own = self.starts(1, own=True)
        return int(own[-count:][0]) if count and len(own) else self.total

    def since_episodes(self, count: int, length: int) -> int:
        """Index of the first kept step of the policy's own last `count` episodes (the running one included).

        More of them if else no `length` steps of one episode of its own were among them: the running one may have just
        begun.
        """
        kept = np.arange(max(self.total - self.capacity, 0), self.total)
        own = np.setdiff1d(np.arange(self._oldest, self.episodes + 1), self.asides)
        before = int(own[-count]) - 1 if count <= len(own) else -1
        if len(long_enough := self.starts(length, own=True)):
            before = min(before, int(self.episode[long_enough[-1] % self.capacity]) - 1)
        recent = kept[self.episode[kept % self.capacity] > before]
        return int(recent[0]) if len(recent) else self.total

    def steps(self, since: int, most: int, own: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the kept steps (`own`: the policy's) from step index `since` on, evenly spaced ones, `most` at the most.

        Returns:
            Observations [N, obs_dim], actions [N, act_dim] and task rewards [N], float32.
        """
        kept = self.starts(1, since, own)
        index = kept[:: -(-len(kept) // most) or 1] % self.capacity
        return self.obs[index], self.actions[index], self.task_rewards[index]

    def segments(self, starts: np.ndarray, length: int) -> Segments:
        """The segments of `length` steps that begin at these step indices: copies, [len(starts), length, ·]."""
        index = (starts[:, None] + np.arange(length)) % self.capacity
        return Segments(
            torch.from_numpy(self.obs[index]),
            torch.from_numpy(self.actions[index]),
            torch.from_numpy(self.raw_actions[index]),
            torch.from_numpy(np.array(starts, np.int64)),
        )

    def _draw(self, count: int, length: int, rng: np.random.Generator, since: int, own: bool = False) -> np.ndarray:
        legal = self.starts(length, since, own)
        if len(legal) == 0:
            raise ValueError(
                f"no stored episode has {length} steps since step {since} ({self.total} steps stored so far); "
                "shorten segment_length, or ask later (feedback.start)"
            )
        return legal[rng.integers(len(legal), size=count)]

    def unlabelled(
        self, count: int, length: int, rng: np.random.Generator, since: int = 0
    ) -> tuple[Segments, Segments]:
        """`count` uniformly drawn pairs, with replacement, without any reward."""
        first, second = (self._draw(count, length, rng, since) for _ in range(2))
        return self.segments(first, length), self.segments(second, length)

    def query(
        self,
        count: int,
        length: int,
        rng: np.random.Generator,
        since: int = 0,
        margin: int = 0,
        other_since: int | None = None,
        own: bool = False,
    ) -> Query:
        """`count` uniformly drawn pairs as a `Query`, `margin` extra steps kept on both sides as its context.

        Both segments begin at step index `since` or later and are (`own`) the policy's; if `other_since` is given, only
        one of them does and is, the first or the second by chance, and the other begins there or later.
        """
        wide = length + 2 * margin
        first = self._draw(count, wide, rng, since, own)
        lately = (since, own) if other_since is None else (other_since, False)
        second = self._draw(count, wide, rng, *lately)
        if other_since is not None:
            swap = rng.random(count) < 0.5
            first, second = np.where(swap, second, first), np.where(swap, first, second)
        return self.query_at(first, second, length, margin)

    def query_at(self, first: np.ndarray, second: np.ndarray, length: int, margin: int = 0) -> Query:
        """The pairs whose (wide) segments begin at these step indices, as a `Query`."""
        wide = self.segments(first, length + 2 * margin), self.segments(second, length + 2 * margin)
        index = (np.stack([first, second], 1)[..., None] + margin + np.arange(length)) % self.capacity
        return Query(
            first=wide[0].steps(margin, margin + length),
            second=wide[1].steps(margin, margin + length),
            task_rewards=torch.from_numpy(self.task_rewards[index]),
            mean_task_reward=self.mean_task_reward,
            states=torch.from_numpy(self.states[index[..., 0]]),
            context=wide if margin else None,
        )

    def episodes_between(self, first: int, last: int) -> list[Segments]:
        """The episodes (or their parts) stored from step index `first` up to `last`: Segments [1, T, ...] each."""
        steps = np.arange(max(first, self.total - self.capacity), last)
        if len(steps) == 0:
            return []
        cuts = np.flatnonzero(np.diff(self.episode[steps % self.capacity])) + 1
        return [self.segments(part[:1], len(part)) for part in np.split(steps, cuts)]

    @property
    def columns(self) -> list[np.ndarray]:
        """The ring's arrays, [capacity, ...] each."""
        return [self.obs, self.actions, self.raw_actions, self.task_rewards, self.states, self.episode]

    def state(self) -> dict[str, Any]:
        """Counters, as plain JSON values; the arrays are saved apart (see pbrl.records.checkpoint)."""
        return {
            "total": self.total,
            "episodes": self.episodes,
            "asides": list(self.asides),
            "others": list(self.others),
            "mixed": self.mixed,
            "running_return": self.running_return,
            "running_length": self.running_length,
            "finished": [list(item) for item in self.finished],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.total, self.episodes = state["total"], state["episodes"]
        self.asides = deque(state.get("asides", ()))  # before, branches were counted as episodes
        self.others, self.mixed = deque(state.get("others", ())), state.get("mixed", False)  # not before version 0.2
        self.running_return, self.running_length = state["running_return"], state["running_length"]
        self.finished = deque(((total, length) for total, length in state["finished"]), maxlen=10)
