"""Do two disjoint estimates of the second term agree on rollouts of a trained policy? From a checkpoint, no training.

The policy of the run is rolled out once; each size is measured on as many disjoint stretches as there are. A stretch
of n steps has n / 200 answered pairs at random places (half of its steps, as in a session of the default setting);
the estimators through the critics use the run's own answers and n replay rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbrl.bilevel.params import cosine, norm
from pbrl.launch.build import build
from pbrl.launch.shipped import make
from pbrl.launch.stored import read_config
from pbrl.losses import log_likelihood
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.second_term.estimators import estimate
from pbrl.second_term.guard import groups
from pbrl.second_term.implicit import CRITIC_BASED, Implicit
from pbrl.types import Answer, Params, Query, Segments

HORIZON = 50  # steps of a segment
BLOCK = 1000  # environment steps; a stretch is some of these
PAIRS = 5  # answered pairs about each block
BRANCHES = 2


def implicit(estimator: str, **changes: Any) -> Implicit:
    """The default's settings with another estimator."""
    made: Implicit = make("updater", "aparl", implicit={"estimator": estimator, **changes}).implicit
    return made


SETTINGS = {
    "fisher": implicit("fisher"),
    "covariance": implicit("covariance", branches=BRANCHES),
    "critic-pairs (advantage)": implicit("critic-pairs"),
    "critic-pairs (value)": implicit("critic-pairs", compare="value"),
    "critic-adjoint, λ 0.9": implicit("critic-adjoint", trace_decay=0.9),
    "low-dimensional, λ 0.9": implicit("low-dimensional", trace_decay=0.9),
}


@dataclass
class Block:
    """A stretch of BLOCK steps of the policy, its pairs, and two continuations of each segment's start."""

    episodes: list[Segments]
    query: Query
    branches: Segments  # [2 PAIRS * BRANCHES, HORIZON, ...]: those of all first segments, then of all second ones


class Stretch:
    """A `Session` of some blocks; `index` tells stretches apart, whose replay rows differ too."""

    def __init__(self, session: Any, blocks: list[Block], index: int) -> None:
        self.session, self.blocks, self.policy = session, blocks, session.policy
        self.env_step, self.rng = session.env_step + index, np.random.default_rng(index)

    def fresh(self) -> list[Segments]:
        return [episode for block in self.blocks for episode in block.episodes]

    def preferences(self) -> Preferences:
        """The pairs, answered without error by the task's reward."""
        query = Query.cat([block.query for block in self.blocks])
        query = replace(query, fresh=torch.ones(len(query), dtype=torch.bool))
        returns = query.task_rewards.sum(2)
        labels = (returns[:, 0] > returns[:, 1]).float()
        labels[returns[:, 0] == returns[:, 1]] = 0.5
        stored = Preferences()
        stored.add(query, Answer(labels, torch.ones(len(labels), dtype=torch.bool)), 0)
        return stored

    def branches_from(self, states: Tensor, branches: int, length: int) -> Segments:
        """The continuations of these states, rolled out beforehand."""
        found = []
        known = [
            (state.numpy().tobytes(), block.branches, row)
            for block in self.blocks
            for row, state in enumerate(block.query.states.transpose(0, 1).flatten(0, 1))  # type: ignore[union-attr]
        ]
        where = {key: (segments, row) for key, segments, row in known}
        for state in states:
            segments, row = where[state.numpy().tobytes()]
            found.append(segments[row * branches : (row + 1) * branches])
        return Segments.cat(found)

    def transitions(self, count: int, rng: np.random.Generator | None = None) -> Mapping[str, Tensor]:
        return self.session.transitions(count, self.rng if rng is None else rng)


def roll(loop: Any, blocks: int, rng: np.random.Generator) -> list[Block]:
    """`blocks` stretches of the run's policy, without learning."""
    session, rollouts, found = loop.session, loop.parts.rollouts, []
    for _ in range(blocks):
        rollouts.interrupt()
        session.collect_fresh(BLOCK)
        legal = rollouts.starts(HORIZON, since=session.fresh_from)
        starts = rng.choice(legal, (2, PAIRS))
        query = rollouts.query_at(starts[0], starts[1], HORIZON, 0)
        episodes = session.fresh()
        states = query.states.transpose(0, 1).flatten(0, 1)
        found.append(Block(episodes, query, session.branches_from(states, BRANCHES, HORIZON)))
    return found


def first_term(reward: RewardEnsemble, preferences: Preferences) -> Params:
    """The gradient of the answers' log-likelihood, each member as though it were alone."""
    named = {name: value for group in groups(reward) for name, value in group.parameters.items()}
    with torch.enable_grad():
        sums = [reward(side.obs, side.actions).sum(2) for side in (preferences.first, preferences.second)]
        margin = sums[0] - sums[1]
        value = log_likelihood(margin, preferences.prefers_first.expand_as(margin)).mean(1).sum()
        return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


def measured(loop: Any, blocks: list[Block], sizes: list[int], most: int, names: list[str]) -> list[dict]:
    """One row per estimator, size and stretch. Without blocks: of estimators that need none."""
    reward, answered, rows = loop.parts.reward, loop.parts.preferences, []
    for size in sizes:
        count = size // BLOCK
        stretches = [blocks[i : i + count] for i in range(0, len(blocks) - count + 1, count)] or [[]] * most
        for index, chosen in enumerate(stretches[:most]):
            for name in names:
                settings = SETTINGS[name]
                session = Stretch(loop.session, chosen, index)
                critics = settings.estimator in CRITIC_BASED
                preferences = answered if critics else session.preferences()
                settings = Implicit(**vars(settings) | {"rows": size})
                began = time.process_time()
                found = estimate(settings, "preference", None, reward, preferences, session)  # type: ignore[arg-type]
                seconds = time.process_time() - began
                row = {"estimator": name, "steps": size, "stretch": index, "seconds": round(seconds, 3)}
                if found.rows is not None:
                    halves = [found.rows.gradients(reward, weights) for weights in found.rows.weights]
                    whole = {key: (value + halves[1][key]) / 2 for key, value in halves[0].items()}
                    first = first_term(reward, preferences)
                    row |= {
                        "split_cosine": round(cosine(*halves), 4),
                        "cosine_to_term_1": round(cosine(whole, first), 4),
                        "norm_over_term_1": float(f"{norm(whole) / norm(first):.3g}"),
                        "converged": int(found.converged),
                        "value_accuracy": found.metrics.get("value_accuracy", ""),
                    }
                rows.append(row)
                print(row, flush=True)
    return rows


def study(run: Path, sizes: list[int], blocks: int, most: int, names: list[str]) -> list[dict]:
    """Everything of one run; its folder is left as it is but for the log of these steps.

    Args:
        run: a copy of a run's folder.
        blocks: of BLOCK steps to roll out.
        most: stretches of each size at the most.
        names: of SETTINGS. `critic-pairs` needs no rollouts.
    """
    blocks = 0 if all(SETTINGS[name].estimator == "critic-pairs" for name in names) else blocks
    stored, choices = read_config(run)
    stored.resume = str(run)
    loop = build(stored, choices, [])
    try:
        about = {"env": choices["env"], "trained_steps": loop.session.env_step, "answers": len(loop.parts.preferences)}
        rows = measured(loop, roll(loop, blocks, np.random.default_rng(0)), sizes, most, names)
    finally:
        loop.release()
    return [about | row for row in rows]
