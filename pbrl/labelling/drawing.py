"""Clips, drawn from stored simulator states: what a question keeps for it, and the process that draws.

Drawing runs in a process of its own, so that neither the page nor training waits for it; while training goes on, it
gives way to it. It knows the environment by its config only.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pbrl.files import read_npz

SHORTEST = 1.5  # seconds that a clip lasts at least: shorter segments are slowed down
FPS = 20  # pictures per second of a clip
HOLD = 0.4  # seconds for which the last picture stands, so that the end is seen
GAP = 16  # pixels, white, between the two clips
LAST = 3.0  # seconds for a clip that is being drawn when all ends
LARGEST = 8_000_000  # bytes of what a question keeps


def pack(states: np.ndarray, actions: np.ndarray) -> bytes:
    """What a question keeps: simulator states float64 [K, S] before the first action of K segments, and their actions
    float32 [K, H, act_dim]."""
    file = io.BytesIO()
    np.savez(file, states=states, actions=actions)
    return file.getvalue()


def unpack(clips: bytes) -> tuple[np.ndarray, np.ndarray]:
    """What `pack` packed.

    Raises:
        ValueError: if it is anything else.
    """
    if len(clips) > LARGEST:
        raise ValueError(f"{len(clips)} bytes are no question")
    try:
        arrays = read_npz(io.BytesIO(clips))
        states, actions = arrays["states"], arrays["actions"]
    except Exception as error:  # whatever zipfile and numpy raise on damaged bytes
        raise ValueError(f"a stored question is damaged: {error}") from error
    if states.ndim != 2 or actions.ndim != 3 or len(states) != len(actions) or states.dtype != np.float64:
        raise ValueError(f"a stored question is damaged: states {states.shape}, actions {actions.shape}")
    return states, actions


class Process:
    """The process that draws; started when it is needed, and again if it was killed.

    Args:
        env: config of the environment. size: width and height of one picture, pixels.
        yields: to every other process: training goes on meanwhile.
    """

    def __init__(self, env: Mapping[str, Any], size: int, yields: bool = True) -> None:
        self.env, self.size, self.yields = dict(env), size, yields
        self._lock = threading.Lock()  # whoever holds it starts the process, speaks with it or ends it
        self._stopped = False
        self._process: Any = None
        self._pipe: Any = None

    def start(self) -> float | None:
        """Seconds of one environment step, or None if the environment does not say.

        Raises:
            RuntimeError: if the environment cannot be drawn here.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, self.env, self.size, self.yields), daemon=True)
        process.start()
        self._process = process
        other.close()
        return self._receive()

    def film(self, clips: bytes, swapped: bool = False) -> bytes:
        """See `film`.

        Raises:
            RuntimeError: if it cannot be drawn, or after `stop`.
        """
        with self._lock:
            for attempt in (1, 2):
                if self._stopped:
                    break
                try:
                    if self._process is None:
                        self.start()
                    self._pipe.send((clips, swapped))
                    return self._receive()
                except (EOFError, OSError):  # it was killed
                    self._end()
                    if attempt == 2:
                        raise RuntimeError("the process that draws clips ends by itself") from None
        raise RuntimeError("no more clips are drawn")

    def _receive(self) -> Any:
        drawn, result = self._pipe.recv()
        if not drawn:
            raise RuntimeError(result)
        return result

    def stop(self) -> None:
        """End it for good: after the clip that it is drawing, if that takes no longer than it may."""
        self._stopped = True
        if not self._lock.acquire(timeout=LAST):
            if self._process is not None:
                self._process.kill()
            self._lock.acquire()
        try:
            self._end()
        finally:
            self._lock.release()

    def _end(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(LAST)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Any, env_config: Mapping[str, Any], size: int, yields: bool) -> None:
    """The drawing process: builds its environment, draws what it is sent, ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from hydra.utils import instantiate

        env = instantiate(dict(env_config), _convert_="all")
        env.reset(seed=0)
        env.render(size, size)  # fails now rather than at the first question
    except Exception as error:  # whatever an environment raises
        pipe.send((False, f"the environment cannot be drawn: {error.__cause__ or error}"))
        return
    with Path(os.devnull).open("w") as nowhere:  # what ffmpeg says when it is killed, or a simulator, is no news
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if yields and hasattr(os, "nice"):  # from here on: training waits for the start
        os.nice(19)
    seconds = getattr(env, "step_seconds", None)
    pipe.send((True, None if seconds is None else float(seconds)))
    while True:
        try:
            clips, swapped = pipe.recv()
        except EOFError:  # the parent has ended
            return
        try:
            pipe.send((True, film(env, clips, size, seconds, swapped)))
        except Exception as error:  # whatever an environment raises
            pipe.send((False, f"a clip cannot be drawn: {type(error).__name__}: {error}"))


def timing(steps: int, step_seconds: float | None) -> tuple[float, float]:
    """Seconds that a segment took (30 steps a second where the environment does not say), and that its clip lasts."""
    real = steps * (step_seconds or 1 / 30)
    return real, max(real, SHORTEST)


def film(env: Any, clips: bytes, size: int, step_seconds: float | None, swapped: bool = False) -> bytes:
    """An mp4 of the segments beside each other, in step, the first on the left unless `swapped`.

    Raises:
        ValueError: for damaged bytes. RuntimeError: if this machine cannot draw.
    """
    states, actions = unpack(clips)
    steps = actions.shape[1]
    _, lasts = timing(steps, step_seconds)
    moments = np.unique(np.linspace(0, steps, max(round(lasts * FPS), 2)).round().astype(int))
    order = range(len(states))[::-1] if swapped else range(len(states))
    sides = [_pictures(env, states[i], actions[i], moments, size) for i in order]
    gap = np.full((size, GAP, 3), 255, np.uint8)
    frames = []
    for pictures in zip(*sides, strict=True):
        parts = [part for picture in pictures for part in (gap, picture)][1:]
        frames.append(np.hstack(parts))
    fps = len(frames) / lasts
    return _encode(frames + frames[-1:] * round(HOLD * fps), fps)


def _pictures(env: Any, state: np.ndarray, actions: np.ndarray, moments: np.ndarray, size: int) -> list[np.ndarray]:
    """Pictures uint8 [size, size, 3] after these numbers of steps, ascending in [0, H]."""
    env.set_state(state)
    taken, pictures = 0, []
    for moment in moments:
        for action in actions[taken:moment]:
            env.step(action)
        taken = int(moment)
        pictures.append(np.array(env.render(size, size)))
    return pictures


def _encode(frames: list[np.ndarray], fps: float) -> bytes:
    import imageio.v2 as imageio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        options = ["-preset", "veryfast", "-movflags", "+faststart", "-threads", "1"]
        writer: Any = imageio.get_writer(
            path, fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=16, ffmpeg_params=options
        )
        with writer as video:
            for frame in frames:
                video.append_data(frame)
        return path.read_bytes()
