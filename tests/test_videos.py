"""Videos of evaluations and of pairs: what they show, and that training does not notice them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from envs.pointmass import PointMass
from pbrl.launch.configuration import ConfigError
from pbrl.launch.one_run import print_summary
from pbrl.records.videos import BAR, SIZE, film_pairs
from pbrl.types import Answer, Query, Segments
from tests.conftest import config, finish, rows, tiny_loop
from tests.films import read_film


@pytest.mark.slow
def test_training_does_not_notice_that_it_is_filmed(tmp_path: Path, tiny_run: Path) -> None:
    run_dir = tmp_path / "run"
    finish(tiny_loop(run_dir, "eval.video=true", "feedback.video=true"))
    filmed = rows(run_dir)
    videos = [row for row in filmed if "eval/video" in row or "feedback/video" in row]
    assert [row for row in filmed if row not in videos] == rows(tiny_run)
    assert len(videos) == len(list((run_dir / "videos").glob("*.mp4"))) == 4 + 3  # evaluations, sessions
    assert len(read_film(run_dir / "videos" / "eval_000000600.mp4", SIZE, SIZE)) == 50
    assert len(read_film(run_dir / "videos" / "feedback_000000200.mp4", SIZE, 2 * SIZE)) == 5 * 10


@pytest.mark.slow
def test_the_closing_lines_name_the_film_of_the_last_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = finish(tiny_loop(tmp_path / "run", "eval.video=true", "updater=oracle", "eval.every=600"))
    print_summary(summary, tmp_path / "run")
    assert f"film of the last evaluation    {tmp_path}/run/videos/eval_000000600.mp4\n" in capsys.readouterr().out
    assert config("experiment=quick")[0].eval.video


def test_the_preferred_segment_has_the_bar(tmp_path: Path) -> None:
    env = PointMass()
    env.reset(seed=0)
    state, actions = env.get_state(), torch.zeros(3, 2, 2)
    segments = Segments(torch.zeros(3, 2, env.observation_space.shape[0]), actions)
    states = torch.from_numpy(state).expand(3, 2, -1).clone()
    query = Query(segments, segments, torch.zeros(3, 2, 2), states=states)
    answer = Answer(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([True, True, False]))
    film_pairs(env, query, answer, tmp_path / "pairs.mp4")
    frames = read_film(tmp_path / "pairs.mp4", SIZE, 2 * SIZE)[::2].astype(float)
    centres = [(frame[-BAR // 2, SIZE // 2], frame[-BAR // 2, SIZE + SIZE // 2]) for frame in frames]
    greenness = [[colour[1] - colour[0] > 60 for colour in pair] for pair in centres]
    assert greenness == [[True, False], [False, True], [False, False]]
    assert all(np.ptp(colour) < 30 and colour.mean() < 150 for colour in centres[2]), "no grey bar on a skipped pair"


@pytest.mark.slow
def test_a_machine_that_cannot_draw_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def render(self: PointMass, width: int = 0, height: int = 0) -> np.ndarray:
        raise RuntimeError("no OpenGL")

    monkeypatch.setattr(PointMass, "render", render)
    assert finish(tiny_loop(tmp_path / "run", "eval.video=true", "updater=oracle"))["complete"]
    assert "no video at step 0: no OpenGL" in capsys.readouterr().out


def test_filming_what_cannot_be_restored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = PointMass.__init__

    def forgetful(self: PointMass, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.state_size = 0

    monkeypatch.setattr(PointMass, "__init__", forgetful)
    with pytest.raises(ConfigError, match=r"eval\.video and feedback\.video need"):
        tiny_loop(tmp_path / "run", "eval.video=true")
