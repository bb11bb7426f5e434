"""The papers' figures from stored runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import figures
from tests.test_compare import write_run


class Corridor:
    """The state is the number of steps taken, an episode has 10, the reward is the action, a picture shows the step."""

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        self.step_count, self.seed = 0, seed
        return np.array([0.0]), {}

    def step(self, action: float) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.step_count += 1
        return np.array([float(self.step_count)]), action, False, self.step_count == 10, {}

    def render(self, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), 20 * self.step_count, dtype=np.uint8)

    def close(self) -> None:
        self.closed = True


class Walker:
    def __init__(self, speed: float) -> None:
        self.speed = speed

    def predict(self, obs: np.ndarray, deterministic: bool) -> tuple[float, None]:
        assert deterministic
        return self.speed, None


def test_a_film_strip_spans_the_episode_from_the_first_state_to_the_last() -> None:
    steps, pictures, total = figures.film_strip(Walker(2.0), Corridor(), seed=0, frames=5)
    assert steps == [0, 2, 5, 8, 10] and total == 20.0
    assert [int(picture[0, 0, 0]) // 20 for picture in pictures] == steps
    steps, pictures, total = figures.film_strip(Walker(2.0), Corridor(), seed=0, frames=3, until=4)
    assert steps == [0, 2, 4] and total == 20.0  # the return is the whole episode's
    assert [int(picture[0, 0, 0]) // 20 for picture in pictures] == steps
    steps, pictures, _ = figures.film_strip(Walker(2.0), Corridor(), seed=0, frames=3, until=8, since=4)
    assert steps == [4, 6, 8]
    assert [int(picture[0, 0, 0]) // 20 for picture in pictures] == steps


def test_strips_have_a_row_per_run_named_by_method_and_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_run(tmp_path / name, updater=name) for name in ("pebble", "aparl")]
    speeds = dict(zip(folders, (1.0, 3.0), strict=True))
    envs = [Corridor(), Corridor()]
    rest = iter(envs)
    monkeypatch.setattr("pbrl.evaluate.load_run", lambda folder: (Walker(speeds[folder]), next(rest)))
    drawn: list[Any] = []
    draw = figures.strips_figure
    monkeypatch.setattr(figures, "strips_figure", lambda *a: drawn.append(draw(*a)) or drawn[0])
    figures.main(["strips", *map(str, folders), "--frames", "4", "--out", str(tmp_path / "new" / "strips.png")])
    assert (tmp_path / "new" / "strips.png").read_bytes().startswith(b"\x89PNG")
    labels = [panel.get_ylabel() for panel in drawn[0].axes if panel.get_ylabel()]
    assert labels == ["pebble\nreturn 10", "aparl\nreturn 30"]
    assert [len(panel.images) for panel in drawn[0].axes] == [1] * 8
    assert all(env.closed for env in envs)  # an open one ends in OpenGL's complaints


def test_a_film_shows_the_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_run(tmp_path / name, updater=name) for name in ("oracle", "pebble")]
    speeds = dict(zip(folders, (2.0, 3.0), strict=True))
    monkeypatch.setattr("pbrl.evaluate.load_run", lambda folder: (Walker(speeds[folder]), Corridor()))
    out = tmp_path / "film.gif"
    figures.main(["strips", *map(str, folders), "--frames", "6", "--since", "5", "--out", str(out)])
    with Image.open(out) as film:
        assert film.size == (2 * figures.FILM, figures.FILM) and film.n_frames == 6
        for frame in range(6):
            film.seek(frame)
            shown = [film.convert("RGB").getpixel((figures.FILM * column + 50, 50))[0] for column in (0, 1)]
            assert shown == [20 * (5 + frame)] * 2


def test_strips_of_different_tasks_are_refused(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / task, task) for task in ("hammer", "walker-walk")]
    with pytest.raises(SystemExit, match="on one task, but these are on hammer, walker-walk"):
        figures.main(["strips", *map(str, folders), "--out", str(tmp_path / "strips.png")])


def test_curves_come_with_their_numbers(tmp_path: Path) -> None:
    for updater in ("pebble", "aparl", "oracle"):
        for seed in range(2):
            write_run(tmp_path / f"runs/{updater}{seed}", updater=updater, seed=seed)
    figures.main(["curves", str(tmp_path / "runs"), "--out", str(tmp_path / "figure2.png")])
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "figure2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"pebble", "aparl", "oracle"}
    assert len(rows) == 3 * 21  # methods times evaluations
