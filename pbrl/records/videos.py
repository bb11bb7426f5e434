"""Videos of what the policy did and of the pairs that were asked about, drawn afterwards from stored simulator states.

Drawing needs an environment that may be moved about at will: the evaluation's, which starts each episode from a seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pbrl.files import beside
from pbrl.types import Answer, Query

FPS = 30
SIZE = 256  # pixels, width and height of one picture
BAR = 10  # pixels, at the bottom of the preferred segment
GREEN, GREY = (0, 158, 115), (120, 120, 120)  # legible to the colour-blind


@contextlib.contextmanager
def video_writer(path: Path) -> Iterator[Any]:
    """An mp4 (h264) to which pictures uint8 [height, width, 3] are appended; it lies at `path` when the block ends."""
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    new = beside(path, ".mp4")  # ffmpeg would write through a link
    try:
        with imageio.get_writer(new, fps=FPS, codec="libx264", pixelformat="yuv420p", macro_block_size=16) as video:
            yield video
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def film_states(env: Any, states: Sequence[np.ndarray], path: Path) -> None:
    """One picture for each state, in order.

    Raises:
        RuntimeError: if this machine cannot render (the message names what to install).
    """
    with video_writer(path) as video:
        for state in states:
            env.set_state(state)
            video.append_data(env.render(SIZE, SIZE))


def film_pairs(env: Any, query: Query, answer: Answer, path: Path) -> None:
    """The pairs one after the other, first segment on the left; a green bar under the preferred one, under both if
    they are equally good, a grey one under both if the pair was skipped.

    Raises:
        ValueError: if the query holds no simulator states. RuntimeError: as `film_states`.
    """
    if query.states is None:
        raise ValueError("pairs can be drawn only where the query holds simulator states")
    with video_writer(path) as video:
        for i in range(len(query)):
            label, given = float(answer.prefers_first[i]), bool(answer.given[i])
            bars = (given and label >= 0.5, given and label <= 0.5)
            sides = [
                _pictures(env, query.states[i, j].numpy(), segments.actions[i].numpy())
                for j, segments in enumerate((query.first, query.second))
            ]
            for pictures in zip(*sides, strict=True):
                for picture, preferred in zip(pictures, bars, strict=True):
                    if preferred or not given:
                        picture[-BAR:] = GREEN if given else GREY
                video.append_data(np.hstack(pictures))


def _pictures(env: Any, state: np.ndarray, actions: np.ndarray) -> list[np.ndarray]:
    """What was seen before each action, uint8 [SIZE, SIZE, 3] each, from the state before the first."""
    env.set_state(state)
    seen = []
    for action in actions:
        seen.append(np.array(env.render(SIZE, SIZE)))
        env.step(action)
    return seen
