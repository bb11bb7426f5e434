"""`teacher=human`: people answer on a page in their browsers, while training waits for them or goes on."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pbrl.checks import check
from pbrl.files import TEXT_BYTES, open_for_reading
from pbrl.labelling import drawing
from pbrl.labelling.service import Service
from pbrl.labelling.store import FILE_NAME, LabelStore, Pair, Taken
from pbrl.types import Answer, Query, Teacher

LOOK = 0.1  # seconds between two looks into the store
TELL = 1.0  # seconds between two lines about training


class HumanTeacher(Teacher):
    """Puts pairs on a page and returns what people answer there.

    Args:
        env: config of the environment in which clips are drawn, a table; the drawing process makes it.
        task: what the robot should do, in words; None: the page says no more than "the task".
        wait: training pauses until a session's pairs are answered; else it goes on and answers are taken in at the
            next session.
        reviews: answers by different people per pair; the label is their mean.
        lease: seconds for which a pair stays with the person to whom it was handed.
        repeats: share of each person's answers after which one is asked again, sides swapped; in [0, 1).
        undo_seconds: how long a session's last answer can still be undone before training goes on.
        host: address to listen on; anything but a loopback address can be reached by others.
        port: 0: any free one.
        size: width and height of a clip in pixels, a multiple of 16.

    Raises:
        ValueError: for a number out of range.
    """

    durable = True  # answers are on the disk one by one: no second journal is kept of them
    needs_states = True
    takes_configs = True  # `env` is not made in this process
    shows_link = True
    trains = True  # something trains on the answers; False: people label what is stored

    def __init__(
        self,
        env: Any,
        task: str | None,
        wait: bool = True,
        reviews: int = 1,
        lease: float = 120.0,
        repeats: float = 0.05,
        undo_seconds: float = 3.0,
        host: str = "localhost",
        port: int = 0,
        size: int = 256,
    ) -> None:
        check(
            "teacher",
            reviews=(reviews, reviews >= 1, "at least 1 answer a pair"),
            lease=(lease, lease > 0, "more than 0 seconds"),
            repeats=(repeats, 0 <= repeats < 1, "a share of at least 0 and below 1"),
            undo_seconds=(undo_seconds, undo_seconds >= 0, "at least 0"),
            port=(port, 0 <= port < 2**16, "a port below 65536, or 0: any free one"),
            size=(size, size >= 16 and size % 16 == 0, "a multiple of 16 pixels"),
        )
        self.env, self.wait, self.undo_seconds = dict(env), wait, undo_seconds
        self.task = task or "the task"
        self._untold = not task
        self.reviews, self.lease, self.repeats = reviews, lease, repeats
        self.host, self.port, self.size = host, port, size
        self.step = self.asked = 0  # of training, as last heard
        self.sessions = 0
        self._told = 0.0
        self._pace: tuple[float, int] | None = None  # moment and step of the last line, to tell how long it will take
        self._store: LabelStore | None = None
        self._service: Service | None = None

    # ------------------------------------------------------------------------------------------------ the run

    def open(self, run_dir: Path, segment_length: int, store: str = FILE_NAME) -> None:
        """Open the store of this name in the run's folder, serve the page and say where.

        Raises:
            ValueError: if the page cannot be served or clips cannot be drawn, in a line.
        """
        path = run_dir / store
        self._store = LabelStore(path, self.reviews, self.lease, self.repeats)
        settings = {
            "path": str(path.resolve()),
            "env": self.env,
            "task": self.task,
            "wait": self.wait,
            "reviews": self.reviews,
            "lease": self.lease,
            "repeats": self.repeats,
            "steps": segment_length,
            "host": self.host,
            "size": self.size,
            "draw": True,
        }
        self._service = Service(settings, self.port)
        self.announce()
        for row in _sessions(run_dir / "metrics.jsonl"):
            self._point(row)

    def announce(self) -> None:
        """Print where the page is."""
        service = self._open()[1]
        print(f"teach the robot at {service.link}   (several people: add ?rater=NAME before the #)")
        if self._untold:
            print('the page does not say what the robot should do: teacher.task="…" does')
        if self.host not in ("127.0.0.1", "::1", "localhost"):
            print(
                f"teacher.host={self.host}: others can reach this page, as {socket.gethostname()} or by this machine's "
                "address in place of 127.0.0.1, unencrypted; only who has the link's token can answer"
            )

    def close(self, complete: bool) -> None:
        """End the server; a finished run's page says so."""
        if self._service is not None:
            ended = "finished" if self.trains else "labelled"
            self._service.tell(status={"phase": ended if complete else "stopped"})
            self._service.close()
            self._service = None
        if self._store is not None:
            self._store.close()
            self._store = None

    def _open(self) -> tuple[LabelStore, Service]:
        if self._store is None or self._service is None:
            raise RuntimeError("the labelling page is not open: call open(run_dir, segment_length) first")
        return self._store, self._service

    def watch(self, row: Mapping[str, Any]) -> None:
        """Hear what training does (a row of metrics, or a part of one) and show it; also keeps the server alive."""
        self.step = int(row.get("env_step", self.step))
        self.asked = int(row.get("feedback/asked", self.asked))
        if self._service is None:
            return
        if "feedback/session" in row:
            self.sessions = int(row["feedback/session"])
            self._point(row)
        elif time.monotonic() < self._told + TELL:
            return
        self._told = time.monotonic()
        self._service.keep_alive()
        names = {
            "env_step": "step",
            "total_steps": "total",
            "feedback/asked": "asked",
            "feedback/budget": "budget",
            "eval/return": "return",
        }
        status = {name: row[key] for key, name in names.items() if key in row}
        if "total_steps" in row:
            status |= self._left(row["total_steps"])
        self._service.tell(status={"phase": "training" if self.trains else "labelling", **status})

    def _left(self, total: int) -> dict[str, float]:
        """Seconds of training left, by the pace since the last line."""
        before, self._pace = self._pace, (time.monotonic(), self.step)
        if before is None or self.step <= before[1]:
            return {}
        return {"eta": (total - self.step) * (self._pace[0] - before[0]) / (self.step - before[1])}

    def _point(self, row: Mapping[str, Any]) -> None:
        """One point of the page's curves."""
        agreement = row.get("reward/holdout_accuracy")
        finite = agreement is not None and np.isfinite(agreement)
        point = {"step": row["env_step"], "labels": row["feedback/labels"], "agreement": agreement if finite else None}
        self._open()[1].tell(point=point)

    def show(self, state: np.ndarray, actions: np.ndarray) -> None:
        """The robot's last steps, for the page: state float64 [S], actions float32 [T, act_dim]."""
        if self._service is not None:
            self._service.tell(robot=drawing.pack(state[None], actions[None]).hex())

    # ------------------------------------------------------------------------------------------------ the teacher

    def __call__(self, query: Query) -> Answer:
        """Ask, and wait until every pair is answered."""
        store, service = self._open()
        self.post(query)
        keys = pair_keys(query)
        while (taken := store.use(keys, self.sessions, self.step, self.undo_seconds)) is None:
            time.sleep(LOOK)
            service.keep_alive()
        self._pace = None  # thinking is not training
        service.tell(status={"phase": "training", "asked": self.asked + len(query)})
        return _answer(taken)

    def post(self, query: Query) -> None:
        """Put these pairs, and no others, on the page.

        Raises:
            ValueError: if the query has no simulator states, so that nothing can be drawn.
        """
        self._open()[0].post(pairs(query))

    def collect(self, query: Query, session: int, step: int) -> tuple[torch.Tensor, Answer]:
        """Which of the posted pairs are answered by this session, bool [N], and the answers to those, in their order.

        What the first call for a session returns is kept: a resumed run gets the same.
        """
        self.step = step
        store = self._open()[0]
        keys = pair_keys(query)
        labels = {taken.key: taken for taken in store.take(keys, session, step)}
        done = torch.tensor([key in labels for key in keys], dtype=torch.bool)
        return done, _answer([labels[key] for key in keys if key in labels])

    def answered(self, query: Query) -> int:
        """How many different pairs of a query have all their answers, the last one for at least `undo_seconds`."""
        return self._open()[0].finished(pair_keys(query), self.undo_seconds)

    def metrics(self) -> dict[str, float]:
        """Each rater's numbers as `teacher/NAME/…`, see `LabelStore.raters`."""
        return {
            f"teacher/{rater}/{name}": value
            for rater, numbers in self.raters().items()
            for name, value in numbers.items()
        }

    def raters(self) -> dict[str, dict[str, float]]:
        """See `LabelStore.raters`."""
        return {} if self._store is None else self._store.raters(self.step)


def pair_keys(query: Query) -> list[str]:
    """SHA-256 of the bytes of both segments, for each pair: equal pairs have equal keys."""
    tensors = [query.first.obs, query.first.actions, query.second.obs, query.second.actions]
    arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in tensors]
    keys = []
    for i in range(len(query)):
        digest = hashlib.sha256(repr([array.shape[1:] for array in arrays]).encode())
        for array in arrays:
            digest.update(array[i].tobytes())
        keys.append(digest.hexdigest())
    return keys


def pairs(query: Query) -> list[Pair]:
    """The query's pairs with what is needed to draw them."""
    if query.states is None or query.states.shape[2] == 0:
        raise ValueError("people see clips, which need simulator states that can be restored; these pairs have none")
    returns = query.task_rewards.sum(dim=2)
    found = []
    for i, key in enumerate(pair_keys(query)):
        actions = np.stack([query.first.actions[i].numpy(), query.second.actions[i].numpy()])
        first, second = returns[i].tolist()
        known = (first, second) if np.isfinite([first, second]).all() else None
        found.append(Pair(key, drawing.pack(query.states[i].numpy(), actions), known))
    return found


def _answer(taken: list[Taken]) -> Answer:
    labels = [0.5 if item.label is None else item.label for item in taken]
    given = [item.label is not None for item in taken]
    return Answer(torch.tensor(labels, dtype=torch.float32), torch.tensor(given, dtype=torch.bool))


def _sessions(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's log that end a session."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    with open_for_reading(path) as file:
        for line in iter(partial(file.readline, TEXT_BYTES), b""):
            try:
                row = json.loads(line)
            except ValueError:  # torn by a crash
                break
            if isinstance(row, dict) and "feedback/session" in row:
                rows.append(row)
    return rows
