"""Callables that answer pair by pair: what they have said is kept, whatever happens next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbrl.asking import AnswerJournal, TeacherError, ask
from pbrl.interfaces import as_teacher
from pbrl.types import Query
from tests.test_labelling import recorded as make_query


class OneByOne:
    """Answers pair by pair, as a person at a terminal does, and is killed at one of them."""

    def __init__(self, killed_at: int) -> None:
        self.killed_at, self.asked = killed_at, 0

    def __call__(self, query: Query) -> Any:
        for _ in range(len(query)):
            if self.asked == self.killed_at:
                raise RuntimeError("the teacher went home")
            self.asked += 1
            yield None if self.asked == 2 else self.asked / 10

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


@pytest.mark.parametrize("killed_at", [0, 1, 3, 4])
def test_answers_given_one_by_one_are_kept_one_by_one(tmp_path: Path, killed_at: int) -> None:
    query, path = make_query(5), tmp_path / "answers.jsonl"
    journal = AnswerJournal(path)
    with pytest.raises(TeacherError, match=f"failed on pair {killed_at} of 5: the teacher went home"):
        ask(as_teacher(OneByOne(killed_at)), query, journal)
    assert path.read_text().count("\n") == killed_at
    assert journal.position == 0, "a checkpoint written now must not pass over them"
    again = OneByOne(99)
    for _ in range(2):  # the second time all are in the journal
        answer = ask(as_teacher(again), query, AnswerJournal(path))
        assert answer.prefers_first.tolist() == pytest.approx([0.1, 0.5, 0.3, 0.4, 0.5])
        assert answer.given.tolist() == [True, False, True, True, True] and again.asked == 5
    assert path.read_text().count("\n") == 5


def test_labels_may_be_numpys(tmp_path: Path) -> None:
    labels = [np.float64(1.0), np.float32(0.5), np.int64(0), 1]
    answer = ask(as_teacher(lambda query: (label for label in labels)), make_query(4), AnswerJournal(tmp_path / "j"))
    assert answer.prefers_first.tolist() == [1, 0.5, 0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0], "yielded 1 labels to 2 pairs"),
        ([2.0, 0.0], "yielded 2.0"),
        ([True, 0.0], "yielded True"),
        ([float("nan"), 0.0], "yielded nan"),
        ([np.float32("nan"), 0.0], "yielded .*nan"),
    ],
)
def test_a_generator_that_yields_nonsense_is_named(tmp_path: Path, labels: list[float], message: str) -> None:
    def teacher(query: Query) -> Any:
        yield from labels

    with pytest.raises(TeacherError, match=message):
        ask(as_teacher(teacher), make_query(2), AnswerJournal(tmp_path / "answers.jsonl"))
