"""A teacher who remembers: answers from a preference data set, asking nobody."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pbrl.files import open_for_reading, printable, read_npz
from pbrl.types import Answer, Query, Teacher

log = logging.getLogger(__name__)


class RecordedTeacher(Teacher):
    """Answers exactly the pairs that are in a data set and skips all others.

    A pair is known if the float32 values of both its segments equal the stored ones bit for bit, in either order. Such
    pairs come from the run that was recorded and from runs that repeat its steps. A run of another method asks
    about other segments: start that one from the data set itself with `import_preferences=FILE`.

    A pair that was answered several times gets the mean of its labels.

    Args:
        path: an npz file written by `python -m pbrl.preferences export` or by a run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a preference data set.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no recorded preferences at {path}; `python -m pbrl.preferences export RUN {path}` makes them"
            )
        with open_for_reading(Path(path)) as file:
            try:
                self._labels = _read(file)
            except Exception as error:  # whatever zipfile and numpy raise on a damaged file, OSError among it
                raise ValueError(f"{path} is not a preference data set: {printable(error)}") from error
        self.path = path
        self._known_rate = 0.0

    def __call__(self, query: Query) -> Answer:
        first, second = _keys(query.first.obs, query.first.actions), _keys(query.second.obs, query.second.actions)
        labels = [self._labels.get(pair) for pair in zip(first, second, strict=True)]
        given = [label is not None for label in labels]
        self._known_rate = sum(given) / len(given) if given else 0.0
        if not any(given):
            log.warning("%s holds none of the %d pairs asked; all are skipped", self.path, len(given))
        return Answer(torch.tensor([0.5 if label is None else label for label in labels]), torch.tensor(given))

    def metrics(self) -> dict[str, float]:
        """`teacher/known_rate`: share of the last query's pairs that are in the data set."""
        return {"teacher/known_rate": self._known_rate}

    def state_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return self.metrics()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._known_rate = state["teacher/known_rate"]


def _read(file: BinaryIO) -> dict[tuple[bytes, bytes], float]:
    """Mean label of each stored pair, in both orders."""
    arrays = read_npz(file)
    length = json.loads(str(arrays["metadata"]))["horizon"]
    obs, actions, labels = (arrays[name] for name in ("obs", "actions", "prefers_first"))
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("a label is outside [0, 1]")
    margin = (obs.shape[2] - length) // 2
    centre = slice(margin, margin + length)
    sides = [
        _keys(torch.from_numpy(obs[:, side, centre]), torch.from_numpy(actions[:, side, centre])) for side in (0, 1)
    ]
    found = defaultdict(list)
    for first, second, label in zip(*sides, labels.tolist(), strict=True):
        found[first, second].append(label)
        found[second, first].append(1 - label)
    return {pair: sum(answers) / len(answers) for pair, answers in found.items()}


def _keys(obs: Tensor, actions: Tensor) -> list[bytes]:
    """A hash of each segment's exact values. obs: float32 [N, H, obs_dim], actions: float32 [N, H, act_dim]."""
    return [
        hashlib.sha256(o.tobytes() + a.tobytes()).digest()
        for o, a in zip(obs.cpu().numpy(), actions.cpu().numpy(), strict=True)
    ]
