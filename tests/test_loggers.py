"""Local rows, W&B offline and unreachable, TensorBoard."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pbrl.launch.build import build
from pbrl.launch.stored import read_config
from pbrl.loop import Stopped
from pbrl.records.loggers import JsonLines, Loggers, numbers, plain
from tests.conftest import config, finish, tiny_loop


def test_rows_are_json_and_flushed_at_once(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.log({"env_step": 1, "a": float("nan"), "b": 2.5})
    shown = (tmp_path / "metrics.jsonl").read_text()  # before it is closed
    log.close({})
    assert json.loads(shown) == {"env_step": 1, "a": None, "b": 2.5}


def test_plain_values() -> None:
    assert [plain(v) for v in (np.float32(1.5), torch.tensor(2), float("inf"), "x")] == [1.5, 2, None, "x"]


def test_metrics_are_numbers() -> None:
    told = {"a": 1, "b": np.float32(0.5), "c": torch.tensor(2.0), "d": None, "e": math.nan}
    assert numbers(told, "teacher x") == told
    for value in ("strict", [1, 2], torch.ones(2), np.ones(2)):
        with pytest.raises(ValueError, match=r"teacher x reports own/mode=.*; expected a number"):
            numbers({"own/mode": value}, "teacher x")


def test_a_remote_sink_that_fails_is_dropped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def log(self, row):
            raise ConnectionError("no route")

    loggers = Loggers(JsonLines(tmp_path / "m.jsonl"), [Broken()])  # type: ignore[list-item]
    loggers.log({"env_step": 1})
    loggers.log({"env_step": 2})
    loggers.close({})
    assert capsys.readouterr().out.count("logging to Broken stopped (no route)") == 1
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_wandb_offline_keeps_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    finish(tiny_loop(run_dir, "logger=wandb", "eval.video=true", "logger.artifacts=true"))
    assert "W&B is offline" in capsys.readouterr().out
    [folder] = (run_dir / "wandb").glob("offline-run-*")
    [record] = folder.glob("*.wandb")
    shown = subprocess.run(
        ["wandb", "leet", "inspect", "--summary", "--json", str(record)], capture_output=True, text=True, check=True
    )
    assert "eval/return" in shown.stdout
    assert "env_step" in shown.stdout
    tables = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    assert [len(table["data"]) for table in tables] == [5, 5, 5]  # the pairs of each session
    assert {row[-1] for table in tables for row in table["data"]} <= {"1", "2", "equal"}
    assert "feedback/pairs" in shown.stdout
    assert len(list(folder.rglob("*.mp4"))) == 4
    assert (
        "checkpoint-"
        in subprocess.run(
            ["wandb", "leet", "inspect", "--json", str(record)], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.slow
def test_wandb_offline_goes_on_in_a_new_folder_of_the_same_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    loop = tiny_loop(run_dir, "logger=wandb", "updater=oracle")
    loop.stop = lambda: loop.step >= 300
    with pytest.raises(Stopped):
        finish(loop)
    cfg, choices = config(f"resume={run_dir}")
    finish(build(cfg, choices, [f"resume={run_dir}"]))
    assert "a new offline folder of the same id, beside 1" in capsys.readouterr().out
    folders = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    # offline-run-DATE_TIME-ID, and a number behind it where both were opened within the same second
    assert len({folder.name.split("-")[3] for folder in folders}) == 1


class Own:
    """A logger that keeps what it is given."""

    made: ClassVar[list[Own]] = []

    def __init__(self, run_dir: Path, run_config: Any, choices: dict[str, str], note: str) -> None:
        self.note, self.choices, self.steps = note, choices, []
        Own.made.append(self)

    def log(self, row: Any) -> None:
        self.steps.append(row["env_step"])

    def table(self, *_: Any) -> None: ...
    def close(self, summary: Any) -> None: ...


class Bare(Own):
    """One that takes less."""

    def __init__(self, run_dir: Path, run_config: Any, choices: dict[str, str]) -> None:
        super().__init__(run_dir, run_config, choices, "none")


@pytest.mark.slow
def test_a_resumed_run_takes_another_logger_and_keeps_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    loop = tiny_loop(run_dir)
    loop.stop = lambda: loop.step >= 300
    with pytest.raises(Stopped):
        finish(loop)
    Own.made.clear()
    for given in ((), ("replaced=[logger]", "++logger._target_=tests.test_loggers.Own", "++logger.note=a"), ()):
        overrides = [f"resume={run_dir}", "trust=[tests.test_loggers]", *given]
        loop = build(*config(*overrides), overrides)
        loop.stop = lambda loop=loop: loop.step >= 300 + 100 * len(Own.made)
        with pytest.raises(Stopped):
            finish(loop)
    before, after = Own.made
    assert before.note == after.note == "a" and before.steps[0] == 300 and after.steps[0] == 400
    overrides = [f"resume={run_dir}", "trust=[tests.test_loggers]", "replaced=[logger]"]
    overrides.append("++logger._target_=tests.test_loggers.Bare")
    build(*config(*overrides), overrides).close(False)
    assert Own.made.pop().note == "none", "what the one before took is gone"
    overrides = [f"resume={run_dir}", "logger=local", "trust=[tests.test_loggers]"]
    finish(build(*config(*overrides), overrides))
    assert len(Own.made) == 2 and read_config(run_dir)[1]["logger"] == "local"


@pytest.mark.slow
def test_wandb_with_an_unreachable_server_goes_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    summary = finish(tiny_loop(tmp_path / "run", "logger=wandb", "logger.init_timeout=5"))
    assert summary["complete"]


def test_wandb_refuses_an_unknown_mode(tmp_path: Path) -> None:
    from pbrl.launch.configuration import ConfigError

    with pytest.raises(ConfigError, match=r"logger\.mode=of"):
        tiny_loop(tmp_path / "run", "logger=wandb", "logger.mode=of")
