"""`python -m pbrl.evaluate`: numbers, video, errors."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import precision
from pbrl.evaluate import load_run, main
from pbrl.records.evaluation import act, evaluate
from pbrl.records.videos import SIZE
from tests.conftest import finish, tiny_loop
from tests.films import read_film


def test_the_loaded_agent_acts_as_the_run_did(tiny_run: Path) -> None:
    import json

    agent, env = load_run(tiny_run)
    last = json.loads((tiny_run / "summary.json").read_text())
    metrics = evaluate(agent, env, 2, seed=1_000_000)
    assert metrics["eval/return"] == last["eval/return"]


def test_it_prints_numbers_and_writes_a_video(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_run), "--episodes", "3", "--video", str(tmp_path / "v.mp4")]) == 0
    shown = capsys.readouterr().out
    assert "true return" in shown
    assert "success" in shown
    frames = read_film(tmp_path / "v.mp4", SIZE, SIZE)
    assert len(frames) == 50 and np.ptp(frames[0]) > 0


def test_a_rank_correlation_of_too_few_segments_is_unknown(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    assert main([str(run), "--episodes", "1"]) == 0
    assert re.search(r"rank correlation -?[01]\.\d\d\n", capsys.readouterr().out)
    (run / "config.yaml").write_text(config.replace("segment_length: 10", "segment_length: 25"))  # of 50 steps
    assert main([str(run), "--episodes", "1"]) == 0
    assert "rank correlation unknown (fewer than four segments" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: there is no run (no config.yaml in it)\n"


def test_fresh_seeds_give_other_episodes(tiny_run: Path) -> None:
    agent, env = load_run(tiny_run)
    first, second = (evaluate(agent, env, 2, seed)["eval/return"] for seed in (1_000_000, 2_000_000))
    assert first != second


def test_actions_are_in_range(tiny_run: Path) -> None:
    agent, _ = load_run(tiny_run)
    assert (np.abs(act(agent, np.full(2, 1e3, np.float32))) <= 1).all()


def test_the_error_of_bf16_is_told_apart_from_the_spread_over_actions(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    assert precision.over_actions(numbers) == pytest.approx(0.5**0.5)  # what differs between rows does not count
    table = tmp_path / "precision.csv"
    precision.main([str(tiny_run), "--out", str(table)])
    found = precision.measured(tiny_run)
    assert 0 < found["error"] < found["spread"]
    assert capsys.readouterr().out.startswith(f"{tiny_run.name}: Q {found['mean']:.1f}, over actions ± ")
    with pytest.raises(SystemExit):
        precision.main([str(tmp_path)])
    assert capsys.readouterr().err.endswith(f"error: {tmp_path}: there is no run (no config.yaml in it)\n")
    assert table.read_text().splitlines()[1] == ",".join(str(value) for value in found.values())


@pytest.mark.slow
def test_a_loaded_agent_can_be_trained_further(tmp_path: Path) -> None:
    """The statistics that it sees observations in go on from the run's, and so does its temperature."""
    loop = tiny_loop(tmp_path / "run", "agent.normalise=true")
    finish(loop)
    agent, _ = load_run(tmp_path / "run")
    assert agent.seen is not None and loop.agent.seen is not None
    assert agent.seen.count == loop.agent.seen.count > 600
    assert torch.equal(agent.log_ent_coef, loop.agent.log_ent_coef)  # type: ignore[arg-type]
    states = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    before = np.stack([act(agent, obs) for obs in states])
    agent.collect(3, updates=0)
    np.testing.assert_allclose(np.stack([act(agent, obs) for obs in states]), before, atol=0.02)
