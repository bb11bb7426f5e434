"""A session's questions are put to the teacher, and what came back is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pbrl.asking import TeacherError, ask, check_answer, state_of
from pbrl.interfaces import name_of
from pbrl.parts import Parts
from pbrl.questions import Questions
from pbrl.records.diary import Diary
from pbrl.records.evaluation import reward_health
from pbrl.types import Answer, Query


class BrokenOff(Exception):
    """The run was asked to stop while questions were open; they are kept, and will be asked again."""


class Dialogue:
    """Asks the teacher and hands the answers to the preferences.

    Args:
        parts: the run's. questions: selects them. diary: hears of the answered pairs.
        stop: whether the run is to stop. on_asking: hears when the teacher is busy, see `pbrl.asking.ask`.
    """

    def __init__(
        self,
        parts: Parts,
        questions: Questions,
        diary: Diary,
        stop: Callable[[], bool],
        on_asking: Callable[[bool], None],
    ) -> None:
        self.parts, self.questions, self.diary, self.stop, self.on_asking = parts, questions, diary, stop, on_asking
        self.pending: Query | None = None  # selected, not yet answered
        self.outstanding: Query | None = None  # asked of a teacher for whom training does not wait

    def session(self, number: int, step: int, first: bool) -> dict[str, float]:
        """What the session with this number, counted from 0, asks and gets to know; its metrics.

        `first`: no reward was learned yet (see `Questions.select`).

        Raises:
            BrokenOff, TeacherError: the teacher is as before; `pending` holds the questions.
            ValueError: if what the teacher remembers cannot be stored; it has not been asked.
        """
        self.parts.preferences.begin_session()  # one in which nobody answers has nothing new
        if not self.questions.left:  # imported answers may have used the budget up
            return {}
        return self._ask_and_wait(number, first) if self.parts.teacher.wait else self._exchange(number, step, first)

    def _ask_and_wait(self, number: int, first: bool) -> dict[str, float]:
        if self.pending is None:
            self.pending = self.questions.select(first)
        metrics = self._take_in(self.pending, self._ask(self.pending), number)
        self.pending = None
        return metrics

    def _exchange(self, number: int, step: int, first: bool) -> dict[str, float]:
        """Take in what was answered since the last session, and ask anew: training does not wait for the answers."""
        teacher, open_pairs = self.parts.teacher, self.outstanding
        metrics: dict[str, float] = {}
        if open_pairs is not None:
            done, answer = teacher.collect(open_pairs, number, step)
            if done.any():
                answered = replace(open_pairs[done.nonzero()[:, 0]], fresh=None)  # the policy has moved on since
                check_answer(answer, answered, name_of(teacher))
                metrics |= self._take_in(answered, answer, number)
                rest = (~done).nonzero()[:, 0]
                open_pairs = open_pairs[rest] if len(rest) else None
        left = 0 if open_pairs is None else len(open_pairs)
        if self.questions.count(step) > left:
            new = self.questions.select(first, left)
            open_pairs = new if open_pairs is None else Query.cat([open_pairs, new])
        self.outstanding = open_pairs
        if open_pairs is not None:
            teacher.post(open_pairs)
        return {**metrics, "feedback/outstanding": 0.0 if open_pairs is None else float(len(open_pairs))}

    def _ask(self, query: Query) -> Answer:
        teacher = self.parts.teacher
        if self.stop():
            raise BrokenOff
        before = state_of(teacher)
        try:
            return ask(teacher, query, self.parts.journal, self.on_asking)
        except (TeacherError, KeyboardInterrupt) as error:
            if before is not None:
                teacher.load_state_dict(before)  # it may have drawn random numbers before it failed
            if isinstance(error, KeyboardInterrupt):
                raise BrokenOff from error
            raise

    def _take_in(self, query: Query, answer: Answer, number: int) -> dict[str, float]:
        """Keep the answered pairs; returns how well the reward predicted them."""
        metrics = reward_health(self.parts.reward, query, answer)
        self.diary.pairs(query, answer, number + 1)
        self.parts.preferences.add(query, answer, number)
        return metrics
