"""What is asked in a session: how many pairs, about which steps, chosen by which rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pbrl.interfaces import name_of
from pbrl.parts import Parts
from pbrl.queries import QueryRule, Uniform, most_novel, most_rewarded
from pbrl.schedule import Feedback
from pbrl.session import AgentSession
from pbrl.types import Query


class Questions:
    """Selects each session's questions.

    Args:
        parts: the run's.
        session: through which the present policy is rolled out.
        feedback: how much is asked. total_steps: of the run. segment_length: environment steps.
        rng: draws the candidates and is the query rule's.
    """

    def __init__(
        self,
        parts: Parts,
        session: AgentSession,
        feedback: Feedback,
        total_steps: int,
        segment_length: int,
        rng: np.random.Generator,
    ) -> None:
        self.parts, self.session, self.feedback = parts, session, feedback
        self.total_steps, self.segment_length, self.rng = total_steps, segment_length, rng

    @property
    def left(self) -> int:
        """Pairs that the budget still allows."""
        return max(self.feedback.budget - self.parts.preferences.asked, 0)

    def count(self, step: int) -> int:
        """Pairs of a session at this environment step."""
        return max(self.feedback.count(step, self.total_steps, self.parts.preferences.asked), 0)

    def steps(self, count: int, first: bool) -> int:
        """Environment steps that a session of so many pairs takes at most: fresh ones, branches, the updater's own."""
        updater, fresh = self.parts.updater, self.feedback.fresh_steps
        steps = 2 * round(self.parts.query.branch_share * count) * (self.segment_length + 2 * updater.margin)
        if count and updater.pairs == "fresh" and not first:
            steps += 2 * count * self.segment_length if fresh is None else fresh
        if count and (updater.pairs != "fresh" or not first):
            steps += updater.own_steps(count, self.segment_length)
        return steps

    def plan(self, start: int) -> list[tuple[int, int]]:
        """Environment step and pairs of each session that fits into the run, the first one due at `start`."""
        sessions: list[tuple[int, int]] = []
        due, asked = start, self.parts.preferences.asked
        while asked < self.feedback.budget and due < self.total_steps:
            count = self.feedback.count(due, self.total_steps, asked)
            steps = self.steps(count, first=not sessions)
            if due + steps > self.total_steps:
                break
            sessions.append((due, count))
            asked += count
            due = max(due + self.feedback.every, due + steps)
        return sessions

    def select(self, first: bool, outstanding: int = 0) -> Query:
        """This session's questions; updaters that want fresh pairs get the present policy rolled out before.

        Those about everything kept come first, then those about the present policy: its fresh steps and branches.
        The first session, and those after it until one has an answer, ask about everything seen so far (`first`), or
        the last `query.recent_episodes` of it: before any reward there is no policy to be fresh about, what pretraining
        has visited covers more, and a rule could only choose by a reward that knows nothing yet. So does a later one if
        no segment fits into its fresh steps because an episode ended within them.
        """
        parts, session, feedback = self.parts, self.session, self.feedback
        count = self.count(parts.agent.num_timesteps) - outstanding
        fresh = parts.updater.pairs == "fresh" and not first
        if fresh:
            steps = feedback.fresh_steps
            session.collect_fresh(2 * count * self.segment_length if steps is None else steps)
            wide = self.segment_length + 2 * parts.updater.margin
            fresh = len(parts.rollouts.starts(wide, session.fresh_from)) > 0
        rule = Uniform() if first and not parts.query.from_the_start else parts.query
        branched = round(parts.query.branch_share * count)
        about_fresh = round(feedback.fresh_share * (count - branched)) if fresh else 0
        parts_of = ((count - branched - about_fresh, 0, False), (about_fresh, session.fresh_from, True))
        questions = [self._choose(rule, number, since, new) for number, since, new in parts_of if number]
        if branched:
            branches = session.branch_query(branched, self.segment_length, self.rng, parts.updater.margin)
            questions.append(_marked(branches, True))
        return Query.cat(questions)

    def _choose(self, rule: QueryRule, count: int, since: int, fresh: bool) -> Query:
        """`count` questions about what happened from step index `since` on: the most novel ones, the rule's among the
        most rewarded, then its others."""
        parts, episodes = self.parts, self.parts.query.recent_episodes
        length, margin, other_since = self.segment_length, parts.updater.margin, None
        if episodes is not None:
            other_since = since if parts.query.against_kept else None
            since = max(since, parts.rollouts.since_episodes(episodes, length + 2 * margin))
        own = episodes is not None and len(parts.rollouts.starts(length + 2 * margin, since, own=True)) > 0
        candidates = parts.rollouts.query(count * rule.pool, length, self.rng, since, margin, other_since, own)
        picks, left = np.empty(0, np.int64), np.arange(len(candidates))

        def by_rule(among: np.ndarray, number: int) -> np.ndarray:
            chosen = np.asarray(rule(candidates[among], number, parts.reward, parts.preferences, self.rng))
            _check_picks(chosen, number, len(among), rule)
            return among[chosen]

        if len(parts.preferences):  # before, nothing is known that could be novel, and the reward knows nothing
            if rule.novel_share:
                picks = most_novel(candidates, parts.preferences, round(rule.novel_share * count))
                left = np.setdiff1d(left, picks)
            best = round(rule.best_share * (count - len(picks)))
            if best:
                among = left[most_rewarded(candidates[left], parts.reward, best)]
                picks = np.concatenate([picks, by_rule(among, best)])
                left = np.setdiff1d(left, picks)
        return _marked(candidates[np.concatenate([picks, by_rule(left, count - len(picks))])], fresh)


def _check_picks(picks: np.ndarray, number: int, candidates: int, rule: QueryRule) -> None:
    """Refuse other picks of a query rule than so many different candidates.

    Raises:
        ValueError: naming the rule.
    """
    if picks.shape != (number,):
        found = f"of shape {list(picks.shape)}"
    elif number and not np.issubdtype(picks.dtype, np.integer):
        found = f"of {picks.dtype}"
    elif len(np.unique(picks)) < number:
        found = "some of them twice"
    elif number and not (picks.min() >= 0 and picks.max() < candidates):
        found = f"from {picks.min()} to {picks.max()}"
    else:
        return
    raise ValueError(
        f"query {name_of(rule)} returned indices {found}; expected {number} different ones from 0 to {candidates - 1}"
    )


def _marked(query: Query, fresh: bool) -> Query:
    return replace(query, fresh=torch.full((len(query),), fresh))
