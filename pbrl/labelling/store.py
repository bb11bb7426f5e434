"""Questions to people and their answers, in one SQLite file: every change is on the disk when the call returns.

A *question* is a pair of segments; it is *open* while people are asked it, *complete* with `reviews` answers, and
*used* once training has taken its label: then nobody can change it any more. A rater holds a *lease* on the question
on his screen, so that one pair is handed to one person at a time. A *repeat* shows a rater a pair again that he has
answered, sides swapped; it measures him and never reaches the label.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbrl.files import printable, refuse_foreign

FILE_NAME = "labelling.sqlite3"  # inside a run directory
NAME = re.compile(r"[\w][\w .@-]{0,39}")  # of a rater
LONGEST = 3600.0  # seconds that one answer is counted to have taken at most

SCHEMA = """
CREATE TABLE IF NOT EXISTS question (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,      -- SHA-256 of both segments
    clips BLOB NOT NULL,           -- what is needed to draw it, see pbrl.labelling.drawing
    returns TEXT,                  -- JSON [first, second]: the task's own, for statistics only; never shown
    asked REAL NOT NULL,           -- seconds since 1970, as all times here
    open INTEGER NOT NULL,
    session INTEGER, step INTEGER, -- where training used it; NULL: not yet
    label REAL                     -- used: share that prefers the first; NULL: skipped
);
CREATE TABLE IF NOT EXISTS answer (
    id TEXT PRIMARY KEY,           -- chosen by the page, so that one sent twice counts once
    question INTEGER NOT NULL REFERENCES question(id),
    rater TEXT NOT NULL,
    label REAL,                    -- 1 first, 0 second, 0.5 equally good, NULL skipped
    repeat INTEGER NOT NULL,
    seconds REAL NOT NULL,
    given REAL NOT NULL,
    undone REAL
);
CREATE UNIQUE INDEX IF NOT EXISTS once ON answer(question, rater, repeat) WHERE undone IS NULL;
CREATE TABLE IF NOT EXISTS lease (rater TEXT PRIMARY KEY, question INTEGER NOT NULL, repeat INTEGER, until REAL);
CREATE TABLE IF NOT EXISTS intake (session INTEGER PRIMARY KEY, step INTEGER);
"""
UNSOUND = (  # rows that nothing here writes: SQLite keeps any value in any column
    "SELECT 'question ' || id FROM question WHERE typeof(key) != 'text' OR typeof(clips) != 'blob'"
    " OR typeof(asked) != 'real' OR open NOT IN (0, 1) OR typeof(session) NOT IN ('integer', 'null')"
    " OR typeof(step) NOT IN ('integer', 'null') OR (session IS NULL) != (step IS NULL)"
    " OR typeof(label) NOT IN ('real', 'null') OR NOT coalesce(label, 0) BETWEEN 0 AND 1"
    " OR typeof(returns) NOT IN ('text', 'null')",
    "SELECT 'an answer' FROM answer WHERE typeof(id) != 'text' OR typeof(rater) != 'text'"
    " OR question NOT IN (SELECT id FROM question) OR typeof(label) NOT IN ('real', 'null')"
    " OR coalesce(label, 0) NOT IN (0, 0.5, 1) OR repeat NOT IN (0, 1) OR typeof(seconds) != 'real'"
    f" OR NOT seconds BETWEEN 0 AND {LONGEST} OR typeof(given) != 'real' OR typeof(undone) NOT IN ('real', 'null')",
    "SELECT 'a lease' FROM lease WHERE typeof(rater) != 'text' OR question NOT IN (SELECT id FROM question)"
    " OR repeat NOT IN (0, 1) OR typeof(until) NOT IN ('real', 'integer')",
    "SELECT 'an intake' FROM intake WHERE typeof(step) != 'integer'",
)
STANDING = "SELECT count(*) FROM answer a WHERE a.question = q.id AND a.repeat = 0 AND a.undone IS NULL"


class Refused(Exception):
    """An answer that cannot be accepted; the message says why, for the person who gave it."""


@dataclass(frozen=True)
class Pair:
    """One question as training knows it."""

    key: str
    clips: bytes
    returns: tuple[float, float] | None = None


@dataclass(frozen=True)
class Shown:
    """What a rater is shown."""

    question: int
    repeat: bool  # sides swapped


@dataclass(frozen=True)
class Taken:
    """A used question: its label (None: skipped)."""

    key: str
    label: float | None


class LabelStore:
    """The store; several processes and threads may have it open.

    Args:
        path: the SQLite file; created if missing.
        reviews: answers by different people that complete a question.
        lease: seconds for which a question stays with the person to whom it was handed.
        repeats: share of a rater's answers after which one is asked again with sides swapped, in [0, 1).
        clock: seconds since 1970.

    Raises:
        ValueError: if the file is there and is not such a store, or a number is out of range.
        OSError: if it is a link or cannot be opened. Every method: if the file cannot be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reviews: int = 1,
        lease: float = 120.0,
        repeats: float = 0.05,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if reviews < 1 or lease <= 0 or not 0 <= repeats < 1:
            raise ValueError(
                f"reviews={reviews}, lease={lease}, repeats={repeats}: expected at least 1 answer a pair, a positive "
                "number of seconds and a share in [0, 1)"
            )
        self.path, self.reviews, self.lease, self.repeats, self.clock = Path(path), reviews, lease, repeats, clock
        self._lock = threading.Lock()
        for suffix in ("", "-wal", "-shm", "-journal"):  # SQLite would write through a link
            refuse_foreign(Path(f"{path}{suffix}"))
        with self._plain_errors():
            self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA trusted_schema=OFF")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # a committed answer has reached the disk
            self._db.executescript(SCHEMA)
            self._check()
        except (sqlite3.Error, ValueError) as error:
            self._db.close()
            raise ValueError(f"{path} is not a store of labels: {printable(error)}") from error

    def _check(self) -> None:
        """Refuse a store that somebody else has written, by what is wrong with it."""
        with contextlib.closing(sqlite3.connect(":memory:")) as ours:
            ours.executescript(SCHEMA)
            if strange := _made(self._db) - _made(ours):
                raise ValueError(f"its {' '.join(min(strange)[:2])} was not made here")
        for query in UNSOUND:
            if found := self._db.execute(query + " LIMIT 1").fetchone():
                raise ValueError(f"{found[0]} is damaged")
        for (rater,) in self._db.execute("SELECT rater FROM answer UNION SELECT rater FROM lease"):
            if not NAME.fullmatch(rater):
                raise ValueError(f"{rater!r} is no name of a rater")
        for (returns,) in self._db.execute("SELECT returns FROM question WHERE returns IS NOT NULL"):
            try:
                first, second = json.loads(returns)
                sound = math.isfinite(first + second)
            except (TypeError, ValueError, RecursionError):
                sound = False
            if not sound:
                raise ValueError(f"{returns[:40]!r} are no returns")

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and nobody else writes meanwhile."""
        with self._plain_errors(), self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """SQLite's errors (a full disk, a damaged file) are those of files in general."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {printable(error)}") from error

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._plain_errors(), self._lock:
            return self._db.execute(query, values).fetchall()

    # ------------------------------------------------------------------------------------------------ training's side

    def post(self, pairs: Sequence[Pair]) -> None:
        """These, and no others, are asked from now on; what is used already stays as it is."""
        with self._transaction() as db:
            db.execute("UPDATE question SET open = 0 WHERE session IS NULL")
            for pair in pairs:
                returns = None if pair.returns is None else json.dumps(pair.returns)
                db.execute(
                    "INSERT OR IGNORE INTO question (key, clips, returns, asked, open) VALUES (?, ?, ?, ?, 0)",
                    (pair.key, pair.clips, returns, self.clock()),
                )
                db.execute("UPDATE question SET open = 1 WHERE key = ? AND session IS NULL", (pair.key,))

    def use(self, keys: Sequence[str], session: int, step: int, pause: float = 0.0) -> list[Taken] | None:
        """The labels of these questions once all are complete, in the given order; None before.

        Args:
            pause: seconds since the last answer for which its giver may still undo it.
        """
        with self._transaction() as db:
            rows = [self._standing(db, key) for key in keys]
            if not all(row["used"] or row["answers"] >= self.reviews for row in rows):
                return None
            fresh = [row for row in rows if not row["used"]]
            if fresh and self.clock() < max(row["given"] for row in fresh) + pause:
                return None
            for row in fresh:
                self._freeze(db, row, session, step)
            return [Taken(row["key"], row["label"]) for row in rows]

    def take(self, keys: Sequence[str], session: int, step: int) -> list[Taken]:
        """Of these questions the complete ones, which are used from now on.

        The first call for a session decides which they are; a later one (a resumed run comes by again) gets the same.
        """
        with self._transaction() as db:
            known = db.execute("SELECT 1 FROM intake WHERE session = ?", (session,)).fetchone()
            taken = []
            for key in dict.fromkeys(keys):
                row = self._standing(db, key)
                if not known and not row["used"] and row["answers"] >= self.reviews:
                    self._freeze(db, row, session, step)
                    row["session"] = session
                if row["session"] is not None and row["session"] <= session:
                    taken.append(Taken(key, row["label"]))
            db.execute("INSERT OR IGNORE INTO intake VALUES (?, ?)", (session, step))
            return taken

    def _standing(self, db: sqlite3.Connection, key: str) -> dict[str, Any]:
        """A question with the label that it has now."""
        found = db.execute("SELECT id, session, label FROM question WHERE key = ?", (key,)).fetchone()
        if found is None:
            raise KeyError(f"question {key} was never posted")
        number, session, label = found
        row = {"id": number, "key": key, "session": session, "label": label, "used": session is not None}
        if session is None:
            answers = db.execute(
                "SELECT label, given FROM answer WHERE question = ? AND repeat = 0 AND undone IS NULL", (number,)
            ).fetchall()
            labels = [value for value, _ in answers if value is not None]
            row["label"] = statistics.fmean(labels) if labels else None
            row["answers"], row["given"] = len(answers), max((given for _, given in answers), default=0.0)
        return row

    def _freeze(self, db: sqlite3.Connection, row: dict[str, Any], session: int, step: int) -> None:
        db.execute(
            "UPDATE question SET open = 0, session = ?, step = ?, label = ? WHERE id = ?",
            (session, step, row["label"], row["id"]),
        )
        db.execute("DELETE FROM lease WHERE question = ? AND NOT repeat", (row["id"],))

    # ------------------------------------------------------------------------------------------------ the raters' side

    def next(self, rater: str) -> Shown | None:
        """What to show this rater now, leased to him; None: nothing.

        The same again until he answers or, his lease over, somebody else is handed it: asking again prolongs no lease,
        as a page that is left open asks for ever.

        Raises:
            Refused: for a name that is none.
        """
        _check_name(rater)
        with self._transaction() as db:
            now = self.clock()
            held = db.execute("SELECT question, repeat, until FROM lease WHERE rater = ?", (rater,)).fetchone()
            if held is not None:
                shown = Shown(held[0], bool(held[1]))
                if self._may(db, rater, shown, now):
                    return shown
            found = db.execute(
                f"SELECT q.id FROM question q WHERE q.open AND ({STANDING})"
                " + (SELECT count(*) FROM lease l WHERE l.question = q.id AND NOT l.repeat AND l.until > ?"
                "    AND l.rater != ? AND NOT EXISTS (SELECT 1 FROM answer a WHERE a.question = q.id"
                "                    AND a.rater = l.rater AND a.repeat = 0 AND a.undone IS NULL)) < ?"
                " AND NOT EXISTS (SELECT 1 FROM answer a WHERE a.question = q.id AND a.rater = ? AND a.repeat = 0"
                "                 AND a.undone IS NULL) ORDER BY q.id LIMIT 1",
                (now, rater, self.reviews, rater),
            ).fetchone()
            if found is None:
                db.execute("DELETE FROM lease WHERE rater = ?", (rater,))
                return None
            return self._hand(db, rater, self._repeat(db, rater) or Shown(found[0], False), now)

    def _may(self, db: sqlite3.Connection, rater: str, shown: Shown, now: float) -> bool:
        """Whether a question that this rater was handed is still his to answer."""
        if shown.repeat:
            return True
        is_open, answers = db.execute(
            f"SELECT q.open, ({STANDING}) FROM question q WHERE q.id = ?", (shown.question,)
        ).fetchone()
        others = db.execute(
            "SELECT count(*) FROM lease WHERE question = ? AND NOT repeat AND until > ? AND rater != ?",
            (shown.question, now, rater),
        ).fetchone()[0]
        return bool(is_open) and answers + others < self.reviews

    def _hand(self, db: sqlite3.Connection, rater: str, shown: Shown, now: float) -> Shown:
        db.execute(
            "INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?)",
            (rater, shown.question, shown.repeat, now + self.lease),
        )
        return shown

    def _repeat(self, db: sqlite3.Connection, rater: str) -> Shown | None:
        """The pair that this rater is due to see again, if any: his longest ago, not skipped, not yet repeated."""
        first, repeated = db.execute(
            "SELECT coalesce(sum(repeat = 0), 0), coalesce(sum(repeat), 0) FROM answer"
            " WHERE rater = ? AND undone IS NULL",
            (rater,),
        ).fetchone()
        if int(first * self.repeats + 1e-9) <= repeated:
            return None
        found = db.execute(
            "SELECT a.question FROM answer a WHERE a.rater = ? AND a.repeat = 0 AND a.undone IS NULL"
            " AND a.label IS NOT NULL AND NOT EXISTS (SELECT 1 FROM answer b WHERE b.question = a.question"
            " AND b.rater = a.rater AND b.repeat AND b.undone IS NULL) ORDER BY a.given LIMIT 1",
            (rater,),
        ).fetchone()
        return None if found is None else Shown(found[0], True)

    def answer(self, name: str, rater: str, shown: Shown, label: float | None, seconds: float) -> None:
        """Write down one answer, once however often it is sent under this name.

        Args:
            label: of what was shown: 1 the left one is better, 0 the right one, 0.5 equally good, None: skipped.
            seconds: that the rater took.

        Raises:
            Refused: if nobody asks this any more, or somebody else or the rater himself has answered it.
        """
        _check_name(rater)
        if shown.repeat and label is not None:
            label = 1.0 - label
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM answer WHERE id = ?", (name,)).fetchone():
                return
            found = db.execute(
                f"SELECT q.open, ({STANDING}) FROM question q WHERE q.id = ?", (shown.question,)
            ).fetchone()
            mine = db.execute(
                "SELECT count(*) FROM answer WHERE question = ? AND rater = ? AND repeat = ? AND undone IS NULL",
                (shown.question, rater, shown.repeat),
            ).fetchone()[0]
            handed = db.execute(
                "SELECT count(*) FROM lease WHERE question = ? AND rater = ? AND repeat = ?",
                (shown.question, rater, shown.repeat),
            ).fetchone()[0]
            if found is None:
                raise Refused("there is no such pair")
            if mine:
                raise Refused("you have answered this pair; undo it first to change the answer")
            if shown.repeat and not handed:
                raise Refused("this pair is not shown to you again")
            if not shown.repeat and (not found[0] or found[1] >= self.reviews):
                raise Refused("this pair is no longer asked: it was answered or withdrawn")
            db.execute(
                "INSERT INTO answer VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    name,
                    shown.question,
                    rater,
                    label,
                    shown.repeat,
                    min(max(seconds, 0.0), LONGEST),
                    self.clock(),
                ),
            )
            db.execute("DELETE FROM lease WHERE rater = ?", (rater,))

    def last(self, rater: str) -> str | None:
        """The name of this rater's last answer, if it may be undone: its question is not used yet."""
        found = self._all(
            "SELECT a.id, q.open, a.repeat FROM answer a JOIN question q ON q.id = a.question"
            " WHERE a.rater = ? AND a.undone IS NULL ORDER BY a.given DESC, a.rowid DESC LIMIT 1",
            rater,
        )
        return str(found[0][0]) if found and (found[0][1] or found[0][2]) else None

    def undo(self, rater: str, name: str) -> None:
        """Take an answer back, once however often this is sent; the rater is handed its pair again.

        Raises:
            Refused: if it is not this rater's, or training has used it.
        """
        _check_name(rater)
        with self._transaction() as db:
            found = db.execute(
                "SELECT a.question, a.repeat, a.undone, q.open FROM answer a JOIN question q ON q.id = a.question"
                " WHERE a.id = ? AND a.rater = ?",
                (name, rater),
            ).fetchone()
            if found is None:
                raise Refused("you have given no such answer")
            question, repeat, undone, is_open = found
            if undone is not None:
                return
            if not is_open and not repeat:
                raise Refused("this answer is in use already")
            db.execute("UPDATE answer SET undone = ? WHERE id = ?", (self.clock(), name))
            self._hand(db, rater, Shown(question, bool(repeat)), self.clock())

    # ------------------------------------------------------------------------------------------------ looking

    def clips(self, question: int) -> bytes | None:
        """What is needed to draw a question, or None if there is none of this number."""
        found = self._all("SELECT clips FROM question WHERE id = ?", question)
        return bytes(found[0][0]) if found else None

    def waiting(self, count: int) -> list[int]:
        """The first `count` open questions without all their answers."""
        rows = self._all(
            f"SELECT q.id FROM question q WHERE q.open AND ({STANDING}) < ? ORDER BY q.id LIMIT ?", self.reviews, count
        )
        return [row[0] for row in rows]

    def finished(self, keys: Sequence[str], pause: float) -> int:
        """How many of these questions are used, or complete since at least `pause` seconds."""
        with self._transaction() as db:
            rows = [self._standing(db, key) for key in dict.fromkeys(keys)]
        before = self.clock() - pause
        return sum(row["used"] or (row["answers"] >= self.reviews and row["given"] <= before) for row in rows)

    def progress(self, rater: str) -> dict[str, int]:
        """`open`: questions asked now; `complete`: of them, those with all answers; `mine`: answers of this rater."""
        complete = f"coalesce(sum(({STANDING}) >= ?), 0)"
        total, done = self._all(f"SELECT count(*), {complete} FROM question q WHERE q.open", self.reviews)[0]
        mine = self._all("SELECT count(*) FROM answer WHERE rater = ? AND repeat = 0 AND undone IS NULL", rater)[0][0]
        return {"open": total, "complete": done, "mine": mine}

    def raters(self, used_by: int | None = None) -> dict[str, dict[str, float]]:
        """What is known of each rater, by name; what cannot be known yet is left out.

        Args:
            used_by: an environment step: as it was when the answers used up to there were taken in, so that a run that
                is resumed at an earlier step says the same again; None: as it is now.

        answers, skipped, equal: counts; median_seconds: per answer; agreement: with the others' labels of the same
        pairs, mean of 1 − |difference|; consistency: the same with his own answers to pairs repeated with sides
        swapped; task_agreement: share of his decided answers that prefer the segment with the larger task return.
        """
        rows = self._all(
            "SELECT a.question, a.rater, a.label, a.repeat, a.seconds, q.returns FROM answer a"
            " JOIN question q ON q.id = a.question WHERE a.undone IS NULL AND (?1 IS NULL OR (q.step <= ?1"
            " AND a.given <= (SELECT max(b.given) FROM answer b JOIN question p ON p.id = b.question"
            "                 WHERE p.step <= ?1 AND b.repeat = 0 AND b.undone IS NULL))) ORDER BY a.given",
            used_by,
        )
        labels: dict[int, dict[str, float]] = {}
        for question, rater, label, repeat, _, _ in rows:
            if not repeat and label is not None:
                labels.setdefault(question, {})[rater] = label
        found: dict[str, dict[str, float]] = {}
        for rater in dict.fromkeys(row[1] for row in rows):
            own = [row for row in rows if row[1] == rater and not row[3]]
            again = [row for row in rows if row[1] == rater and row[3]]
            others = [
                1 - abs(given[rater] - label)
                for given in labels.values()
                if rater in given
                for other, label in given.items()
                if other != rater
            ]
            same = [
                1 - abs(row[2] - labels[row[0]][rater])
                for row in again
                if row[2] is not None and rater in labels.get(row[0], {})
            ]
            task = []
            for _, _, label, _, _, returns in own:
                if label is not None and label != 0.5 and returns is not None:
                    first, second = json.loads(returns)
                    if first != second:
                        task.append(float((label > 0.5) == (first > second)))
            measured: dict[str, list[float]] = {"agreement": others, "consistency": same, "task_agreement": task}
            found[rater] = {
                "answers": float(len(own)),
                "skipped": float(sum(row[2] is None for row in own)),
                "equal": float(sum(row[2] == 0.5 for row in own)),
                "median_seconds": statistics.median(row[4] for row in own + again),
                **{name: statistics.fmean(values) for name, values in measured.items() if values},
            }
        return found


def _made(db: sqlite3.Connection) -> set[tuple[str, str, str]]:
    """Kind, name and statement of whatever was made in a database."""
    return {(kind, name, sql or "") for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_master")}


def _check_name(rater: str) -> None:
    if not NAME.fullmatch(rater):
        raise Refused("a rater's name has 1 to 40 letters, digits, spaces or any of . _ @ -")
