"""Putting a query to a teacher: the answer is checked, and written down before anything else happens to it.

A person's or a paid judge's answer must survive a crash. `ask` therefore appends it to a journal, one line per query,
flushed to the disk; after a resume the same query is answered from the journal and the teacher is not asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import numbers
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pbrl.files import open_in_place, write_all
from pbrl.interfaces import name_of
from pbrl.types import Answer, Query, Teacher

JOURNAL_BYTES = 2**30  # that are read
ROOM, ROOM_PER_PAIR = 16_384, 64  # bytes of a line: key and teacher's state; one label


class TeacherError(RuntimeError):
    """A teacher failed or answered something that is not an answer; the message names it and the pair."""


def ask(
    teacher: Teacher, query: Query, journal: AnswerJournal, on_asking: Callable[[bool], None] = lambda asking: None
) -> Answer:
    """The teacher's answer to the query, checked and in the journal when this returns.

    `on_asking` hears when the teacher is busy: only then may the caller interrupt without losing an answer. The room
    that the answer needs on the disk is taken before the teacher is asked.

    If the journal holds the answer already (the run was killed after it), it is returned, the teacher's state
    after it is restored, and the teacher is not asked. Labels of skipped pairs are returned as 0.5. A `durable`
    teacher keeps what is as good as a journal. A teacher that is a generator yields one label a pair (None: skipped);
    each is in the journal, as the answer to a query of one pair, before the next is asked for.

    Raises:
        TeacherError: if the teacher raises (the original is its `__cause__`) or its answer is malformed.
        OSError: if there is no room to write the answer down; the teacher has not been asked then.
    """
    name = name_of(teacher)
    if teacher.durable:
        return _answered(teacher, query, on_asking, name)
    begin, pieces, asked = journal.position, [], 0
    while asked < len(query) and (known := journal.recall(query[asked:]) or journal.recall(query[asked : asked + 1])):
        piece, state = known
        if state is not None:
            _take_over(teacher, state, journal, name)
        pieces.append(piece)
        asked += len(piece)
    try:
        if asked < len(query):
            pieces.append(_ask(teacher, query[asked:], journal, on_asking, name))
    except BaseException:
        journal.position = begin  # what was given one by one is recalled when the query is put again
        raise
    return _joined(pieces)


def _ask(
    teacher: Teacher, query: Query, journal: AnswerJournal, on_asking: Callable[[bool], None], name: str
) -> Answer:
    """The answer of a teacher who must really be asked, written down."""
    with journal.room_for(query):
        answer = _answered(teacher, query, on_asking, name)
        if isinstance(answer, Answer):
            _write_down(teacher, query, answer, journal)
            return answer
    pieces: list[Answer] = []
    with contextlib.closing(answer), journal.room_for(query, len(query)):
        for pair in range(len(query)):
            hears = (lambda asking: None) if teacher.at_hand else on_asking
            pieces.append(_next_answer(answer, pair, len(query), hears, name))
            _write_down(teacher, query[pair : pair + 1], pieces[-1], journal)
    return _joined(pieces)


def _take_over(teacher: Teacher, state: dict[str, Any], journal: AnswerJournal, name: str) -> None:
    try:
        teacher.load_state_dict(state)
    except Exception as error:  # whatever a user's own part raises
        raise TeacherError(f"teacher {name} cannot go on from its state in {journal.path}: {error}") from error


def state_of(teacher: Teacher) -> dict[str, Any] | None:
    """What the teacher remembers, as it comes back from a file: a copy, also of lists that grow while it answers.

    Raises:
        ValueError: naming the teacher, if that is not plain JSON.
    """
    try:
        state: dict[str, Any] | None = json.loads(json.dumps(teacher.state_dict(), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"state_dict() of teacher {name_of(teacher)} is not plain JSON: {error}; expected numbers, texts, lists "
            "and tables of them (tensor.tolist() makes one)"
        ) from error
    return state


def _write_down(teacher: Teacher, query: Query, answer: Answer, journal: AnswerJournal) -> None:
    try:
        state = state_of(teacher)
    except ValueError as error:
        journal.append(query, answer, None)  # the answer at least is kept
        raise TeacherError(str(error)) from error
    journal.append(query, answer, state)


def _answered(teacher: Teacher, query: Query, on_asking: Callable[[bool], None], name: str) -> Any:
    """The teacher's checked answer, labels of skipped pairs 0.5; or the generator that will give it."""
    try:
        on_asking(True)
        answer: Any = teacher(query)
    except Exception as error:
        raise TeacherError(f"teacher {name} failed on a query of {len(query)} pairs: {error}") from error
    finally:
        on_asking(False)
    if isinstance(answer, Generator) and not teacher.durable:
        return answer
    check_answer(answer, query, name)
    given = answer.given.cpu()
    return Answer(answer.prefers_first.detach().cpu().where(given, torch.tensor(0.5)), given)


def _next_answer(labels: Any, pair: int, pairs: int, on_asking: Callable[[bool], None], name: str) -> Answer:
    """The next label of a generator, as the answer to one pair."""
    try:
        on_asking(True)
        label = next(labels)
    except StopIteration:
        raise TeacherError(f"teacher {name} yielded {pair} labels to {pairs} pairs") from None
    except Exception as error:
        raise TeacherError(f"teacher {name} failed on pair {pair} of {pairs}: {error}") from error
    finally:
        on_asking(False)
    is_number = isinstance(label, numbers.Real) and not isinstance(label, bool)  # numpy's scalars too
    if label is not None and not (is_number and 0 <= label <= 1):
        raise TeacherError(
            f"teacher {name} yielded {label!r} for pair {pair}; expected a number in [0, 1] "
            "(1 first, 0 second, 0.5 equally good), or None to skip the pair"
        )
    return Answer(torch.tensor([0.5 if label is None else float(label)]), torch.tensor([label is not None]))


def _joined(pieces: list[Answer]) -> Answer:
    if len(pieces) == 1:
        return pieces[0]
    return Answer(torch.cat([p.prefers_first for p in pieces]), torch.cat([p.given for p in pieces]))


def check_answer(answer: Any, query: Query, teacher: str) -> None:
    """Raise a TeacherError naming the teacher, what is wrong and the first pair it is wrong for.

    Labels of skipped pairs may be anything, NaN included.
    """
    if not isinstance(answer, Answer):
        raise TeacherError(f"teacher {teacher} returned a {type(answer).__name__}; expected a pbrl.types.Answer")
    for name, dtype in (("prefers_first", torch.float32), ("given", torch.bool)):
        value = getattr(answer, name)
        if not isinstance(value, torch.Tensor):
            raise TeacherError(f"teacher {teacher}: {name} is a {type(value).__name__}; expected a tensor of {dtype}")
        if value.dtype != dtype:
            raise TeacherError(f"teacher {teacher}: {name} has dtype {value.dtype}; expected {dtype}")
        if value.shape != (len(query),):
            raise TeacherError(f"teacher {teacher}: {name} has shape {list(value.shape)}; expected [{len(query)}]")
    labels = answer.prefers_first
    wrong = answer.given & ~((labels >= 0) & (labels <= 1))  # NaN is wrong too
    if wrong.any():
        pair = int(wrong.int().argmax())
        raise TeacherError(
            f"teacher {teacher}: prefers_first of pair {pair} is {labels[pair]:g}; expected a value in [0, 1] "
            "(1 first, 0 second, 0.5 equally good), or given=False to skip the pair"
        )


def fingerprint(query: Query) -> str:
    """SHA-256 over the shapes and bytes of both segments of all pairs."""
    digest = hashlib.sha256()
    for side in (query.first, query.second):
        for tensor in (side.obs, side.actions):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class AnswerJournal:
    """Answers in the order given, one JSON line per query, each on the disk before `append` returns.

    Args:
        path: the file; created if missing. A last line torn by a crash is cut off.
        position: lines to pass over, those whose answers the checkpoint already holds. A run saves `position` in
            its checkpoint; leaving it 0 is also right unless a run asks the very same query twice.

    Raises:
        ValueError: if a line other than the last is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], position: int = 0) -> None:
        self.path = Path(path)
        with open_in_place(self.path) as file:
            self._entries = _intact_lines(file)
            self._end = file.seek(0, os.SEEK_END)  # of the last intact line
        self.position = min(position, len(self._entries))

    def recall(self, query: Query) -> tuple[Answer, dict[str, Any] | None] | None:
        """The recorded answer to this query and the teacher's state after it, or None. Each line is used once."""
        if self.position == len(self._entries):
            return None
        key = fingerprint(query)
        for index in range(self.position, len(self._entries)):
            entry = self._entries[index]
            if entry["query"] == key:
                self.position = index + 1
                try:
                    labels = torch.tensor(entry["prefers_first"], dtype=torch.float32)
                    answer = Answer(labels, torch.tensor(entry["given"], dtype=torch.bool))
                except (TypeError, ValueError, RuntimeError) as error:
                    raise TeacherError(f"{self.path}: line {index + 1} holds no answer: {error}") from error
                check_answer(answer, query, f"recorded in {self.path}")
                return answer, entry["teacher"]
        return None

    @contextlib.contextmanager
    def room_for(self, query: Query, lines: int = 1) -> Iterator[None]:
        """Within the block the disk has room for the answer to this query, in `lines` lines: no full disk can lose it.

        The room is zeros at the end of the file; those of a killed run are cut off like a torn line.
        """
        try:
            self._write(b"\0" * (ROOM * lines + ROOM_PER_PAIR * len(query)))
            yield
        finally:
            with open_in_place(self.path) as file:
                file.truncate(self._end)

    def _write(self, data: bytes) -> None:
        """Put data behind the last line, durably."""
        with open_in_place(self.path) as file:
            file.seek(self._end)
            write_all(file, data)
            os.fsync(file.fileno())

    def append(self, query: Query, answer: Answer, state: dict[str, Any] | None) -> None:
        """Write down one answer. It is on the disk when this returns."""
        entry = {
            "query": fingerprint(query),
            "prefers_first": answer.prefers_first.tolist(),
            "given": answer.given.tolist(),
            "teacher": state,
        }
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        self._write(line)
        self._end += len(line)
        self._entries.append(entry)
        self.position = len(self._entries)


def _intact_lines(file: BinaryIO) -> list[dict[str, Any]]:
    """The journal's entries; a torn last line is removed from the file."""
    content = file.read(JOURNAL_BYTES + 1)
    if len(content) > JOURNAL_BYTES:
        raise ValueError(f"{file.name} has more than {JOURNAL_BYTES} bytes")
    entries, intact = [], 0
    for line in io.BytesIO(content):
        entry = _entry(line)
        if entry is None:
            break
        entries.append(entry)
        intact += len(line)
    if b"\n" in content[intact:-1]:
        raise ValueError(f"{file.name}: line {len(entries) + 1} is damaged, and it is not the last; restore the file")
    if intact < len(content):
        file.truncate(intact)
        os.fsync(file.fileno())
    return entries


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry of one line, or None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    keys = {"query", "prefers_first", "given", "teacher"}
    return entry if isinstance(entry, dict) and entry.keys() == keys else None
